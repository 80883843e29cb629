"""Rounds without signal: how many of them there were, and whether that is because the policy has nothing to learn."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class EmptyRounds:
    """Rounds whose groups teach the objective nothing, such as those whose responses are all right, or all wrong.

    Attributes:
        highest_score (float | None): the highest score that the reward can give; None where that is not known. Then it
            is the highest that the run has seen, if the run has seen a lower one too, or nothing else but it above 0.
        desirable_above (float | None): with labels, the score that only desirable responses exceed.
        total (int): empty rounds of the whole run.
        in_a_row (int): how many of them the last rounds were.
        last (int): the last round that was noted.
        seen (tuple[float, float]): the lowest and the highest score of all rounds.
        scores (tuple[float, float]): the lowest and the highest score of the last empty rounds in a row.
    """

    highest_score: float | None = None
    desirable_above: float | None = None
    total: int = 0
    in_a_row: int = 0
    last: int = -1
    seen: tuple[float, float] = (math.inf, -math.inf)
    scores: tuple[float, float] = (math.inf, -math.inf)

    def note(self, round: int, scores: Sequence[float], empty: bool) -> None:
        """Counts a round, unless a run that resumes within it has counted it before."""
        if round <= self.last:
            return
        self.last = round
        self.seen = _wider(self.seen, scores)
        self.total += empty
        self.in_a_row = self.in_a_row + 1 if empty else 0
        if self.in_a_row < 2:
            self.scores = (math.inf, -math.inf)
        if empty:
            self.scores = _wider(self.scores, scores)

    def begin_again(self) -> None:
        """Lets a run that resumes have as many in a row as one that starts."""
        self.in_a_row = 0

    def are_all_right(self, scores: Sequence[float]) -> bool:
        """Whether each of some scores is the best there is."""
        if not scores:
            return False
        low, high = min(scores), max(scores)
        if self.desirable_above is not None:
            return low > self.desirable_above
        if self.highest_score is not None:
            return low >= self.highest_score or math.isclose(low, self.highest_score)
        # Nobody knows the highest: it is what beats all else that was seen, or without anything else what is above 0.
        return low == high >= self.seen[1] and (self.seen[0] < low or low > 0)

    @property
    def is_solved(self) -> bool:
        """Whether every response of the last empty rounds is right."""
        return self.scores[0] <= self.scores[1] and self.are_all_right(self.scores)

    def why(self) -> str:
        """What the last empty rounds have in common, and what would change it."""
        low, high = self.scores
        if self.is_solved:
            known = self.highest_score is not None or self.desirable_above is not None or self.seen[0] < low
            of_what = "" if known else ", the only one seen; a reward that can give more has to say so by highest_score"
            return (
                f"all right: every response has the highest score ({high:g}{of_what}), so the policy has solved its "
                "prompts"
            )
        if low > high:
            found = "no response at all: the engine gave none that has a token; see its log"
        elif low == high:
            found = f"all wrong: every response scored {low:g}"
        else:
            found = f"each prompt's responses are worth the same, at scores from {low:g} to {high:g}"
        return (
            f"{found}; give easier prompts, more source.generations or a higher source.temperature, which a run that "
            "resumes may change"
        )

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("highest_score", "desirable_above")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, tuple(value) if isinstance(value, list) else value)


def _wider(range: tuple[float, float], scores: Sequence[float]) -> tuple[float, float]:
    return min([range[0], *scores]), max([range[1], *scores])
