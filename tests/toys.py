"""A tokenizer, and rewards, for the golden models, whose 256 tokens mean nothing; and parts of a run that break."""

import builtins
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim import AdamW
from torchtune.training.metric_logging import DiskLogger

from humanline.data import encoded_groups
from humanline.launch._processes import process_group
from humanline.losses import HumanlineDPOLoss
from humanline.rollout import Engine, InProcessEngine, Prompt, RoundPlan, SampledSource


class Letters:
    """Token ids as characters from "A" (65) on; 255 ends a response."""

    vocab_size = 256
    stop_tokens = (255,)

    def encode_prompt(self, messages):
        return [ord(letter) - 65 for letter in messages[-1]["content"]]

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(65 + token) for token in tokens)


class Elsewhere(Letters):
    """Moves rank 1 into another folder, to which relative paths then lead."""

    def __init__(self) -> None:
        if os.environ["RANK"] == "1":
            os.chdir(os.environ["THERE"])


class OwnDisk(Letters):
    """A rank as on a node of its own, whose cache is on its local disk."""

    def __init__(self) -> None:
        disk = Path(os.environ["HUMANLINE_CACHE"]) / f"node_{os.environ['RANK']}"
        disk.mkdir(parents=True, exist_ok=True)
        os.chdir(disk)  # no other rank sees a relative path
        os.environ |= {"HUMANLINE_CACHE": "cache", "LOCAL_RANK": "0"}


class MeanToken:
    """How large the tokens of a response are on average; no two responses of a few tokens have the same."""

    def __call__(self, prompts: list[Prompt], responses: list[list[str]]) -> list[list[float]]:
        return [[sum(ord(c) * (i + 1) for i, c in enumerate(text)) / 1000 for text in texts] for texts in responses]


class Vowels:
    """1 for a response with a token from 65 to 100 in its first place, else 0; many groups are scored equal."""

    def __call__(self, prompts: list[Prompt], responses: list[list[str]]) -> list[list[float]]:
        return [[float(130 <= ord(text[0]) < 165) for text in texts] for texts in responses]


class Place:
    """A response's place in its group."""

    def __call__(self, prompts: list[Prompt], responses: list[list[str]]) -> list[list[float]]:
        return [[float(place) for place in range(len(texts))] for texts in responses]


class Solved(MeanToken):
    """After some calls with responses everything is right."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, prompts: list[Prompt], responses: list[list[str]]) -> list[list[float]]:
        self.calls -= any(responses)
        return [[1.0] * len(texts) for texts in responses] if self.calls < 0 else super().__call__(prompts, responses)


class Rare:
    """1 for one response in 50, else 0."""

    highest_score = 1.0

    def __call__(self, prompts: list[Prompt], responses: list[list[str]]) -> list[list[float]]:
        return [[float(sum(map(ord, text)) % 50 == 0) for text in texts] for texts in responses]


class Wrong:
    """0 for everything but the first calls with responses, which have a right one each."""

    highest_score: float | None = 1.0

    def __init__(self, calls: int = 0, then: float = 0.0) -> None:
        self.calls = calls
        self.then = then

    def __call__(self, prompts: list[Prompt], responses: list[list[str]]) -> list[list[float]]:
        self.calls -= any(responses)
        if self.calls >= 0:
            return [[float(place == 0) for place in range(len(texts))] for texts in responses]
        return [[self.then] * len(texts) for texts in responses]


class Judged(Wrong):
    """The same by a reward whose highest score nobody knows."""

    highest_score = None


class TooFew(MeanToken):
    """One score is missing, and another too many."""

    def __call__(self, prompts: list[Prompt], responses: list[list[str]]) -> list[list[float]]:
        scores = super().__call__(prompts, responses)
        if any(scores):
            scores[0], scores[-1] = scores[0][:-1], [*scores[-1], 0.5]
        return scores


class Failing(MeanToken):
    """Fails on the last of two ranks when it is called for the second time with responses."""

    calls = 0

    def __call__(self, prompts: list[Prompt], responses: list[list[str]]) -> list[list[float]]:
        self.calls += any(responses)
        if self.calls == 2 and os.environ.get("RANK", "1") == "1":
            raise KeyError("solution")
        return super().__call__(prompts, responses)


class Interrupting(MeanToken):
    """When it is called for the second time with responses, the last of two ranks gets SIGTERM, and all are equal."""

    calls = 0

    def __call__(self, prompts: list[Prompt], responses: list[list[str]]) -> list[list[float]]:
        self.calls += any(responses)
        if self.calls < 2:
            return super().__call__(prompts, responses)
        if os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return [[0.0] * len(texts) for texts in responses]


def groups_but_on_rank_1(tokenizer, source, error):
    """Encoded groups; on rank 1 an error in their place."""
    if os.environ.get("RANK") == "1":
        raise getattr(builtins, error.removeprefix("builtins."))("no right")
    return encoded_groups(tokenizer, source)


class RecordingAdamW(AdamW):
    """Keeps the rate and the betas that each of its steps applies."""

    applied: list = []

    def step(self, closure=None):
        group = self.param_groups[0]
        if group["lr"]:  # torch takes a step of rate 0 to have a state to load into
            self.applied.append((group["lr"], tuple(group["betas"])))
        return super().step(closure)


class BreakingLoss(HumanlineDPOLoss):
    """Breaks in its third step on rank 1."""

    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3 and os.environ.get("RANK") == "1":
            raise ZeroDivisionError("in step 3")
        return super().forward(*args, **kwargs)


class BreakingLogger(DiskLogger):
    """Breaks at step 3."""

    error: Exception = ZeroDivisionError("in step 3")

    def log_dict(self, payload, step):
        if step == 3:
            raise self.error
        super().log_dict(payload, step)


class FullLogger(BreakingLogger):
    """Finds no room at step 3."""

    error = OSError(28, "No space left on device")


class Mute(Engine):
    """Answers nothing."""

    def generate(self, prompts, params, seeds):
        return [[] for _ in prompts]


class Offset(InProcessEngine):
    """An engine whose log-probs are those of another function."""

    def build(self, tokenizer, policy):
        engine = super().build(tokenizer, policy)
        generate = engine.generate
        engine.generate = lambda *args: [  # type: ignore[method-assign]
            [replace(sample, logps=[logp - 0.3 for logp in sample.logps]) for sample in samples]
            for samples in generate(*args)
        ]
        return engine


@contextmanager
def sampled_source(plan: RoundPlan, folder: Path) -> Iterator[SampledSource]:
    """The source of a plan in one process, of whose rounds none is sampled yet."""
    with process_group(torch.device("cpu")):
        yield SampledSource(plan, Mute(), MeanToken(), lambda groups: groups, lambda round: None, str(folder), 8, 1.0)
