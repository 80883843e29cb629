import math
from typing import Any

from humanline.errors import ConfigError

__all__ = ["check_count", "check_number"]


def check_count(key: str, value: Any) -> None:
    """Raises ConfigError unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"reward.{key}: expected an integer of at least 1, got {value!r}")


def check_number(key: str, value: Any, *, positive: bool = True) -> None:
    """Raises ConfigError unless ``value`` is a finite number, and above 0 if ``positive``."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (positive and value <= 0):
        raise ConfigError(f"reward.{key}: expected a number{' above 0' if positive else ''}, got {value!r}")
