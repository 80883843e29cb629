"""Rewards for the form ``<think>...</think> <answer>...</answer>``, as in open-r1: all of it, or each tag."""

import re
from collections.abc import Sequence

from humanline.rollout import Prompt

__all__ = ["FormatReward", "TagCountReward", "format_score", "tag_count_score"]

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


class FormatReward:
    """Scores 1 for a response that is a thought followed by an answer, with each tag exactly once; else 0."""

    highest_score = 1.0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[format_score(text) for text in texts] for texts in responses]


class TagCountReward:
    """Scores a quarter for each of the four tags that occurs exactly once."""

    highest_score = 1.0

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        return [[tag_count_score(text) for text in texts] for texts in responses]


def tag_count_score(text: str) -> float:
    return sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS)


def format_score(text: str) -> float:
    return float(tag_count_score(text) == 1 and _FORM.fullmatch(text) is not None)
