"""Rounds of sampled groups, and their files in the format of ``humanline.data.encoded_groups``."""

import json
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from humanline.data import Group, Record
from humanline.errors import DataError


@dataclass
class Round:
    """Groups that the policy sampled after ``policy_step`` optimizer steps.

    Attributes:
        groups (list[Group]): scored groups; in an empty round the last responses, for inspection.
        policy_step (int): optimizer steps that the sampling policy had taken.
        temperature (float | None): the temperature of sampling; None if the file does not say.
        logps_temperature (float | None): the temperature of the groups' ``logps``; None if it is not known.
        empty (bool): whether the objective can learn from none of the groups.
        metrics (dict[str, float]): the round's values for the log.
    """

    groups: list[Group]
    policy_step: int
    temperature: float | None = None
    logps_temperature: float | None = None
    empty: bool = False
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> list[float]:
        return scores_of(self.groups)

    def score_range(self) -> str:
        """Returns the range of the scores, for the log."""
        if not self.scores:
            return "no responses"
        low, high = min(self.scores), max(self.scores)
        count = len(self.scores)
        return f"all {count} scored {low:g}" if low == high else f"{count} scored {low:g} to {high:g}"


def scores_of(groups: Sequence[Group]) -> list[float]:
    return [score for group in groups for score in group.scores or ()]


def write_round(file: Path, found: Round, dates: Mapping[str, str]) -> None:
    """Writes a round. The file gets its final name once it is complete and synced to disk.

    Args:
        file (Path): the file.
        found (Round): the round.
        dates (Mapping[str, str]): the days that chat templates read, by config key; they are in the first line.

    Raises:
        OSError: if it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name("round.partial")
    of_line = {"policy_step": found.policy_step} | ({"empty": True} if found.empty else {})
    # A resumed run logs the same values, except for the time, which is not reproducible.
    of_round: dict[str, Any] = of_line | {"metrics": {k: v for k, v in found.metrics.items() if k != "rounds/seconds"}}
    of_round |= {"temperature": found.temperature, "logps_temperature": found.logps_temperature}
    if dates:
        of_round["dates"] = dict(dates)
    with open(partial, "w") as lines:
        for index, group in enumerate(found.groups):
            line = {"prompt": list(group.prompt), "responses": list(map(list, group.responses)), "scores": group.scores}
            line |= {"logps": [each and [round(logp, 6) for logp in each] for each in group.logps or ()]}
            line |= {"id": group.id} | (of_round if index == 0 else of_line)
            lines.write(json.dumps(line) + "\n")
        if not found.groups:
            lines.write(json.dumps(of_round) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    partial.rename(file)


def policy_step(file: Path) -> int:
    """Reads the policy step of a round from the first line of its file."""
    try:
        with open(file) as lines:
            step: int = json.loads(next(lines, ""))["policy_step"]
            return step
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(file, repr(error)) from None


def dates_of_rounds(output_dir: str) -> dict[str, str]:
    """Returns the days that chat templates read in the rounds of a run's folder, by config key.

    There is none without rounds, or if a round cannot be read; training on it then says why.
    """
    for file in sorted((Path(output_dir) / "rounds").glob("round_*.jsonl")):
        try:
            with open(file) as lines:
                return dict(json.loads(next(lines))["dates"])
        except (OSError, LookupError, TypeError, ValueError, StopIteration):
            continue
    return {}


def read_round(file: Path, tokenizer: Any) -> Round:
    """Reads a round that :func:`write_round` wrote.

    Raises:
        DataError: if it is not a valid round file.
    """
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        size = getattr(tokenizer, "vocab_size", None)
        groups = []
        for number, row in enumerate(rows, start=1):
            if "prompt" in row:
                record = Record(f"line {number}", row, {})
                prompt, responses = record.ids("prompt", size), record.id_lists("responses", size)
                scores = record.scores("scores", len(responses))
                logps = tuple(each and array("f", each) for each in row["logps"]) if row.get("logps") else None
                groups.append(Group(prompt, responses, scores, id=row["id"], logps=logps))
        first = rows[0]
        metrics = first.get("metrics", {})
        metrics = metrics and metrics | {"rounds/seconds": 0.0}
        temperatures = first.get("temperature"), first.get("logps_temperature")
        return Round(groups, first["policy_step"], *temperatures, empty=first.get("empty", False), metrics=metrics)
    except DataError as error:
        raise _unreadable(file, str(error)) from None
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(file, repr(error)) from None


def _unreadable(file: Path, reason: str) -> DataError:
    return DataError(f"{file}: expected a round file ({reason}); delete it to sample the round again")
