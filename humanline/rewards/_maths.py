"""A reward for maths answers, checked by math-verify in worker processes."""

import importlib.util
import json
import logging
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from queue import SimpleQueue

from humanline.errors import ConfigError, DataError
from humanline.rewards._final_answer import after_mark, boxes_without_units, conclusion, is_number
from humanline.rewards._prompts import known_answer, regroup
from humanline.rewards._settings import check_count, check_number
from humanline.rollout import Prompt, Stopped

__all__ = ["MathReward"]

log = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("_maths_worker.py")


class MathReward:
    """Scores 1 if math-verify finds a response's final answer equal to the prompt's, else 0.

    The final answer is the last ``\\boxed{}`` after the thought (``<think>...</think>``, if there is one), or else the
    last formula or number there. A thought that is not closed has no answer. math-verify reads adjacent boxes as one
    answer of several parts. Fractions equal decimals, units are ignored, and a percentage equals both its number and
    its hundredth.

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
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker(timeout))

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[float]]:
        """
        Raises:
            DataError: if a prompt has no answer; the message names its line.
        """
        answers = [self._answer(prompt) for prompt in prompts]
        checks = [
            (answer, boxes_without_units(conclusion(text)) if is_number(answer) else conclusion(text))
            for answer, texts in zip(answers, responses, strict=True)
            for text in texts
        ]
        with ThreadPool(self._workers) as threads:  # its threads end with the process, even if checks remain
            verdicts = list(threads.imap(self._check, checks))
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
        answer = after_mark(known_answer(prompt, self._answer_field))
        if not answer:
            raise DataError(f"{prompt.where}: field '{self._answer_field}' has no answer after ####; correct it")
        return answer

    def _check(self, check: tuple[str, str]) -> bool | None:
        if self._stopped:
            raise Stopped("scoring was stopped")
        worker = self._idle.get()
        try:
            return worker.check(*check)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that checks one answer at a time; it starts with its first check and ends with this object."""

    _end: "weakref.finalize[..., _Worker]"

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[str] | None = None

    def check(self, answer: str, response: str) -> bool | None:
        """Returns whether the response has the answer; None if the check ended its process.

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
