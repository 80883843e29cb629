"""Counts the rows of a source that cannot be used, by reason."""

from collections.abc import Iterator

from humanline.data._files import Row
from humanline.data._group import Group, TokenBudget
from humanline.data._record import BadRow, Record
from humanline.errors import ConfigError, DataError

__all__ = ["Tally"]

MOST_BAD = 0.1
"""Share of bad rows above which the format is wrong, and not the rows."""
FEW, MOST_OF_FEW = 10, 0.5
"""Of fewer rows, one is more than a tenth and says nothing about the format; then this share counts."""


MOST_NAMED = 12
"""Columns that a note lists."""


class Tally:
    """The rows of a source: how many there are, which are left out, and what of the others is cut.

    Args:
        name (str): the source, for messages.
        split (str): its split, for messages.

    Attributes:
        schema (str | None): the public schema that the source has.
        unread (list[str]): the columns that the schema does not read.
    """

    def __init__(self, name: str, split: str = "train") -> None:
        self.name, self.split = name, split
        self.schema: str | None = None
        self._rows = self._cut_prompts = self._cut_responses = self._equal = 0
        self._reasons: dict[str, tuple[BadRow, int]] = {}  # the first row of each, and how many there are
        self._remarks: dict[str, tuple[str, int]] = {}
        self.unread: list[str] = []

    @property
    def dropped(self) -> int:
        """Number of rows that are left out."""
        return self._equal + sum(count for _, count in self._reasons.values())

    def counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yields the rows."""
        for row in rows:
            self._rows += 1
            yield row

    def fitted(self, found: Group | BadRow, budget: TokenBudget) -> Group | None:
        """Returns a group within the budget; None if it, or its row, is left out."""
        if isinstance(found, BadRow):
            self.add(found)
            return None
        try:
            group = budget.fit(found)
        except DataError as error:  # its prompt leaves no room
            self.add(BadRow.of(error))
            return None
        if group is not found:
            self._cut_prompts += len(group.prompt) < len(found.prompt)
            pairs = zip(group.responses, found.responses, strict=True)
            self._cut_responses += sum(len(cut) < len(whole) for cut, whole in pairs)
        # Responses may differ only past the cut, or in white space that the chat template strips.
        if group.is_pair and group.responses[0] == group.responses[1]:
            self._equal += 1
            return None
        return group

    def add(self, error: BadRow) -> None:
        """Counts a row that is left out."""
        first, count = self._reasons.get(error.reason, (error, 0))
        self._reasons[error.reason] = first, count + 1

    def remark(self, record: Record) -> None:
        """Counts what is said of a row that is used."""
        for what in dict.fromkeys(record.remarks):
            first, count = self._remarks.get(what, (record.where, 0))
            self._remarks[what] = first, count + 1

    def check(self, on_bad_row: str) -> None:
        """
        Raises:
            DataError: if more than a tenth of the rows cannot be used (of fewer than ten, more than half), or any with
                ``on_bad_row`` "stop".
            ConfigError: if it is so because the chat template leaves out a part of most of them.
        """
        faults = [(first, count) for first, count in self._reasons.values() if first.is_fault]
        bad = sum(count for _, count in faults)
        most = MOST_BAD if self._rows >= FEW else MOST_OF_FEW
        if bad <= (most * self._rows if on_bad_row == "drop" else 0):
            return
        reasons = "; ".join(f"{first}" + (f" [{count:,} rows]" if count > 1 else "") for first, count in faults)
        most_common, _ = max(faults, key=lambda fault: fault[1])
        if isinstance(cause := most_common.__cause__, ConfigError):
            also = f": {reasons}" if len(faults) > 1 else ""
            raise ConfigError(
                f"{cause} (first seen in {most_common.where}); {bad:,} of {self._rows:,} rows cannot be used{also}"
            ) from cause
        share = "a tenth" if self._rows >= FEW else "half"
        rule = "on_bad_row: stop" if on_bad_row == "stop" else f"more than {share}, so check schema and column_map"
        read_as = f", read as {self.schema}" if self.schema else ""
        raise DataError(f"{reasons} ({bad:,} of {self._rows:,} rows cannot be used{read_as}: {rule})")

    def check_any(self, groups: int) -> None:
        """
        Raises:
            DataError: if there are no groups.
        """
        if groups == 0 and self._equal:
            raise DataError(f"{self.name}: all {self._equal:,} pairs are equal once encoded and cut; raise max_tokens")
        if groups == 0:
            if self._reasons:  # ties alone
                raise DataError(f"{self.name}: no examples are left of {self._rows:,} rows; {'; '.join(self.notes())}")
            raise DataError(f"{self.name}: no examples in split '{self.split}'; check the file and the split")

    def cuts(self, budget: TokenBudget) -> list[str]:
        """Returns phrases for the report about what the budget has cut."""
        cut = (
            f"{self._cut_prompts:,} prompts and {self._cut_responses:,} responses truncated "
            f"(max_tokens {budget.max_tokens}, max_prompt_tokens {budget.max_prompt_tokens})"
        )
        return [cut, f"{self._equal:,} pairs dropped (equal once encoded and cut)"] if self._equal else [cut]

    def notes(self) -> list[str]:
        """Returns phrases for the report about the schema, and about rows that are left out."""
        notes = [f"schema {self.schema}"] if self.schema else []
        if self.unread:
            more = f" and {len(self.unread) - MOST_NAMED} more" if len(self.unread) > MOST_NAMED else ""
            notes.append(f"columns not read: {', '.join(self.unread[:MOST_NAMED])}{more}")
        notes += [f"{what} ({count:,}, the first: {first})" for what, (first, count) in self._remarks.items()]
        reasons = ", ".join(
            f"{reason} ({count:,}, the first: {first.where})" for reason, (first, count) in self._reasons.items()
        )
        bad = self.dropped - self._equal
        return [*notes, f"{bad:,} row{'s' * (bad > 1)} dropped: {reasons}"] if reasons else notes
