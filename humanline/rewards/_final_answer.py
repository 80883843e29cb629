"""Finds the final answer in a response, and in a prompt's answer, alike for all rewards."""

import re

__all__ = ["after_mark", "box", "conclusion", "is_multiplied", "is_number", "plain", "without_commas", "without_unit"]

_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_THOUGHT = r"(?:think|thinking|thought|reasoning)"
# Thousands in LaTeX: 1\,000, 1{,}000 and 1,\!000, but not the pair 1,\,000.
_THOUSANDS = re.compile(r"(?<![0-9])[0-9]{1,3}(?:(?:\\[,:;!]|\{,\}|,\\!)\s*[0-9]{3})+(?![0-9])")
_WITH_COMMAS = re.compile(r"(?<![0-9,.(\[])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")  # in brackets it may be a pair
_UNBRACED_BOX = re.compile(rf"\\boxed\s*\$?(-?{_NUMBER})(?!\s*[/^*+]|[.,]?[0-9])")
# A single letter may be a variable, and a word of neighbouring letters a product: 3 xy. pi and million are factors.
_FACTOR = r"pi|sqrt|hundred|thousand|(?:m|b|tr)illion|dozen"
_NO_UNIT = rf"(?!(?:a?b?c?d?|m?n?|p?q?r?|u?v?w?|x?y?z?|(?:{_FACTOR})s?)(?![A-Za-z]))"
_WORD = rf"(?:a(?=\s+[A-Za-z]{{2}})|m(?=/s)|{_NO_UNIT}[A-Za-z]{{2,}})(?:/[A-Za-z]+)*(?:\^?[23]|[²³])?\.?"
# A number and its unit: $18, 70,000 dollars a year, USD 18, 18 km/h.
_WITH_UNIT = re.compile(
    rf"(-?\s*(?:(?:USD?|EUR|GBP|INR)\s*)?[$€£]?\s*-?)\s*({_NUMBER})(?:\s*[$€£])?(?:\s+{_WORD})*", re.IGNORECASE
)
# What may surround an answer: "The answer is", "=", tags, Markdown's stars, a full stop, but not the dots of 0.3...
_BEFORE = re.compile(
    r"^(?:\s|\*|=|<answer>|(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:(?:final|correct)\s+)?"
    r"answer(?:\s+is\b|(?:\*\*)?\s*:|\s*=)(?:\s*:)?)+",
    re.IGNORECASE,
)
_AFTER_BACKWARDS = re.compile(r"^(?:\s|\*(?!\^)|\.(?!\.|thgir\\)|>rewsna/<)+")  # from the end, in linear time
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}")
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def conclusion(response: str) -> str:
    """Returns a response without its thought, ``<think>...</think>``, and without what comes before the thought.

    The tags may also be ``<thinking>``, ``<thought>`` or ``<reasoning>``. The prompt may open the thought, so
    ``</think>`` alone ends one. A thought that is not closed has no conclusion.
    """
    return re.split(rf"<{_THOUGHT}>", re.split(rf"</{_THOUGHT}>", response)[-1], maxsplit=1)[0]


def plain(text: str) -> str:
    """Returns a text with ``-`` for the Unicode minus, 1000 for ``1\\,000``, and ``\\boxed{18}`` for ``\\boxed 18``."""
    text = text.replace("\N{MINUS SIGN}", "-")
    text = _THOUSANDS.sub(lambda number: re.sub(r"[^0-9]", "", number[0]), text)
    return _UNBRACED_BOX.sub(r"\\boxed{\1}", text)


def without_commas(text: str) -> str:
    """Returns a text with 1000 for 1,000; math-verify reads -1,000 as a set."""
    return _WITH_COMMAS.sub(lambda number: number[0].replace(",", ""), text)


def after_mark(answer: str) -> str:
    """Returns the final answer in a prompt's answer, which may be a derivation, without its unit.

    It is the text after the last ``####``, if there is one, and the content of a single box.
    """
    final = answer.rpartition("####")[2]
    return without_unit(box(final) or final if final.count(r"\boxed") == 1 else final)


def is_number(answer: str) -> bool:
    """Returns whether an answer is a plain number."""
    return re.fullmatch(rf"-?{_NUMBER}", answer.strip()) is not None


def is_multiplied(answer: str) -> bool:
    """Returns whether a word such as *million* follows a number."""
    return re.search(rf"[0-9]\s*(?:{_FACTOR})s?\b", answer, re.IGNORECASE) is not None


def box(text: str) -> str | None:
    """Returns the content of the last ``\\boxed{}``, empty if it is not closed; None without a box.

    Boxes with only a comma, *and* or *or* between them are one answer of several parts, separated by commas.
    """
    boxes: list[re.Match[str]] = []
    opened: list[int] = []
    ends: dict[int, int] = {}  # of the braces' contents, by their beginnings
    for brace in _BRACE.finditer(text):
        if brace[0] == "}" and opened:
            ends[opened.pop()] = brace.start()
        elif brace[0].endswith("{") and brace[0] != r"\{":
            opened.append(brace.end())
            boxes += [brace] * (brace[0] != "{")
    parts: list[str] = []
    end = 0
    for start in boxes:
        between = re.sub(r"\\text|[^\w,]", "", text[end : start.start()]).lower()
        end = ends.get(start.end(), start.end())
        content = text[start.end() : end]
        parts = [*parts, content] if parts and between in (",", "and", "or", ",and", ",or") else [content]
    return ", ".join(dict.fromkeys(parts)) if parts else None


def without_unit(text: str) -> str:
    """Returns the number of a text that is a number with a unit; another text without surrounding words and marks."""
    text = _trimmed(text)
    words = re.sub(r"\\[,;:! ]|~", " ", re.sub(r"\\[()\[\]]", "", _TEXT.sub(r" \1 ", text)))
    found = _WITH_UNIT.fullmatch(_trimmed(words.replace("\\$", "$").removeprefix("$$")).removesuffix("$$").strip())
    return text if found is None else ("-" if "-" in found[1] else "") + found[2].replace(",", "")


def _trimmed(text: str) -> str:
    return _AFTER_BACKWARDS.sub("", _BEFORE.sub("", text)[::-1])[::-1]
