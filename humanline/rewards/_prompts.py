"""Handling of prompts and responses that several rewards share."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from reprlib import repr as short_repr

from humanline.errors import DataError
from humanline.rollout import Prompt

__all__ = ["known_answer", "pairs", "regroup"]


def known_answer(prompt: Prompt, field: str) -> str:
    """Returns the answer in the prompt's line, as text.

    Raises:
        DataError: if the field is missing, empty, or neither text nor a finite number.
    """
    value = prompt.fields.get(field)
    is_answer = isinstance(value, str | int | float | Decimal) and not isinstance(value, bool) and str(value).strip()
    if not is_answer or (isinstance(value, float | Decimal) and not Decimal(value).is_finite()):  # pandas' null is NaN
        problem = "is missing" if value is None else f"is {short_repr(value)}"
        raise DataError(
            f"{prompt.where}: field '{field}' {problem}; it must hold the right answer as text or a number, or set "
            "reward.answer_field to the field that does"
        )
    return str(value)


def pairs(prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[tuple[Prompt, str]]:
    """Returns every response with its prompt."""
    return [(prompt, text) for prompt, texts in zip(prompts, responses, strict=True) for text in texts]


def regroup(scores: Iterable[float], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """Groups the scores of :func:`pairs` by prompt again."""
    flat = iter(scores)
    return [[next(flat) for _ in texts] for texts in responses]
