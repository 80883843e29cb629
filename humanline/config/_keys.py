"""Checks the top-level keys of configs for recipes that do not train. ``Settings`` checks those of training recipes."""

from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig

from humanline.config._component import suggestion
from humanline.errors import ConfigError


def check_keys(cfg: DictConfig, required: Iterable[str], optional: Iterable[str]) -> None:
    """Checks that a config has every required key and no unknown key.

    Raises:
        ConfigError: if a required key is missing or a key is unknown. The message names the key.
    """
    required = tuple(required)
    known = dict.fromkeys((*required, *optional))
    for key in map(str, cfg):
        if key not in known:
            raise ConfigError(
                f"{key}: not a key of this recipe{suggestion(key, known)} (expected one of {', '.join(known)})"
            )
    for key in required:
        if cfg.get(key) is None:
            raise ConfigError(f"{key}: missing; add it to the config, or add {key}=... to the command line")


def one_of(cfg: DictConfig, key: str, choices: Mapping[str, Any], default: str) -> Any:
    """Returns the choice that a key's value selects.

    Raises:
        ConfigError: if the value is not one of the choices.
    """
    value = cfg.get(key, default)
    if value not in choices:
        raise ConfigError(f"{key}: expected {' or '.join(sorted(choices))}, got {value!r}")
    return choices[value]
