from omegaconf import DictConfig

from humanline.errors import ConfigError


def whole_number(cfg: DictConfig, key: str, default: int, least: int) -> int:
    """Returns the whole number of a top-level key; ``default`` if the key is absent.

    Raises:
        ConfigError: if the value is not a whole number of at least ``least``.
    """
    value = cfg.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key}: expected a whole number of at least {least}, got {value!r}")
    return value
