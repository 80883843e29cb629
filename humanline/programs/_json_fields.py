"""Columns of any source as values that JSON can hold, so that a program's output keeps them."""

import base64
import datetime
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from torchtune import utils

from humanline.errors import DataError
from humanline.rollout import Prompt

__all__ = ["warn_of_replaced", "with_json_fields"]

log = utils.get_logger("INFO")


class _NoJSON(Exception):
    """JSON has no form for a value; the argument is its type's name."""


def with_json_fields(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Returns the prompts with their fields as JSON values.

    Timestamps, dates and times become ISO 8601 text, and durations ISO 8601 seconds, such as "PT1.5S". Decimals become
    text with their exact digits, bytes become base64 text. NaN and NaT become null, and infinity becomes the text
    "Infinity". numpy's values become Python's.

    Raises:
        DataError: if a field has another type, such as an image; the message names line and field.
    """
    return [replace(prompt, fields=_json_fields(prompt)) for prompt in prompts]


def warn_of_replaced(key: str, prompts: Sequence[Prompt], written: Sequence[str]) -> None:
    """Warns if the source has columns with names of fields that the program writes.

    Args:
        key (str): the config's key of the source.
        prompts (Sequence[Prompt]): the source's prompts.
        written (Sequence[str]): the names.
    """
    found = [name for name in written if any(name in prompt.fields for prompt in prompts)]
    if found:
        log.warning(
            f"{key}: the output does not keep the file's {', '.join(found)}: it has other responses or scores under "
            "these names; rename the columns to keep them"
        )


def _json_fields(prompt: Prompt) -> dict[str, Any]:
    fields = {}
    for name, value in prompt.fields.items():
        try:
            fields[name] = _json(value)
        except _NoJSON as kind:
            raise DataError(
                f"{prompt.where}: field '{name}' has a value of type {kind}, for which JSON has no form; store it as "
                "text, or remove the column"
            ) from None
        except RecursionError:
            raise DataError(f"{prompt.where}: field '{name}' is nested too deeply; remove the column") from None
    return fields


def _json(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return None if math.isnan(value) else float(value)
    if isinstance(value, Mapping):
        return {name if isinstance(name, str) else str(_json(name)): _json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, Decimal):
        return None if value.is_nan() else str(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):  # a datetime is a date
        return _time(value)
    return _numpy(value)


def _time(value: Any) -> str | None:
    if value != value:  # NaT
        return None
    if isinstance(value, datetime.timedelta):
        microseconds = value // datetime.timedelta(microseconds=1)
        return _seconds(microseconds * 1000 + getattr(value, "nanoseconds", 0))  # pandas' durations have them
    return str(value.isoformat())


def _seconds(nanoseconds: int) -> str:
    return f"PT{Decimal(nanoseconds).scaleb(-9).normalize():f}S"


def _numpy(value: Any) -> Any:
    """Returns the JSON form of an array or a scalar of numpy."""
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if kind is None:
        raise _NoJSON(type(value).__name__)
    if value.ndim > 0:
        return [_json(each) for each in value]
    if kind in "mM" and value != value:  # NaT
        return None
    if kind == "M":
        return str(value)
    if kind == "m":
        return _seconds(int(value.astype("timedelta64[ns]").astype("int64")))
    plain = value.item()
    if hasattr(plain, "dtype"):  # a long double
        raise _NoJSON(type(value).__name__)
    return _json(plain)
