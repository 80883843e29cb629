"""A recipe's config from its command line: ``--config FILE key=value ... ~key ...``, with an error in one line."""

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
        arguments (Sequence[str]): the command line, without the program.

    Raises:
        ConfigError: naming the argument, the key, or the file and line that is wrong.
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
                f"{flag}: is no option of a recipe; torchrun's options stand before the recipe's name, and settings "
                f"are key=value: {USAGE}"
            )
        else:
            overrides.append(argument)
    if len(files) != 1 or not files[0]:
        given = f"is given {len(files)} times ({', '.join(files)}); give one" if len(files) > 1 else "is missing"
        raise ConfigError(f"--config: {given}: {USAGE}")
    return with_overrides(load_config(files[0]), overrides)


def load_config(file: str | Path) -> DictConfig:
    """Reads a YAML file.

    Raises:
        ConfigError: if it is not there, or is no YAML with named keys; with the line.
    """
    if not Path(file).is_file():
        raise ConfigError(
            f"--config: there is no file {file} (looked for from {Path.cwd()}); correct the path, or give a name that "
            "tune ls lists"
        )
    try:
        cfg = OmegaConf.load(file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: is no YAML: {getattr(error, 'problem', None) or _line(error)}") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}: cannot be read as a config: {_line(error)}") from error
    if not isinstance(cfg, DictConfig) or not cfg:
        raise ConfigError(f"{file}: holds no keys; a config is lines of key: value, as in the files of configs/")
    return cfg


def with_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A config with what stands behind it on a command line: ``key=value`` sets a key, ``~key`` removes one.

    A component is replaced by its own key: ``loss=humanline.losses.HumanlineKTOLoss`` sets ``loss._component_``.

    Raises:
        ConfigError: if an override has another form, removes a key that is not there, or sets one inside of a value;
            or if the config then refers to what is not there.
    """
    # A copy with its parts' types forgotten, so that any value may replace any other.
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))  # type: ignore[assignment]
    seen: dict[str, str] = {}
    for override in overrides:
        key, has_value, value = override.removeprefix("~").partition("=")
        removes = override.startswith("~")
        parts = key.split(".")
        if not all(parts) or (not removes and not has_value):
            raise ConfigError(f"override {override!r}: is neither key=value nor ~key; correct it: {USAGE}")
        if key in seen:
            raise ConfigError(f"override {override!r}: {key} is overridden already, by {seen[key]!r}; leave one out")
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
        raise ConfigError(f"{key}: refers to what is not there: {_line(error)}") from error
    return cfg


def _section(cfg: DictConfig, names: list[str], override: str, create: bool) -> DictConfig:
    """The part of a config that holds an override's key."""
    section: Any = cfg
    for place, name in enumerate(names):
        inner = OmegaConf.to_container(section).get(name)  # type: ignore[union-attr]
        if inner is None and create:
            section[name] = {}
        elif inner is None:
            raise _absent(section, names[: place + 1])
        elif not isinstance(inner, dict):
            above = ".".join(names[: place + 1])
            raise ConfigError(f"override {override!r}: {above} is {inner!r}, which has no keys of its own; correct it")
        section = section[name]
    return section


def _set(section: DictConfig, parts: list[str], value: str, override: str) -> None:
    name = parts[-1]
    if OmegaConf.is_dict(section.get(name)) and "_component_" in section[name]:
        section, name = section[name], "_component_"
    if value == "None":
        value = "null"
    if name == "max_filename":  # whose leading zeros count
        section[name] = value
        return
    try:
        (section[name],) = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"])).values()  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r}: its value is no YAML: {_line(error)}") from error


def _remove(section: DictConfig, parts: list[str]) -> None:
    if parts[-1] not in section:
        raise _absent(section, parts)
    del section[parts[-1]]


def _absent(section: DictConfig, parts: list[str]) -> ConfigError:
    known = list(map(str, section))
    close = get_close_matches(parts[-1], known, n=1, cutoff=0.5)
    there = f"the nearest is {'.'.join([*parts[:-1], close[0]])}" if close else f"there are {', '.join(known)}"
    return ConfigError(f"override: Could not find key {'.'.join(parts)} to remove; {there}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
