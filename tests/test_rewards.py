"""Rewards: answers that are right and wrong, forms, a real classifier against calling it by hand, a real server."""

import itertools
import json
import logging
import math
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import CASES, ROOT, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_http_engine import SECONDS, Heard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from humanline.errors import ConfigError, DataError, TrainingError
from humanline.rewards import (
    FormatReward,
    GSM8KReward,
    JudgeReward,
    MathReward,
    OpenR1Reward,
    SequenceClassifierReward,
    TagCountReward,
    read_samples,
)
from humanline.rollout import Prompt, Stopped

pytestmark = pytest.mark.slow


def prompt(answer=None, text="What is it?", **fields):
    return Prompt("prompts.jsonl line 3", [{"role": "user", "content": text}], {"answer": answer, **fields})


@pytest.mark.parametrize("answer", ["2 million", "3 dozen eggs", "#### 2 thousand dollars"])
def test_a_number_with_a_multiplier_is_not_the_number_before_it(answer):
    assert score(MathReward(), answer, "2") == score(MathReward(), answer, "3") == 0
    with pytest.raises(DataError, match="is not a single number"):
        GSM8KReward()([prompt(answer)], [["2"]])


def score(reward, answer, response):
    [[value]] = reward([prompt(answer)], [[response]])
    return value


# ---- GSM8K

# What follows #### in an answer is the answer, in a box and in a sentence.
UNITS = ("$18.50", "\\$18", "€18", "25%", "25\\%", "18 dollars", "$70,000 a year", "**18**", "6.")
GSM8K_ANSWERS = [
    (f"9 * 2 = <<9*2=18>>18, or 3 times 6.\n#### {answer}", response.replace("ANSWER", answer))
    for answer in ("18", "70,000", "-5", *UNITS)
    for response in (
        r"\boxed{ANSWER}",
        "The answer is ANSWER.",
        r"<think>\boxed{3}</think> <answer>\boxed{ANSWER}</answer>",
    )
]
RIGHT_NUMBERS = [
    ("18", "#### 1. Eggs\n16-7=9\n#### Answer\n18"),
    ("18", "#### 2. Money\n9*2 = \\boxed{18}"),
    ("18", "####\n\n2 eggs cost 4, so \\boxed{18}"),
    ("1.5", "#### 1.5\nThat is 9 eggs."),
    ("2 + 2 = <<2+2=4>>4\n#### 4", "So it is 4."),
    ("18", "She makes $18.00 every day."),
    ("#### 1,234", "1234"),
    ("1234.50", r"It costs \boxed{\$1{,}234.5}, or 3 times 411.50"),
    ("-5", "The balance is -$5"),
    ("-5", "The balance is $-5."),
    ("-5", "x = \N{MINUS SIGN}5"),
    ("3", "16-13=3"),
    ("13", "He leaves 16-13"),
    (".5", "0.50"),
    (7, "7"),
    (2.5, "2.5"),
    ("70000", "#### 70,000 dollars after 2 years"),
    ("5", "#### 4\nNo, wait.\n#### 5"),
    ("18", "#### Step 2: money\nShe makes 9 * 2 dollars: \\boxed{18}"),
    ("18", "#### Step 2: money\n9 * 2 is 18"),
    ("18", "#### 18\n#### Check: 9 + 9"),
    ("18", "#### **$18**, for 2 days"),
    ("-18", "####-\\$18"),
    ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678901"),
    (Decimal("18.00"), "18"),
    *GSM8K_ANSWERS,
]
WRONG_NUMBERS = [
    ("4", "So it is 5."),
    ("4", "44"),
    ("4", "four"),
    ("4", ""),
    ("5", "-5"),
    ("1234", "1,234.01"),
    ("18", r"\boxed{\frac{1}{18}}"),
    ("18", r"\boxed{none} of the 18"),
    ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678902"),
]


@pytest.mark.parametrize(("answer", "response"), RIGHT_NUMBERS)
def test_gsm8k_the_right_number_scores_one(answer, response):
    assert score(GSM8KReward(), answer, response) == 1


@pytest.mark.parametrize(("answer", "response"), WRONG_NUMBERS)
def test_gsm8k_anything_else_scores_zero(answer, response):
    assert score(GSM8KReward(), answer, response) == 0


@pytest.mark.parametrize(
    ("response", "number"),
    [(r"1 #### 2 \boxed{3} 4", 2), (r"1 \boxed{3} 4", 3), (r"\boxed{1} \boxed{3} 4", 3), ("1 and 4 apples", 4)],
)
def test_gsm8k_the_mark_comes_before_the_box_and_the_box_before_the_last_number(response, number):
    scores = [score(GSM8KReward(), answer, response) for answer in range(1, 5)]
    assert scores == [answer == number for answer in range(1, 5)]


@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=2), st.sampled_from(["{}", "${}", "is {}.", "#### {}"])
)
def test_gsm8k_a_number_is_read_as_it_was_written_with_commas(number, form):
    written = f"{number:,.2f}"
    assert score(GSM8KReward(), str(f"{number:f}"), form.format(written)) == 1
    assert score(GSM8KReward(), f"{number + Decimal('0.01'):f}", form.format(written)) == 0


@given(st.text(alphabet="0123456789.,-$#{}\\boxed \N{MINUS SIGN}"))
def test_gsm8k_any_text_has_a_score(text):
    assert score(GSM8KReward(), "1", text) in (0, 1)


@pytest.mark.parametrize("reward", [GSM8KReward, MathReward, OpenR1Reward])
@pytest.mark.parametrize("answer", [None, "", " ", True, ["4"], math.nan, math.inf, Decimal("NaN")])
def test_a_prompt_without_an_answer_is_named_even_with_no_response(reward, answer):
    with pytest.raises(DataError, match="^prompts.jsonl line 3: field 'answer' is .*; it must hold .*answer_field"):
        reward()([prompt(answer)], [[]])


def test_gsm8k_an_answer_without_a_number_is_named():
    with pytest.raises(DataError, match="^prompts.jsonl line 3: field 'answer' has no number"):
        GSM8KReward()([prompt("x + y")], [[]])


def test_the_answer_may_stand_in_another_field():
    assert GSM8KReward(answer_field="solution")([prompt(solution="4")], [["4", "5"]]) == [[1, 0]]


# ---- Maths, through math-verify

RIGHT = [
    (r"\frac{1}{2}", "The answer is 0.5."),
    (r"\frac{1}{2}", r"so it is \boxed{\dfrac12}"),
    ("0.5", r"so it is $\frac{1}{2}$."),
    ("0.5", r"so it is \frac{1}{2}."),
    ("1/2", "I get 1/2"),
    (r"\frac{3}{2}", r"I get 1\frac{1}{2}."),
    (r"$\frac{3}{2}$", "1.5"),
    ("1234", "It costs $1,234.00."),
    ("$1,234.00", "1234"),
    ("10", "First I pay $5, and then $10"),
    ("50%", "50 %"),
    ("50%", r"It is $50\%$"),
    (r"50\%", r"\boxed{0.5}"),
    ("-3", "x = -3."),
    ("-3", "\\( x = \N{MINUS SIGN}3 \\)"),
    ("-5", "The balance is -$5"),
    ("3", "16-3"),
    (r"5 \text{ cm}", "It is 5 cm long"),
    ("5", r"\boxed{5\text{ cm}}"),
    ("90", r"$90^\circ$"),
    (r"3\sqrt{2}", r"$\sqrt{18}$"),
    ("x^2+2x+1", "It is $(x+1)^2$"),
    ("(1, 2)", r"\boxed{(1,2)}"),
    ("x=5", r"\boxed{5}"),
    (r"\text{Monday}", r"\boxed{Monday}"),
    ("1000", r"\[ 10^3 \]"),
    (5, "5"),
    (2.5, "5/2"),
    ("5", r"\boxed{5} is it. The proof goes by 3 cases, 1 and 2 and 3."),
    ("5", "<think>\\boxed{7}</think> <answer>5</answer>"),
    ("€5", r"\boxed{5}"),
    ("5", "It costs €5."),
    ("18", r"\boxed{18 dollars}"),
    ("70000", r"\boxed{\$70,000 dollars a year.}"),
    (Decimal("5.0"), "5"),
    *GSM8K_ANSWERS,
    (r"#### \frac{3}{4}", "0.75"),
    ("#### 2x+1", "It is $1+2x$"),
]
WRONG = [
    (r"\frac{1}{2}", "0.51"),
    ("1/2", "2"),
    ("3", "-3"),
    ("1234", "$1,235.00"),
    ("(1, 2)", r"\boxed{(2,1)}"),
    ("x^2+2x+1", "$(x+2)^2$"),
    (r"\text{Monday}", r"\boxed{Friday}"),
    ("5", ""),
    ("5", "I do not know."),
    ("5", r"\boxed{}"),
    ("5", r"\boxed{"),
    ("5", r"5 it is. \boxed{6}"),
    ("5", "<think>It is 5.</think>"),
    ("5", r"\boxed{4}. Or \boxed{5}."),
    ("5", "$$ \\frac{ $ } \\( {{{"),
    ("2 + 3 = <<2+3=5>>5\n#### 5", "2 + 3"),
    ("2 + 3 = <<2+3=5>>5\n#### 5", r"\boxed{3}"),
    ("#### 3 pi", r"\boxed{3}"),
    ("18", r"\boxed{18 x}"),
]


@pytest.fixture(scope="module")
def maths():
    return MathReward(timeout=20)  # far more than any of these takes, on a busy machine too


def test_maths_the_right_answer_scores_one(maths):
    scores = maths([prompt(answer) for answer, _ in RIGHT], [[response] for _, response in RIGHT])
    assert [case for case, [value] in zip(RIGHT, scores, strict=True) if value != 1] == []


def test_maths_anything_else_scores_zero(maths):
    scores = maths([prompt(answer) for answer, _ in WRONG], [[response] for _, response in WRONG])
    assert [case for case, [value] in zip(WRONG, scores, strict=True) if value != 0] == []


def test_maths_scores_stand_with_their_responses(maths):
    prompts = [prompt("1"), prompt("2"), prompt("3")]
    assert maths(prompts, [["1", "2", "1"], [], ["4", "3"]]) == [[1, 0, 1], [], [0, 1]]


@settings(max_examples=50)
@given(st.fractions(-99, 99, max_denominator=99))
def test_maths_a_fraction_equals_itself_in_any_writing_and_no_other(maths, number):
    n, d = number.numerator, number.denominator
    same = [f"{n}/{d}", rf"$\frac{{{n}}}{{{d}}}$", rf"\boxed{{\frac{{{2 * n}}}{{{2 * d}}}}}"]
    other = [f"{n + 1}/{d}", rf"$\frac{{{n + 1}}}{{{d}}}$"]
    assert maths([prompt(rf"\frac{{{n}}}{{{d}}}")], [same + other]) == [[1, 1, 1, 0, 0]]


@pytest.mark.parametrize("response", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10^9)!}"])
def test_maths_an_endless_answer_is_given_up_and_the_others_are_scored(response, caplog):
    reward = MathReward(timeout=2, workers=1)
    with caplog.at_level(logging.WARNING):
        assert reward([prompt("7")], [["7"]]) == [[1]]  # so that the worker that hangs is no new one
        assert reward([prompt("7")], [[response]]) == [[0]]
        assert "1 of 1 responses could not be checked within 2 s" in caplog.text
        caplog.clear()
        assert sum(reward([prompt("7")], [["7", "8"]])[0]) == 1
    assert not caplog.records


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_maths_a_signal_to_idle_workers_costs_no_right_answer(number, caplog):
    reward = MathReward(timeout=20, workers=1)
    assert reward([prompt("7")], [["7"]]) == [[1]]
    worker = reward._idle.get()
    reward._idle.put(worker)
    worker._process.send_signal(number)
    with caplog.at_level(logging.WARNING):
        assert reward([prompt("7")], [["7", "8", "7"]]) == [[1, 0, 1]]
    assert not caplog.records


def test_maths_what_a_response_says_is_not_run(maths, tmp_path):
    mark = tmp_path / "mark"
    attack = f"__import__('pathlib').Path('{mark}').touch()"
    forms = [attack, f"${attack}$", rf"\boxed{{{attack}}}", f"2 + {attack} = 4", rf"\boxed{{\text{{{attack}}}}}"]
    maths([prompt("4"), prompt(attack)], [forms, forms])
    assert not mark.exists()


def test_maths_no_text_reaches_python_s_evaluation():
    """In a process of its own, where `eval` is an error from the moment that the worker is ready."""
    script = """if True:
        import builtins, runpy, sys
        worker = runpy.run_path(sys.argv[1])
        def refuse(code, *rest):
            raise SystemExit(f"evaluated {code!r}")
        builtins.eval = refuse
        for text in ("1+2*3", "(1+2)/3", "$1+2.5*3$", "it is 2**3", "$x^2=4$", "$\\\\max(1, 2)$", "\\\\boxed{x+1}"):
            answer = worker["answer_expressions"](text)
            worker["verify"](answer, worker["expressions"](worker["final_answer"](text)), timeout_seconds=None)
    """
    worker = ROOT / "humanline" / "rewards" / "_maths_worker.py"
    run([sys.executable, "-c", script, str(worker)], cwd=ROOT)


UNREADABLE = ["}", r"\frac{1}{", "The ratio is five to one"]


@pytest.mark.parametrize("reward", [MathReward, OpenR1Reward])
@pytest.mark.parametrize("answer", UNREADABLE)
def test_maths_an_answer_that_cannot_be_verified_is_named_even_with_no_response(reward, answer):
    with pytest.raises(DataError, match="^prompts.jsonl line 3: field 'answer' is .* cannot be verified") as error:
        reward()([prompt(answer)], [[]])
    assert repr(answer) in str(error.value) and "1 of 1 answers" in str(error.value)
    assert "reward.answer_field" in str(error.value) and "\n" not in str(error.value)


def test_maths_a_few_answers_that_cannot_be_verified_are_counted_once_and_the_others_are_scored(caplog):
    reward = MathReward(timeout=20)
    prompts = [prompt(answer) for answer in (*range(30), *UNREADABLE, r"p \land q")]
    with caplog.at_level(logging.WARNING):
        reward(prompts, [[] for _ in prompts])
        assert "prompts.jsonl line 3: field 'answer' is '}'" in caplog.text and "4 of 34 answers" in caplog.text
        caplog.clear()
        assert reward(prompts[29:], [["29"], ["}"], ["0"], ["0"], [r"\boxed{p \land q}", "0"]]) == [
            [1],
            [0],
            [0],
            [0],
            [1, 0],
        ]
    assert not caplog.records


@pytest.mark.parametrize("answer", ["**", "Answer:", "<answer></answer>"])
def test_maths_an_answer_of_marks_alone_is_named(answer):
    with pytest.raises(DataError, match="^prompts.jsonl line 3: field 'answer' has no answer, only "):
        MathReward()([prompt(answer)], [[]])


@pytest.mark.parametrize("key", ["timeout", "workers"])
@pytest.mark.parametrize("value", [0, -1, "five", True, None])
def test_maths_a_setting_that_cannot_work_is_named(key, value):
    with pytest.raises(ConfigError, match=f"^reward.{key}: expected an? (number above 0|integer .*), got {value!r}$"):
        MathReward(**{key: value})


def test_maths_without_math_verify_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    with pytest.raises(ConfigError, match=r"pip install -c constraints.txt -e '.\[math\]'$"):
        MathReward()


# ---- What all rewards with a right answer agree on

ACCURACY = {
    "GSM8KReward": GSM8KReward,
    "MathReward": MathReward,
    "OpenR1Reward": lambda: OpenR1Reward(accuracy=1, format=0, tag_count=0),
}


THOUGHTS = ["think", "thinking", "thought", "reasoning"]
SEPARATORS = ["", ",", r"\,", "{,}"]


@pytest.fixture(scope="module", params=ACCURACY)
def accuracy(request):
    return ACCURACY[request.param]()


def test_a_derivation_in_gsm8k_s_form_is_scored_by_what_follows_the_mark(accuracy):
    prompts, responses = read_samples(str(CASES / "e09_gsm8k_math.jsonl"))
    assert accuracy(prompts, responses) == [[1, 0, 1]] * 4


@pytest.mark.parametrize(
    ("response", "number"),
    [
        (r"<think>\boxed{3}</think> \boxed{4}", 4),
        (r"<think>\boxed{3}</think> The answer is 4.", 4),
        ("<think>\n#### 3\n</think>\nThe answer is 4.", 4),
        (r"I think \boxed{3}.</think> It is 4.", 4),  # the prompt opened the thought
        (r"<think>\boxed{3}</think> Or: <think>\boxed{3}</think> 4", 4),
        (r"<think>\boxed{3}</think>", None),
        (r"<think>It is \boxed{3}. But", None),
        ("<think>\n#### 3\n", None),
        (r"<think>\boxed{3}</think> 4 <think> or \boxed{3}", 4),
        (r"3 <think>\boxed{3}</think>", None),
    ],
)
def test_a_thought_is_not_the_answer_whether_or_not_it_ends(accuracy, response, number):
    assert accuracy([prompt("3"), prompt("#### 4")], [[response]] * 2) == [[number == 3], [number == 4]]


# Ways to write the answer 18 into a prompt file.
WRITTEN = [
    "18 eggs",
    "18 dollars a year",
    "18 km/h",
    "18 m/s",
    "18 cm^2",
    r"18\text{ km/h}",
    r"18~\text{cm}",
    "18 sq. ft.",
    "18.",
    "+18",
    "**18**",
    "Answer: 18",
    "**Answer:** 18",
    "The answer is 18",
    "So, the final answer is **18**.",
    "18$",
    "$18$",
    "$18$ dollars",
    "$$18$$",
    r"\(18\)",
    r"\$18",
    "US$18",
    "USD 18",
    "= 18",
    "<answer>18</answer>",
    "<answer>\n18 eggs\n</answer>",
    r"so \boxed{18}",
    r"9 * 2 = \boxed{18\text{ eggs}}.",
    "9 * 2 = 18\n#### **18 eggs**",
]


@pytest.mark.parametrize("answer", WRITTEN)
def test_an_answer_is_read_however_it_is_written(accuracy, answer):
    right = ["18", "It is 18.0 in all.", r"\boxed{18}", r"\boxed{18\text{ eggs}}"]
    assert accuracy([prompt(answer)], [[*right, "19", r"\boxed{1.8}"]]) == [[1] * len(right) + [0, 0]]


@pytest.mark.parametrize("content", [answer for answer in WRITTEN if "boxed" not in answer and "#" not in answer])
def test_a_box_is_read_however_its_number_is_written(accuracy, content):
    assert accuracy([prompt("18"), prompt("8")], [[rf"\boxed{{{content}}}"]] * 2) == [[1], [0]]


SAME = [
    ("70000 dollars", "It costs $70,000.", 1),
    (r"10\,000", "10,000", 1),
    (r"10\,000", "10", 0),
    ("1000000", r"1\,000\,000", 1),
    ("1000000", r"\boxed{1\,000\,000}", 1),
    ("1234567.5", r"1{,}234{,}567.5", 1),
    ("11111", r"$11,\!111$", 1),
    ("0", r"1\,000\,000", 0),
    ("-1000", "The balance is -1,000.", 1),
    ("-1,000", "$-1,000$", 1),
    ("-1", "-1,000", 0),
    ("-18", "The answer is \N{MINUS SIGN}18", 1),
    ("-18", "#### \N{MINUS SIGN}18", 1),
    ("-18", "\\boxed{\N{MINUS SIGN}18}", 1),
    ("\N{MINUS SIGN}18", "-18", 1),
    ("18", "The answer is \N{MINUS SIGN}18", 0),
    ("18", r"\boxed{9} Step 2: \boxed{18}", 1),
    ("9", r"\boxed{9} Step 2: \boxed{18}", 0),
    ("18", "\\boxed{9}\n\\boxed{18}", 1),
    ("9", "\\boxed{9}\n\\boxed{18}", 0),
    ("18", r"First $\boxed{9}$, so it is $\boxed{18}$.", 1),
    ("18", r"\boxed{9} or \boxed{18}", 0),
    ("18", r"\boxed{18}, \boxed{9}", 0),
    ("18", r"\boxed{9}$ \text{ and } $\boxed{18}", 0),
    ("18", r"\boxed{18} and \boxed{18}", 1),
    ("18", r"\boxed{\text{18 dollars}}", 1),
    ("18", r"\boxed{\textbf{18}}", 1),
    ("12", r"\boxed{\text{Answer: }12}", 1),
    ("18", r"\boxed{\boxed{18}}", 1),
    ("18", r"\boxed 18", 1),
    ("18", r"\boxed 18, or 3 times 6", 1),
    ("1", r"\boxed 18", 0),
    ("18", r"\boxed{18", 0),
    ("18", r"\boxed{\text{18 dollars}", 0),
    ("9", r"\boxed{9} is half, so \boxed{18", 0),
    ("18", r"\boxed{", 0),
    ("18", r"18 \boxed{}", 0),
    ("18", r"\boxed{18} is it, or 3 times 6.", 1),
    *((answer, f"<{tag}>\\boxed{{6}}</{tag}> 5", answer == "5") for answer in "56" for tag in THOUGHTS),
    *(("6", f"<{tag}>It is \\boxed{{6}}. But", 0) for tag in THOUGHTS),
    *(("5", f"It is \\boxed{{6}}.</{tag}> 5", 1) for tag in THOUGHTS),
]


def test_all_rewards_agree_on_what_is_right(accuracy):
    scores = accuracy([prompt(answer) for answer, _, _ in SAME], [[response] for _, response, _ in SAME])
    assert [case for case, [value] in zip(SAME, scores, strict=True) if value != case[2]] == []


NUMBERS = ["{}", "{}.", "**{}**", "{} eggs", "{} km/h", "= {}", "The answer is {}.", "<answer>{}</answer>", "#### {}"]
RESPONSES = [*NUMBERS, r"\boxed{{{}}}", r"\boxed{{\text{{{} eggs}}}}", r"\boxed{{7}}, so \boxed{{{}}}"]


@settings(max_examples=30)
@given(st.integers(-(10**7), 10**7), st.sampled_from(NUMBERS), st.sampled_from(RESPONSES), st.sampled_from(SEPARATORS))
def test_a_number_equals_itself_and_no_other_in_any_writing_of_either(accuracy, number, answer, response, separator):
    written, other = (f"{n:,}".replace(",", separator).replace("-", "\N{MINUS SIGN}") for n in (number, number + 1))
    for known in (str(number), written):
        texts = [response.format(written), response.format(number), response.format(other)]
        assert accuracy([prompt(answer.format(known))], [texts]) == [[1, 1, 0]]


FORMULAS = [
    (r"\frac{1}{2}", r"\boxed{3}, so \boxed{0.5}", 1),
    (r"\frac{1}{2}", r"\boxed{0.5} Step 2: \boxed{3}", 0),
    (r"\frac{1}{2}", r"\boxed{0.5}. So \boxed{3", 0),
    (r"The answer is $\frac{1}{2}$.", "0.5", 1),
    (r"**Answer:** \(\frac{1}{2}\)", r"\boxed{0.5}", 1),
    (r"<answer>\frac{1}{2}</answer>", r"\boxed{0.5}", 1),
    ("= x + 1", r"\boxed{1 + x}", 1),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1),
    ("4, 5", "\\boxed{4}\n\\boxed{5}", 1),
    ("4, 5", r"$\boxed{4}$ and $\boxed{5}$", 1),
    ("4, 5", r"\boxed{5}", 0),
    (r"\pm 2", r"\boxed{2} or \boxed{-2}", 1),
    (r"(1,\,200)", r"\boxed{(1, 200)}", 1),
    (r"(1,\,200)", r"\boxed{1200}", 0),
    ("1200", r"\boxed{(1,200)}", 0),
    ("2 xy", r"\boxed{2}", 0),
    ("2 xy", r"\boxed{2yx}", 1),
    ("2 pi", r"\boxed{2}", 0),
    ("0.333...", r"\boxed{0.333}", 0),
]


def test_maths_a_formula_is_read_as_a_number_is(maths):
    scores = maths([prompt(answer) for answer, _, _ in FORMULAS], [[response] for _, response, _ in FORMULAS])
    assert [case for case, [value] in zip(FORMULAS, scores, strict=True) if value != case[2]] == []


@pytest.mark.parametrize("reward", [MathReward, OpenR1Reward])
def test_an_empty_answer_after_the_mark_is_named(reward):
    with pytest.raises(DataError, match="^prompts.jsonl line 3: field 'answer' has no answer after ####; correct it"):
        reward()([prompt("1 + 1 = 2\n####\n")], [[]])


# ---- The form

FORM = "<think>I think.</think> <answer>4</answer>"
LINES = "<think>\nI think.\n</think>\n<answer>\n4\n</answer>"


@pytest.mark.parametrize(
    ("response", "form", "tags"),
    [
        (LINES, 1, 1),
        (LINES + "\nDone.", 1, 1),
        (LINES + " Done.", 0, 1),
        ("Well. " + LINES, 0, 1),
        ("<think>\n\n</think>\n<answer>\n\n</answer>", 1, 1),
        ("<think>\nI\nthink.\n</think>\n\n<answer>\n4\n</answer>", 0, 1),
        ("<answer>\n4\n</answer>\n<think>\nI think.\n</think>\n", 0, 0.75),
        ("<think>\nI think.\n</think>\n<answer>\n4", 0, 0.75),
        (LINES + "\n" + LINES, 1, 0),
        (FORM, 0, 0),
        ("4", 0, 0),
        ("", 0, 0),
    ],
)
def test_form_and_tags(response, form, tags):
    assert score(FormatReward(), None, response) == form
    assert score(TagCountReward(), None, response) == tags


@given(st.lists(st.sampled_from(["<think>\n", "\n</think>\n", "<answer>\n", "\n</answer>", "\n", "a"])))
def test_tags_are_counted_on_lines_of_their_own(parts):
    response = "".join(parts)
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    assert score(TagCountReward(), None, response) == sum(response.count(tag) == 1 for tag in tags) / 4


def test_open_r1_s_reward_is_the_weighted_sum():
    responses = [LINES, LINES.replace("4", "5"), "4", "<think>\n4\n</think>\n4"]
    rewards = [
        reward([prompt("4")], [responses])[0]
        for reward in (MathReward(), FormatReward(), TagCountReward(), OpenR1Reward(), OpenR1Reward(3, 0.5, -2))
    ]
    right, form, tags, total, other = map(torch.tensor, rewards)
    assert torch.equal(total, 8 * right + form + tags) and total.tolist() == [10, 2, 8, 8.5]
    assert torch.equal(other, 3 * right + 0.5 * form - 2 * tags)


def test_open_r1_s_weights_are_numbers():
    with pytest.raises(ConfigError, match="^reward.format: expected a number, got 'much'"):
        OpenR1Reward(format="much")


# ---- A reward model

TEMPLATE = "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
CUSTOM = """
from dataclasses import dataclass
import torch
from transformers import LlamaForSequenceClassification
from transformers.utils import ModelOutput

@dataclass
class Output(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None

class Gated(LlamaForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None):
        rewards = super().forward(input_ids, attention_mask=attention_mask).logits
        return Output(rewards=rewards, score=rewards.square().sum(-1))
"""


def write_classifier(folder, *, labels=1, template=TEMPLATE, **changes):
    """A tiny Llama that classifies, with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    shape = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    settings = {"num_labels": labels, "pad_token_id": 258, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(**shape, **heads | settings | changes, initializer_range=0.5, tie_word_embeddings=False)
    )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Folders of classifiers by their number of outputs."""
    folder = tmp_path_factory.mktemp("classifiers")
    return {labels: write_classifier(folder / str(labels), labels=labels) for labels in (1, 3)}


def classifier(path, **changes):
    return SequenceClassifierReward(path, **{"device": "cpu", "dtype": "fp32", **changes})


def by_hand(path, chat):
    """The outputs for one chat."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    with torch.no_grad():
        return model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0].tolist()


CHATS = [
    ([{"role": "user", "content": "Name?"}], ["Bob", "I am called Robert by everyone.", ""]),
    ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}], ["Me"]),
    ([{"role": "user", "content": "Where?"}], []),
]
PROMPTS = [Prompt(f"prompts.jsonl line {i}", messages, {}) for i, (messages, _) in enumerate(CHATS, start=1)]
RESPONSES = [texts for _, texts in CHATS]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(("labels", "head"), [(1, None), (1, 0), (3, 0), (3, 2)])
def test_a_score_is_the_classifier_s_output_for_the_chat(classifiers, labels, head, batch_size):
    path = classifiers[labels]
    scores = classifier(path, head=head, batch_size=batch_size)(PROMPTS, RESPONSES)
    assert list(map(len, scores)) == [3, 1, 0]
    for (messages, texts), row in zip(CHATS, scores, strict=True):
        expected = [by_hand(path, [*messages, {"role": "assistant", "content": text}])[head or 0] for text in texts]
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({round(value, 4) for row in scores for value in row}) == 4


def test_a_classifier_without_a_padding_token_takes_chats_one_by_one(classifiers, tmp_path):
    path = write_classifier(tmp_path / "model", pad_token_id=None)
    expected = classifier(path, batch_size=1)(PROMPTS, RESPONSES)
    assert classifier(path, batch_size=8)(PROMPTS, RESPONSES) == expected


def test_of_a_long_chat_the_first_token_and_the_end_stay(classifiers, caplog):
    long, short = ([{"role": "user", "content": text}] for text in ("a" * 500, "b" * 400))
    reward = classifier(classifiers[1], max_tokens=20)
    with caplog.at_level(logging.WARNING):
        [[one], [other]] = reward([Prompt("", long, {}), Prompt("", short, {})], [["Same end."], ["Same end."]])
    assert one == other and "2 of 2 chats cut to 20 tokens" in caplog.text
    reward([Prompt("", long, {})], [["x" * 20]])


def test_chats_are_cut_to_the_model_s_positions(classifiers):
    [[value]] = classifier(classifiers[1])([Prompt("", [{"role": "user", "content": "a" * 500}], {})], [["b"]])
    [[same]] = classifier(classifiers[1], max_tokens=128)(
        [Prompt("", [{"role": "user", "content": "a" * 900}], {})], [["b"]]
    )
    assert value == same


def test_a_model_of_its_own_code_runs_only_where_it_is_trusted(tmp_path):
    path = write_classifier(tmp_path / "model", labels=3)
    (tmp_path / "model" / "gated.py").write_text(CUSTOM)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "gated.Gated"}
    expected = [by_hand(path, [*PROMPTS[0].messages, {"role": "assistant", "content": text}]) for text in RESPONSES[0]]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match="^reward.head: .* has 3 outputs"):
        classifier(path)  # the same weights in transformers' own class
    trusted = classifier(path, trust_remote_code=True)
    squares = [sum(value**2 for value in row) for row in expected]
    assert trusted(PROMPTS[:1], RESPONSES[:1])[0] == pytest.approx(squares, rel=1e-4)
    second = classifier(path, trust_remote_code=True, head=1)
    assert second(PROMPTS[:1], RESPONSES[:1])[0] == pytest.approx([row[1] for row in expected], rel=1e-4)


def test_a_template_that_refuses_a_prompt_names_its_line(tmp_path):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    reward = classifier(write_classifier(tmp_path / "model", template=refusing))
    for responses in (RESPONSES, [[] for _ in PROMPTS]):  # without responses it only checks the prompts
        with pytest.raises(
            DataError, match="^prompts.jsonl line 2: the reward model's chat template .*no system"
        ) as error:
            reward(PROMPTS, responses)
        assert str(error.value).endswith("; if it accepts no system message, set reward.system_message: false")


def test_a_reward_model_may_score_without_the_system_message(classifiers):
    messages = [{"role": "user", "content": "Who?"}]
    asked = [Prompt("prompts.jsonl line 1", [{"role": "system", "content": "Be kind."}, *messages], {})]
    plain = [Prompt("prompts.jsonl line 1", messages, {})]
    with_system, without = (classifier(classifiers[1], system_message=value) for value in (True, False))
    assert without(asked, [["Me"]]) == with_system(plain, [["Me"]]) != with_system(asked, [["Me"]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": 3}, "reward.head: expected an output of .*, 0 to 2, got 3"),
        ({"head": None}, "reward.head: .* has 3 outputs; set this key"),
        ({"head": -1}, "reward.head: expected the index of an output, 0 or more, or null, got -1"),
        ({"dtype": "fp16"}, "reward.dtype: expected bf16 or fp32, got 'fp16'"),
        ({"batch_size": 0}, "reward.batch_size: expected an integer of at least 1, got 0"),
        ({"system_message": "no"}, "reward.system_message: expected true or false, got 'no'"),
        ({"max_tokens": 129}, "reward.max_tokens: 129 exceeds the model's 128 positions"),
        ({"device": "abacus"}, "reward.path: .* cannot be loaded"),
        ({"trust_remote_code": "yes"}, "reward.trust_remote_code: expected true or false, got 'yes'"),
    ],
)
def test_a_classifier_s_setting_that_cannot_work_is_named(classifiers, changes, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        classifier(classifiers[3], **{"head": 0, **changes})
    assert "\n" not in str(error.value)


def test_a_folder_without_a_classifier_or_without_a_chat_template_is_refused(classifiers, tmp_path):
    with pytest.raises(ConfigError, match="^reward.path: folder '.*/none' not found"):
        classifier(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="^reward.path: .*/empty cannot be loaded as a sequence classifier"):
        classifier(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="^reward.path: .*chat template cannot be used"):
        classifier(write_classifier(tmp_path / "bare", template=None))


# ---- A judge


@contextmanager
def judge(answer, port=0, **settings):
    """A judge at a real server: ``answer(request, nth)`` gives the status and the content of what it replies."""
    counter, requests = itertools.count(), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            nth = next(counter)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            status, content = answer(body["messages"][0]["content"], nth)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield JudgeReward(f"http://127.0.0.1:{server.server_port}/v1", "judge-1", **settings), requests
        finally:
            server.shutdown()
            thread.join()


def says(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_a_judge_s_rating_is_divided_by_the_scale_and_stands_with_its_response():
    def by_length(question, _):
        response = question.split("<response>\n")[1].split("\n</response>")[0]
        return says(f"Rating: 3 would be harsh.\n\n**Rating:** {len(response)}")

    with judge(by_length) as (reward, _):
        assert reward(PROMPTS, RESPONSES) == [[0.3, 0.0, 0.0], [0.2], []]  # 31 is beyond the scale
    with judge(by_length, scale=100) as (reward, _):
        assert reward(PROMPTS, RESPONSES) == [[0.03, 0.31, 0.0], [0.02], []]


def test_a_judge_is_asked_by_the_template_for_the_model_with_the_key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    settings = {"template": "Q: {prompt} A: {response} {other}", "api_key_env": "JUDGE_KEY", "temperature": None}
    with judge(lambda *_: says("Rating: 10"), **settings) as (reward, requests):
        assert reward(PROMPTS[1:2], [["{prompt}"]]) == [[1]]
    [(path, key, body)] = requests
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    question = "Q: system: Be kind.\n\nuser: Who? A: {prompt} {other}"
    assert body == {"model": "judge-1", "messages": [{"role": "user", "content": question}]}


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judge(lambda *_: says("Rating: 10")) as (reward, requests):
        reward(PROMPTS[:1], [["a"]])
    assert requests[0][1] is None and requests[0][2]["temperature"] == 0


@pytest.mark.parametrize("reply", ["Fine.", "Rating: 11", "Rating: -1", None])
def test_a_reply_without_a_rating_scores_zero_and_is_counted(reply, caplog):
    with judge(lambda question, _: says(reply if "Bob" in question else "Rating: 5")) as (reward, _):
        with caplog.at_level(logging.WARNING):
            assert reward(PROMPTS[:1], [["Bob", "Eve"]]) == [[0, 0.5]]
    assert "1 of 2 responses got no rating" in caplog.text


@pytest.mark.parametrize("failure", [(503, {"error": "loading"}), (429, {}), (200, b"<html>")])
def test_a_server_that_does_not_answer_is_asked_again(failure):
    with judge(lambda _, nth: failure if nth == 0 else says("Rating: 5"), retries=1) as (reward, requests):
        assert reward(PROMPTS[:1], [["a"]]) == [[0.5]]
    assert len(requests) == 2


def test_a_judge_that_is_gone_is_waited_for():
    with judge(lambda *_: says("Rating: 5")) as (reward, _):
        pass
    port = int(reward._url.split(":")[2].removesuffix("/v1"))
    with Heard() as heard, ThreadPoolExecutor() as pool:
        scores = pool.submit(reward, PROMPTS, RESPONSES)
        assert heard.gone.wait(SECONDS)
        with judge(lambda *_: says("Rating: 5"), port=port):
            assert scores.result(SECONDS) == [[0.5] * 3, [0.5], []]
    assert ["is down" in line for line in heard.lines] == [True, False]


def test_the_wait_for_a_judge_ends_in_time_or_when_it_is_stopped():
    with judge(lambda *_: says("Rating: 5"), wait=0) as (reward, _):
        pass
    with pytest.raises(TrainingError, match="^http://127.0.0.1:.* has been down for 0 s; restart it"):
        reward(PROMPTS, RESPONSES)
    with judge(lambda *_: says("Rating: 5")) as (reward, _):
        pass
    with Heard() as heard, ThreadPoolExecutor() as pool:
        scores = pool.submit(reward, PROMPTS, RESPONSES)
        assert heard.gone.wait(SECONDS)
        reward.stop()
        assert isinstance(scores.exception(SECONDS), Stopped)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": "The model `judge-1` does not exist"}), "reward.model: .* has no model 'judge-1'.*not exist"),
        ((401, {"error": "bad key"}), r"reward.api_key_env: .* rejects the key in \$OPENAI_API_KEY"),
        ((400, {"error": "no\ntemperature"}), r"reward: .* rejects the request \(HTTP 400"),
        ((200, {"hello": "there"}), "reward.base_url: .* is not a chat API: expected .*, got {'hello': 'there'}"),
        ((500, {"error": "no memory"}), r"http://.* failed one request 1 times \(HTTP 500 .*no memory"),
    ],
)
def test_a_server_that_refuses_ends_it_with_one_line(answer, message):
    with judge(lambda *_: answer, retries=0, max_concurrency=2) as (reward, requests):
        with pytest.raises((ConfigError, TrainingError), match=f"^{message}") as error:
            reward(PROMPTS[:1], [["a"] * 500])
    assert "\n" not in str(error.value) and len(requests) < 500


def test_a_server_that_is_not_there_is_named_before_anything_is_sampled():
    with judge(lambda *_: says("Rating: 5")) as (reward, _):
        reward(PROMPTS, [[] for _ in PROMPTS])
    with pytest.raises(ConfigError, match="^reward.base_url: http://127.0.0.1:.*refused.*start the server"):
        reward(PROMPTS, [[] for _ in PROMPTS])


def test_requests_under_way_do_not_keep_the_process():
    script = """if True:
        import sys, threading
        from humanline.rewards import JudgeReward
        from humanline.rollout import Prompt
        reward = JudgeReward(sys.argv[1], "judge-1", max_concurrency=2)
        prompts = [Prompt("", [{"role": "user", "content": "?"}], {})]
        threading.Thread(target=reward, args=(prompts, [["a"] * 20]), daemon=True).start()
        sys.stdin.read()
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(SECONDS)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        process = subprocess.Popen([sys.executable, "-c", script, url], cwd=ROOT, stdin=subprocess.PIPE)
        try:
            asked = [silent.accept()[0] for _ in range(2)]
            process.communicate(timeout=SECONDS // 2)  # its stdin closes; a request may take a minute
        finally:
            process.kill()
        for connection in asked:
            connection.close()
    assert process.returncode == 0


def test_no_more_requests_than_allowed_are_under_way_and_as_many_are():
    under_way, most, lock, barrier = 0, 0, threading.Lock(), threading.Barrier(3, timeout=60)

    def answer(*_):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        barrier.wait()  # three at a time, or the test fails
        with lock:
            under_way -= 1
        return says("Rating: 5")

    with judge(answer, max_concurrency=3) as (reward, _):
        assert reward(PROMPTS[:1], [["a"] * 12]) == [[0.5] * 12]
    assert most == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base_url": "file:///etc/passwd"},
            "reward.base_url: expected an address such as .*, got 'file:///etc/passwd'",
        ),
        ({"template": "{prompt}"}, "reward.template: must contain {prompt} and {response}"),
        ({"pattern": "("}, "reward.pattern: '\\(' is not a regular expression"),
        ({"pattern": "Rating"}, "reward.pattern: expected one group, the rating, got 0 groups in 'Rating'"),
        ({"scale": 0}, "reward.scale: expected a number above 0, got 0"),
        ({"timeout": 0}, "reward.timeout: expected a number above 0, got 0"),
        ({"retries": -1}, "reward.retries: expected an integer of at least 0, got -1"),
        ({"max_concurrency": 0}, "reward.max_concurrency: expected an integer of at least 1, got 0"),
        ({"wait": -1}, "reward.wait: expected seconds of at least 0, or null for no limit, got -1"),
    ],
)
def test_a_judge_s_setting_that_cannot_work_is_named(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        JudgeReward(**{"base_url": "http://localhost:8000/v1", "model": "m"} | changes)
