"""``column_map``: which column of a source holds which field."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from humanline.data._examples import PROMPT_FIELDS
from humanline.data._files import Row
from humanline.data._record import SYSTEM, BadRow
from humanline.errors import ConfigError

__all__ = ["MappedColumns", "check_column_map", "check_prompt_fields"]

_OF_A_PROMPT = (*PROMPT_FIELDS, *SYSTEM, "input", "tools")
"""Fields that are read of a prompt."""


def check_column_map(column_map: Any) -> None:
    """
    Raises:
        ConfigError: if ``column_map`` does not map fields to names of columns.
    """
    if column_map is None:
        return
    if not isinstance(column_map, Mapping):
        raise ConfigError(
            f"column_map: expected a mapping from fields to columns, such as {{prompt: question}}, or null, got "
            f"{column_map!r}"
        )
    for field, column in column_map.items():
        if not isinstance(column, str | None):
            raise ConfigError(f"column_map: expected a column's name or null for '{field}', got {column!r}")


def check_prompt_fields(column_map: Mapping[str, str | None]) -> None:
    """
    Raises:
        ConfigError: if a field seems to be a misspelt one. Any other can be one that a reward reads.
    """
    for field in column_map:
        near = get_close_matches(str(field), _OF_A_PROMPT, n=1, cutoff=0.85)
        if near and field not in _OF_A_PROMPT:
            raise ConfigError(f"column_map: no field is named '{field}'; did you mean '{near[0]}'?")


class MappedColumns:
    """Looks for the columns that ``column_map`` names in the rows of a source.

    Args:
        column_map (Mapping[str, str | None]): maps a field to its column.
    """

    def __init__(self, column_map: Mapping[str, str | None]) -> None:
        self._missing = {column for column in column_map.values() if column is not None}
        self._found: dict[str, None] = {}  # in the order of the source

    def looked_for(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yields the rows."""
        for where, row in rows if self._missing else ():
            if not isinstance(row, BadRow):
                self._found.update(dict.fromkeys(row))
                self._missing.difference_update(row)
            yield where, row
            if not self._missing:
                break
        yield from rows

    def check(self, source: str) -> None:
        """
        Raises:
            ConfigError: if no row had a column that ``column_map`` names.
        """
        for column in sorted(self._missing) if self._found else ():  # without any sound row, that is the fault
            near = get_close_matches(column, self._found, n=1)
            raise ConfigError(
                f"column_map: column '{column}' is in no row of {source}; it has the columns "
                f"{', '.join(self._found)}; " + (f"did you mean '{near[0]}'?" if near else "correct the name")
            )
