"""A reward for maths answers, checked by math-verify in worker processes."""

import importlib.util
import json
import logging
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from queue import SimpleQueue
from reprlib import repr as short_repr

from humanline.errors import ConfigError, DataError
from humanline.rewards._final_answer import after_mark, box, conclusion, is_number, plain, without_commas, without_unit
from humanline.rewards._prompts import known_answer, regroup
from humanline.rewards._settings import check_count, check_number
from humanline.rollout import Prompt, Stopped

__all__ = ["MathReward"]

log = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("_maths_worker.py")
_SENTENCE = re.compile(r"(?:[A-Za-z]{2,}[,;]?\s+){3}[A-Za-z]{2,}")
_PARTS = re.compile(r"[,;]|\\pm|\\boxed|\b(?:and|or)\b")


class MathReward:
    """Scores 1 if math-verify finds a response's final answer equal to the prompt's, else 0.

    The final answer is the last ``\\boxed{}`` after the thought (``<think>...</think>`` or the like, if there is one),
    or else the last formula or number there. A thought or a box that is not closed has no answer. Boxes joined by a
    comma, *and* or *or* are one answer of several parts; if the prompt's answer has several, so are all boxes.
    Fractions equal decimals, units are ignored, and a percentage equals both its number and its hundredth.

    A prompt's answer that is a sentence, or that math-verify cannot read, equals only the same text. A warning counts
    such answers; if more than half are, it is an error.

    Expressions that a model writes can need unlimited time and memory. So each check runs in a worker process with
    limits on both. A response whose check exceeds a limit scores 0; a warning counts such responses.

    Args:
        answer_field (str): field of the prompt file with the answer, LaTeX or plain. A derivation may come before it,
            as in GSM8K (the answer follows the last ``####``) or with the answer in ``\\boxed{}``.
        timeout (float): most seconds for a check.
        workers (int): number of worker processes.

    Raises:
        ConfigError: if a value is invalid, or math-verify is not installed.
    """

    highest_score = 1.0

    def __init__(self, answer_field: str = "answer", timeout: float = 5.0, workers: int = 2) -> None:
        check_number("timeout", timeout)
        check_count("workers", workers)
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "reward: math-verify, which checks answers, is missing; pip install -c constraints.txt -e '.[math]'"
            )
        self._answer_field = answer_field
        self._timeout = timeout
        self._workers = workers
        self._stopped = False
        self._checked: set[str] = set()
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker(timeout))

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        """
        Raises:
            DataError: if a prompt has no answer, or more than half of the answers cannot be verified; the message names
                the first line.
        """
        answers = [self._answer(prompt) for prompt in prompts]
        self._check_answers(prompts, answers)
        pairs = [(answer, text) for answer, texts in zip(answers, responses, strict=True) for text in texts]
        verdicts = self._verdicts([(answer, _final_part(text, answer)) for answer, text in pairs])
        unfinished = verdicts.count(None)
        if unfinished:
            log.warning(
                f"MathReward: {unfinished:,} of {len(verdicts):,} responses could not be checked within "
                f"{self._timeout} s and score 0"
            )
        return regroup(map(float, map(bool, verdicts)), responses)

    def stop(self) -> None:
        """Ends checking for good; a call in progress raises :class:`~humanline.rollout.Stopped` at its next check."""
        self._stopped = True

    def _answer(self, prompt: Prompt) -> str:
        known = plain(known_answer(prompt, self._answer_field))
        answer = after_mark(known)
        if not answer:
            place = " after ####" if "####" in known else f", only {short_repr(known)}"
            raise DataError(f"{prompt.where}: field '{self._answer_field}' has no answer{place}; correct it")
        return answer

    def _check_answers(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> None:
        """Checks answers against themselves, once each, since hardly a response can equal one that fails."""
        new = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer not in self._checked]
        formulas = list(dict.fromkeys(answer for _, answer in new if not is_number(answer)))
        verdicts = self._verdicts([(formula, None) for formula in formulas])
        readable = dict(zip(formulas, verdicts, strict=True))
        bad = [prompt for prompt, answer in new if not readable.get(answer, True) or _SENTENCE.search(answer)]
        if bad:
            text = short_repr(bad[0].fields[self._answer_field])
            problem = (
                f"{bad[0].where}: field '{self._answer_field}' is {text}, which cannot be verified as maths, so only "
                f"the same text scores 1 ({len(bad):,} of {len(new):,} answers are such); correct it, or set "
                "reward.answer_field to the field with the final answer"
            )
            if len(bad) > len(new) / 2:
                raise DataError(problem)
            log.warning(f"MathReward: {problem}")
        self._checked.update(answers)

    def _verdicts(self, checks: list[tuple[str, str | None]]) -> list[bool | None]:
        with ThreadPool(self._workers) as threads:  # its threads end with the process, even if checks remain
            return list(threads.imap(self._check, checks))

    def _check(self, check: tuple[str, str | None]) -> bool | None:
        if self._stopped:
            raise Stopped("scoring was stopped")
        worker = self._idle.get()
        try:
            return worker.check(*check)
        finally:
            self._idle.put(worker)


def _final_part(response: str, answer: str) -> str:
    """Returns the part of a response that is compared with an answer, as LaTeX if it is a box."""
    text = plain(conclusion(response))
    content = box(text)
    if is_number(answer):
        return without_commas(text if content is None else rf"\boxed{{{without_unit(content)}}}")
    return rf"\boxed{{{content}}}" if content == "" or (content and not _PARTS.search(answer)) else text


class _Worker:
    """A process that checks one answer at a time; it starts with its first check and ends with this object."""

    _end: "weakref.finalize[..., _Worker]"

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None

    def check(self, answer: str, response: str | None) -> bool | None:
        """Returns whether the response has the answer; None if the check ended its process.

        Without a response it returns whether the answer can be verified at all.

        If the process died by anything but its alarm, such as a signal to the whole run, the check is repeated once.
        """
        for _ in range(2):
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                print(json.dumps([answer, response]), file=self._process.stdin, flush=True)
                verdict = self._process.stdout.readline()
            except BrokenPipeError:
                verdict = ""
            if verdict:
                return json.loads(verdict)
            self._end()
            if self._process.returncode == -signal.SIGALRM:
                break
        return None

    def _start(self) -> subprocess.Popen[str]:
        if self._process is not None:
            self._end()
        command = [sys.executable, str(_WORKER), str(self._timeout)]
        pipe = subprocess.PIPE
        # In a new session, since signals to the run's process group must not reach it.
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        self._end = weakref.finalize(self, _end, process)
        assert process.stdout is not None
        if not process.stdout.readline():
            self._end()
            raise ConfigError(
                "reward: math-verify, which checks answers, cannot be imported; run "
                f"`{sys.executable} -c 'import math_verify'` to see why"
            )
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
