from omegaconf import DictConfig, OmegaConf

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


def whole_numbers(cfg: DictConfig, key: str, default: list[int]) -> list[int]:
    """Returns the list of whole numbers of a top-level key; ``default`` if the key is absent.

    Raises:
        ConfigError: if the value is not a list of at least one whole number, each at least 1.
    """
    value = cfg.get(key, default)
    counts = list(value) if OmegaConf.is_list(value) or isinstance(value, list) else []
    if not counts or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in counts):
        raise ConfigError(f"{key}: expected a list of whole numbers of at least 1, such as [1, 4, 8], got {value!r}")
    return counts
