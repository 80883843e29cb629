"""Counts rounds without a training signal, and tells whether the policy has solved its prompts."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class EmptyRounds:
    """Counts rounds whose groups teach the objective nothing, such as rounds with all responses right, or all wrong.

    Attributes:
        highest_score (float | None): the highest score that the reward can return. None if unknown: then it is the
            highest score seen so far, if a lower one was seen too, or if it is above 0 and no other was seen.
        desirable_above (float | None): responses with a higher score are labelled desirable; None without labels.
        total (int): empty rounds of the whole run.
        in_a_row (int): consecutive empty rounds up to the last one.
        last (int): the number of the last round counted.
        seen (tuple[float, float]): the lowest and the highest score of all rounds.
        scores (tuple[float, float]): the lowest and the highest score of the last consecutive empty rounds.
    """

    highest_score: float | None = None
    desirable_above: float | None = None
    total: int = 0
    in_a_row: int = 0
    last: int = -1
    seen: tuple[float, float] = (math.inf, -math.inf)
    scores: tuple[float, float] = (math.inf, -math.inf)

    def note(self, round: int, scores: Sequence[float], empty: bool) -> None:
        """Counts a round, unless it is counted already: a run may resume within a round."""
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
        """Resets the consecutive count, so that a resumed run is allowed as many empty rounds as a new one."""
        self.in_a_row = 0

    def are_all_right(self, scores: Sequence[float]) -> bool:
        """Returns whether every score is the best possible one."""
        if not scores:
            return False
        low, high = min(scores), max(scores)
        if self.desirable_above is not None:
            return low > self.desirable_above
        if self.highest_score is not None:
            return low >= self.highest_score or math.isclose(low, self.highest_score)
        # The highest score is unknown: it has to exceed another score seen, or 0 if no other was seen.
        return low == high >= self.seen[1] and (self.seen[0] < low or low > 0)

    @property
    def is_solved(self) -> bool:
        """Whether every response of the last consecutive empty rounds is right."""
        return self.scores[0] <= self.scores[1] and self.are_all_right(self.scores)

    def why(self) -> str:
        """Returns a description of the last consecutive empty rounds, and the remedy."""
        low, high = self.scores
        if self.is_solved:
            known = self.highest_score is not None or self.desirable_above is not None or self.seen[0] < low
            of_what = "" if known else ", the only one seen; if the reward can return more, set its highest_score"
            return (
                f"all right: every response has the highest score ({high:g}{of_what}), so the policy has solved its "
                "prompts"
            )
        if low > high:
            found = "no responses: the engine returned none that has a token; see its log"
        elif low == high:
            found = f"all wrong: every response scored {low:g}"
        else:
            found = f"each prompt's responses are equally good, at scores from {low:g} to {high:g}"
        return (
            f"{found}; use easier prompts, more source.generations or a higher source.temperature (a resumed run may "
            "change them)"
        )

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("highest_score", "desirable_above")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, tuple(value) if isinstance(value, list) else value)


def _wider(range: tuple[float, float], scores: Sequence[float]) -> tuple[float, float]:
    return min([range[0], *scores]), max([range[1], *scores])
