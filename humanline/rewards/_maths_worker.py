"""Checks answers with math-verify: reads lines of ``[answer, response]``, writes ``true`` or ``false``.

For ``[answer, null]`` it writes whether the answer can be verified, that is, read as maths and found equal to itself.

A separate program, started by `_maths.py`. If a check takes too long, the kernel's alarm ends this process.
math-verify's own timeouts raise an exception in a signal handler, which runs only between Python instructions, and
sympy can spend hours in a single power. The alarm needs neither Python nor a living parent.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from functools import lru_cache

import sympy.physics.units  # noqa: F401 - simplify would import it later, and its import evaluates its own text
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Float, Integer, Number
from sympy.parsing import sympy_parser

MEMORY = 4 << 30  # bytes of address space

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# Dollar formulas follow pandoc's rule, or every second price would end one.
FORMULA_OR_NUMBER = re.compile(
    r"(?:\$\$.+?\$\$|\$(?!\s)[^$\n]+?(?<!\s)\$(?!\d)|\$\s[^$\n]+\s\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\])\s?(?:\\?%)?"
    r"|(?P<bare>-?\d*\\[dt]?frac\{[^{}]*\}\{[^{}]*\}"
    rf"|(?:(?<![\w)])-(?:\\?[$€£])?|\\?[$€£]-?)?(?:{NUMBER})(?:\s?[/^]\s?(?:{NUMBER}))?(?:\s?\\?%)?)",
    re.DOTALL,
)

NUMBER_CODE = re.compile(r"Integer \((\d+) \)|Float \('([\d.]+)' \)")


def read_number(code: str, *_: object) -> Number:
    """Replaces sympy's evaluation of Python code, to which math-verify passes each number of a formula as text."""
    match = NUMBER_CODE.fullmatch(code.strip())
    if match is None:
        raise ValueError("not a number")
    return Float(match[2]) if match[1] is None else Integer(match[1])


sympy_parser.eval_expr = read_number


def main(timeout: float) -> None:
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output printed by libraries is not read as a verdict
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or MEMORY < most:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, most))
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent gets them too, and this process ends with it
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin:
        answer, response = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        expected = answer_expressions(answer)
        if response is None:  # math-verify also compares the text, which proves nothing here
            expected = found = [each for each in expected if not isinstance(each, str)]
        else:
            found = expressions(final_answer(response))
        correct = verify(expected, found, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(correct), file=verdicts, flush=True)


def final_answer(response: str) -> str:
    """Returns the part of a response without its thought that math-verify should check, as LaTeX."""
    if re.search(r"\\boxed\s*\{", response):
        return response
    found = list(FORMULA_OR_NUMBER.finditer(response))
    if not found:
        return ""
    last = found[-1]
    return last[0] if last["bare"] is None else boxed(last["bare"])


@lru_cache(maxsize=1)  # the responses to a prompt are checked one after the other
def answer_expressions(answer: str) -> list:
    return expressions(answer if r"\boxed" in answer else boxed(answer.strip().removeprefix("$").removesuffix("$")))


def expressions(text: str) -> list:
    # LaTeX only, because it is parsed by a grammar: sympy would evaluate plain expressions as Python.
    latex = LatexExtractionConfig(boxed_match_priority=0)
    text = text.replace("€", "").replace("£", "")  # $ is a sign that math-verify knows
    return parse(text, [latex], extraction_mode="first_match", parsing_timeout=None)


def boxed(latex: str) -> str:
    return rf"\boxed{{{latex}}}"


if __name__ == "__main__":
    main(float(sys.argv[1]))
