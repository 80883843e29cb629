"""Counts the rows of a source that cannot be used, by reason."""

from collections.abc import Iterator

from humanline.data._files import Row
from humanline.data._record import BadRow
from humanline.errors import DataError

__all__ = ["Tally"]

MOST_BAD = 0.1
"""Share of bad rows above which the format is wrong, and not the rows."""


class Tally:
    """The rows of a source, and those that are left out.

    Args:
        name (str): the source, for messages.

    Attributes:
        schema (str | None): the public schema that the source has.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.schema: str | None = None
        self._rows = 0
        self._reasons: dict[str, tuple[BadRow, int]] = {}  # the first row of each, and how many there are

    @property
    def dropped(self) -> int:
        """Number of rows that are left out."""
        return sum(count for _, count in self._reasons.values())

    def counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yields the rows."""
        for row in rows:
            self._rows += 1
            yield row

    def add(self, error: BadRow) -> None:
        """Counts a row that is left out."""
        first, count = self._reasons.get(error.reason, (error, 0))
        self._reasons[error.reason] = first, count + 1

    def check(self, on_bad_row: str) -> None:
        """
        Raises:
            DataError: if more than a tenth of the rows cannot be used, or any with ``on_bad_row`` "stop".
        """
        faults = [(first, count) for first, count in self._reasons.values() if first.is_fault]
        bad = sum(count for _, count in faults)
        if bad <= (MOST_BAD * self._rows if on_bad_row == "drop" else 0):
            return
        reasons = "; ".join(f"{first}" + (f" [{count:,} rows]" if count > 1 else "") for first, count in faults)
        rule = "on_bad_row: stop" if on_bad_row == "stop" else "more than a tenth, so check schema and column_map"
        read_as = f", read as {self.schema}" if self.schema else ""
        raise DataError(f"{reasons} ({bad:,} of {self._rows:,} rows cannot be used{read_as}: {rule})")

    def notes(self) -> list[str]:
        """Returns phrases for the dataset's report."""
        notes = [f"schema {self.schema}"] if self.schema else []
        reasons = ", ".join(
            f"{reason} ({count:,}, the first: {first.where})" for reason, (first, count) in self._reasons.items()
        )
        return [*notes, f"{self.dropped:,} rows dropped: {reasons}"] if reasons else notes
