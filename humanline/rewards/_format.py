"""Rewards for the form of open-r1: a thought and an answer, each between tags on lines of their own."""

import re
from collections.abc import Sequence

from humanline.rollout import Prompt

__all__ = ["FormatReward", "TagCountReward", "format_score", "tag_count_score"]

_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
_FORM = re.compile(r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL | re.MULTILINE)


class FormatReward:
    """Scores 1 for a response that begins with a thought, followed by an answer; else 0.

    Each tag must stand on a line of its own; text behind the line with ``</answer>`` is ignored.
    """

    highest_score = 1.0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[format_score(text) for text in texts] for texts in responses]


class TagCountReward:
    """Scores a quarter for each of the four tags that occurs exactly once on a line of its own."""

    highest_score = 1.0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[tag_count_score(text) for text in texts] for texts in responses]


def tag_count_score(text: str) -> float:
    return sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS)


def format_score(text: str) -> float:
    return float(_FORM.match(text) is not None)
