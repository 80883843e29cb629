from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from humanline.data import Rows
from humanline.models import LogProbDecoder


class ModelBuilder(Protocol):
    """Builds reference models from the weights that a run starts from."""

    def reference_model(self) -> LogProbDecoder:
        """Returns a model with the policy's architecture and placement; its trainable weights are undefined."""

    def fingerprint(self) -> str:
        """Returns a digest of the weights that the run starts from and of the model's function; a collective."""

    def computation(self) -> str:
        """Returns a digest of everything besides the weights that affects log-probs: code, device and precision."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The parts of a run that its reference is built from.

    Attributes:
        policy (LogProbDecoder): the policy, with the weights that the run starts from.
        model (ModelBuilder): builds models like the policy.
        passes (Callable[[int], Iterable[Rows]] | None): the passes whose log-probs this rank will need at an optimizer
            step, known before the step; every rank yields the same number. None if the source knows a step's groups
            only at the step.
        total_steps (int): optimizer steps of the whole run.
        resumes (bool): whether a checkpoint will be loaded.
    """

    policy: LogProbDecoder
    model: ModelBuilder
    passes: Callable[[int], Iterable[Rows]] | None
    total_steps: int
    resumes: bool
