import math
from typing import Any

from humanline.errors import ConfigError

__all__ = ["check_count", "check_number"]


def check_count(key: str, value: Any) -> None:
    """Refuses what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"reward.{key}: {value!r} is not a whole number of at least 1")


def check_number(key: str, value: Any, *, positive: bool = True) -> None:
    """Refuses what is no finite number, or no positive one."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (positive and value <= 0):
        raise ConfigError(f"reward.{key}: {value!r} is not a number{' above 0' if positive else ''}")
