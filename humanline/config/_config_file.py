"""Reads a recipe's config from its command line: ``--config FILE key=value ... ~key ...``. Every error is one line."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from humanline.errors import ConfigError

USAGE = "tune run RECIPE --config FILE [key=value ...] [~key ...]"


def read_config(arguments: Sequence[str]) -> DictConfig:
    """Reads a config file and applies the overrides of a command line.

    Args:
        arguments (Sequence[str]): the command line, without the program's name.

    Raises:
        ConfigError: if an argument, a key or the file is wrong. The message names the argument, key, or file and line.
    """
    files, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        flag, has_value, value = argument.partition("=")
        if flag in ("-h", "--help"):
            print(f"usage: {USAGE}")
            sys.exit(0)
        if flag == "--config":
            files.append(value if has_value else next(rest, ""))
        elif flag.startswith("-"):
            raise ConfigError(
                f"{flag}: not an option of a recipe; put torchrun's options before the recipe's name, and write "
                f"settings as key=value; usage: {USAGE}"
            )
        else:
            overrides.append(argument)
    if len(files) != 1 or not files[0]:
        given = f"expected one file, got {len(files)} ({', '.join(files)})" if len(files) > 1 else "missing"
        raise ConfigError(f"--config: {given}; usage: {USAGE}")
    return with_overrides(load_config(files[0]), overrides)


def load_config(file: str | Path) -> DictConfig:
    """Reads a YAML file.

    Raises:
        ConfigError: if the file does not exist or is not a YAML mapping. The message names the line of a YAML error.
    """
    if not Path(file).is_file():
        raise ConfigError(
            f"--config: file {file} not found (working directory {Path.cwd()}); correct the path, or use a name that "
            "tune ls lists"
        )
    try:
        cfg = OmegaConf.load(file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: invalid YAML: {getattr(error, 'problem', None) or _line(error)}") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}: cannot read this file as a config: {_line(error)}") from error
    if not isinstance(cfg, DictConfig) or not cfg:
        raise ConfigError(f"{file}: found no keys, expected lines of key: value as in the files of configs/")
    return cfg


def with_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Returns a copy of a config with command-line overrides: ``key=value`` sets a key, ``~key`` removes one.

    The key of a component sets its ``_component_``: ``loss=humanline.losses.HumanlineKTOLoss`` replaces
    ``loss._component_``.

    Raises:
        ConfigError: if an override has another form, removes an absent key, or sets a key inside a plain value; or if
            the resulting config refers to a missing key or variable.
    """
    # The copy drops the types of its nodes, so a value can replace one of another type.
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))  # type: ignore[assignment]
    seen: dict[str, str] = {}
    for override in overrides:
        key, has_value, value = override.removeprefix("~").partition("=")
        removes = override.startswith("~")
        parts = key.split(".")
        if not all(parts) or (not removes and not has_value):
            raise ConfigError(f"override {override!r}: expected key=value or ~key; usage: {USAGE}")
        if key in seen:
            raise ConfigError(f"override {override!r}: {seen[key]!r} already overrides {key}; remove one of them")
        seen[key] = override
        section = _section(cfg, parts[:-1], override, create=not removes)
        if removes:
            _remove(section, parts)
        else:
            _set(section, parts, value, override)
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{key}: cannot resolve its value: {_line(error)}") from error
    return cfg


def _section(cfg: DictConfig, names: list[str], override: str, create: bool) -> DictConfig:
    """Returns the section of a config that holds an override's key."""
    section: Any = cfg
    for place, name in enumerate(names):
        inner = OmegaConf.to_container(section).get(name)  # type: ignore[union-attr]
        if inner is None and create:
            section[name] = {}
        elif inner is None:
            raise _absent(section, names[: place + 1])
        elif not isinstance(inner, dict):
            above = ".".join(names[: place + 1])
            raise ConfigError(f"override {override!r}: expected a section at {above}, found {inner!r}; correct the key")
        section = section[name]
    return section


def _set(section: DictConfig, parts: list[str], value: str, override: str) -> None:
    name = parts[-1]
    if OmegaConf.is_dict(section.get(name)) and "_component_" in section[name]:
        section, name = section[name], "_component_"
    if value == "None":
        value = "null"
    if name == "max_filename":  # a string whose leading zeros matter
        section[name] = value
        return
    try:
        (section[name],) = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"])).values()  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: the value is invalid YAML: {_line(error)}") from error


def _remove(section: DictConfig, parts: list[str]) -> None:
    if parts[-1] not in section:
        raise _absent(section, parts)
    del section[parts[-1]]


def _absent(section: DictConfig, parts: list[str]) -> ConfigError:
    known = list(map(str, section))
    close = get_close_matches(parts[-1], known, n=1, cutoff=0.5)
    there = f"did you mean {'.'.join([*parts[:-1], close[0]])}?" if close else f"expected one of {', '.join(known)}"
    return ConfigError(f"override: found no key {'.'.join(parts)} to remove; {there}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
