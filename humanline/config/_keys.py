"""Checks of the top-level keys of a config, for recipes that do not train (whose keys are those of ``Settings``)."""

from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig

from humanline.config._component import suggestion
from humanline.errors import ConfigError


def check_keys(cfg: DictConfig, required: Iterable[str], optional: Iterable[str]) -> None:
    """Refuses a config with a key that is in neither list, or without one that is required.

    Raises:
        ConfigError: naming the key.
    """
    required = tuple(required)
    known = dict.fromkeys((*required, *optional))
    for key in map(str, cfg):
        if key not in known:
            raise ConfigError(
                f"{key}: is not a key of this recipe{suggestion(key, known)}; its keys are {', '.join(known)}"
            )
    for key in required:
        if cfg.get(key) is None:
            raise ConfigError(f"{key}: is missing; add it to the config, or {key}=... to the command line")


def one_of(cfg: DictConfig, key: str, choices: Mapping[str, Any], default: str) -> Any:
    """What a key's value stands for.

    Raises:
        ConfigError: if the value is none of the choices.
    """
    value = cfg.get(key, default)
    if value not in choices:
        raise ConfigError(f"{key}: {value!r} is not supported; choose {' or '.join(sorted(choices))}")
    return choices[value]
