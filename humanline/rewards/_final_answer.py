"""Finds the final answer in a response, and in a derivation in GSM8K's form, alike for all rewards."""

import re

__all__ = ["after_mark", "boxes_without_units", "conclusion", "is_number"]

_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_WORD = r"(?:[A-Za-z]{2,}|a(?=\s+[A-Za-z]{2}))"  # a single letter may be a variable
# A number and its unit: $18, 70,000 dollars a year. In 3 pi the word is a factor.
_WITH_UNIT = re.compile(rf"(-?\s*[$€£]?\s*-?)\s*({_NUMBER})(?:\s*[€£]|(?:\s+(?!pi\b){_WORD})+)?")
_BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}")


def conclusion(response: str) -> str:
    """Returns a response without its thought, ``<think>...</think>``, and without what comes before the thought.

    The prompt may open the thought, so ``</think>`` alone ends one. A thought that is not closed has no conclusion.
    """
    return response.rpartition("</think>")[2].partition("<think>")[0]


def after_mark(answer: str) -> str:
    """Returns the text after the last ``####`` of an answer in GSM8K's form; a number without its unit.

    An answer without ``####`` is returned as it is.
    """
    _, mark, final = answer.rpartition("####")
    return _without_unit(final) if mark else answer


def is_number(answer: str) -> bool:
    """Returns whether an answer is a plain number."""
    return re.fullmatch(rf"-?{_NUMBER}", answer.strip()) is not None


def boxes_without_units(response: str) -> str:
    """Returns a response with ``\\boxed{18}`` for ``\\boxed{18 dollars}``, and for other numbers with units."""
    return _BOX.sub(lambda box: rf"\boxed{{{_without_unit(box[1])}}}", response)


def _without_unit(text: str) -> str:
    """Returns the number of a text that is a number with a unit; another text without surrounding ``*``, and dot."""
    text = text.strip().strip("*").removesuffix(".").strip()
    found = _WITH_UNIT.fullmatch(text.replace("\\$", "$").replace("\N{MINUS SIGN}", "-"))
    return text if found is None else ("-" if "-" in found[1] else "") + found[2]
