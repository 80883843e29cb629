"""The day that a chat template reads as today."""

from datetime import date, datetime, time
from typing import Any

from humanline.errors import ConfigError

__all__ = ["read_day"]


def read_day(key: str, value: Any) -> datetime:
    """Returns the start of the day that a setting names.

    Args:
        key (str): the setting's key, for the message.
        value (Any): a date as text, such as "2026-01-31", or as YAML reads it; None is today.

    Raises:
        ConfigError: if it is not a date.
    """
    if value is None:
        return datetime.combine(datetime.now().date(), time())
    try:
        day = date.fromisoformat(value) if isinstance(value, str) else date(value.year, value.month, value.day)
    except (ValueError, AttributeError):
        raise ConfigError(f"{key}: expected a day such as 2026-01-31, or null, got {value!r}") from None
    return datetime.combine(day, time())
