"""GSM8K: answers that are a single number, compared exactly."""

import re
from collections.abc import Sequence
from decimal import Decimal

from humanline.errors import DataError
from humanline.rewards._final_answer import after_mark, box, conclusion, is_multiplied, plain, without_unit
from humanline.rewards._prompts import known_answer
from humanline.rollout import Prompt

__all__ = ["GSM8KReward"]

# A minus sign after a letter, digit or parenthesis is a subtraction, not a sign: 16-3 ends with 3.
_NUMBER = re.compile(r"((?<![\w)])-\$?|\$-)?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
# In Markdown #### also starts a heading. No number in a heading counts, nor the heading's own, as in #### 2. Money.
_MARKED = re.compile(rf"####[ \t$€£*]*{_NUMBER.pattern}(?!\.?[0-9]|,[0-9]|[.)][ \t]+\S)")


class GSM8KReward:
    """Scores 1 if a response's number equals the answer's, else 0.

    Currency signs, thousands separators, trailing zeros and trailing dots make no difference. Percent signs and other
    units are ignored.

    The answer is the number after ``####`` in the prompt's ``answer_field``, or else the only number in its box, or in
    all of it. A response's number comes from the text after its thought (``<think>...</think>`` or the like, if there
    is one; a thought that is not closed has no number), by the first of these rules that applies:

    1. ``####`` with a number directly after it (``$`` and ``*`` may come between), not in a heading: the last one;
    2. ``\\boxed{}``: the only number in the last box; a box with several, such as a fraction, has none, nor has a box
       that is not closed; boxes joined by a comma, *and* or *or* count as one;
    3. neither: the last number.

    Args:
        answer_field (str): field of the prompt file with the answer.
    """

    highest_score = 1.0

    def __init__(self, answer_field: str = "answer") -> None:
        self._answer_field = answer_field

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        """
        Raises:
            DataError: if a prompt's answer is not a number; the message names its line.
        """
        answers = [self._answer(prompt) for prompt in prompts]
        return [
            [float(_response_number(text) == answer) for text in texts]
            for answer, texts in zip(answers, responses, strict=True)
        ]

    def _answer(self, prompt: Prompt) -> Decimal:
        text = known_answer(prompt, self._answer_field)
        marked = _numbers(text, _MARKED)
        number = marked[-1] if marked else _only_number(after_mark(plain(text)))
        if number is None or is_multiplied(after_mark(text)):  # 2 million is not 2
            raise DataError(
                f"{prompt.where}: field '{self._answer_field}' has no number after #### and is not a single number; "
                "correct it, or use humanline.rewards.MathReward"
            )
        return number


def _response_number(text: str) -> Decimal | None:
    text = conclusion(text)
    if marked := _numbers(text, _MARKED):
        return marked[-1]
    boxed = box(plain(text))
    if boxed is not None:
        return _only_number(without_unit(boxed))
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _only_number(text: str) -> Decimal | None:
    numbers = _numbers(text)
    return numbers[0] if len(numbers) == 1 else None


def _numbers(text: str, form: re.Pattern[str] = _NUMBER) -> list[Decimal]:
    text = plain(text).replace("\\$", "$").replace("{,}", ",").replace("\\!", "")
    signed = (("-" if sign else "") + digits.replace(",", "") for sign, digits in form.findall(text))
    return [Decimal(number) for number in signed]
