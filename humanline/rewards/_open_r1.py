"""The weighted sum of rewards in open-r1's maths recipe."""

from collections.abc import Sequence

from humanline.rewards._format import format_score, tag_count_score
from humanline.rewards._maths import MathReward
from humanline.rewards._settings import check_number
from humanline.rollout import Prompt

__all__ = ["OpenR1Reward"]


class OpenR1Reward:
    """A weighted sum of :class:`MathReward`, :class:`FormatReward` and :class:`TagCountReward`.

    Args:
        accuracy (float): weight of the right answer (:class:`MathReward`).
        format (float): weight of the complete form, ``<think>...</think> <answer>...</answer>``.
        tag_count (float): weight of the form's four tags; each tag counts a quarter.
        answer_field (str): field of the prompt file with the answer, as for :class:`MathReward`.
        timeout (float): most seconds for the check of an answer.
        workers (int): number of worker processes that check answers.

    Raises:
        ConfigError: if a value is invalid, or math-verify is not installed.
    """

    def __init__(
        self,
        accuracy: float = 8.0,
        format: float = 1.0,
        tag_count: float = 1.0,
        answer_field: str = "answer",
        timeout: float = 5.0,
        workers: int = 2,
    ) -> None:
        for key, weight in (("accuracy", accuracy), ("format", format), ("tag_count", tag_count)):
            check_number(key, weight, positive=False)
        self._accuracy, self._format, self._tag_count = accuracy, format, tag_count
        self.highest_score = sum(max(0.0, weight) for weight in (accuracy, format, tag_count))
        self._is_right = MathReward(answer_field, timeout, workers)

    def stop(self) -> None:
        """Ends scoring for good; see :meth:`MathReward.stop`."""
        self._is_right.stop()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        """
        Raises:
            DataError: if a prompt has no answer, or more than half of the answers cannot be verified; the message names
                the first line.
        """
        return [
            [
                self._accuracy * right + self._format * format_score(text) + self._tag_count * tag_count_score(text)
                for right, text in zip(rights, texts, strict=True)
            ]
            for rights, texts in zip(self._is_right(prompts, responses), responses, strict=True)
        ]
