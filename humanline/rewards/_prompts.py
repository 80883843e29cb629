"""What several rewards do with prompts and responses before and after they score."""

from collections.abc import Iterable, Sequence
from reprlib import repr as short_repr

from humanline.errors import DataError
from humanline.rollout import Prompt

__all__ = ["known_answer", "pairs", "regroup"]


def known_answer(prompt: Prompt, field: str) -> str:
    """The answer that the prompt's file gives, as text.

    Raises:
        DataError: if the field is absent, empty, or neither text nor a number.
    """
    value = prompt.fields.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        problem = "is absent" if value is None else f"is {short_repr(value)}"
        raise DataError(
            f"{prompt.where}: field '{field}' {problem}; give the right answer there, as text or a number, or name its "
            "field in reward.answer_field"
        )
    return str(value)


def pairs(prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[tuple[Prompt, str]]:
    """Every response beside its prompt."""
    return [(prompt, text) for prompt, texts in zip(prompts, responses, strict=True) for text in texts]


def regroup(scores: Iterable[float], responses: Sequence[Sequence[str]]) -> list[list[float]]:
    """The scores of :func:`pairs`, prompt by prompt again."""
    flat = iter(scores)
    return [[next(flat) for _ in texts] for texts in responses]
