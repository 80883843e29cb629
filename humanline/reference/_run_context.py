from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from humanline.data import Rows
from humanline.models import LogProbDecoder


class ModelBuilder(Protocol):
    """What a run starts from, as far as a reference needs it."""

    def reference_model(self) -> LogProbDecoder:
        """A model like the policy, placed on devices like it; its trainable weights are undefined."""

    def fingerprint(self) -> str:
        """A digest of the weights that the run starts from and of the function that they make; a collective."""

    def computation(self) -> str:
        """A digest of what computes that function: code, device, precision. Other code may give other log-probs."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a run's reference is built from.

    Attributes:
        policy (LogProbDecoder): the policy, with the weights that the run starts from.
        model (ModelBuilder): builds models like it.
        passes (Callable[[int], Iterable[Rows]] | None): the passes for which this rank will ask the reference at an
            optimizer step, given before the step; all ranks make the same number. None where the source has a step's
            groups only when the step comes.
        total_steps (int): optimizer steps of the whole run.
        resumes (bool): whether a checkpoint is about to be loaded.
    """

    policy: LogProbDecoder
    model: ModelBuilder
    passes: Callable[[int], Iterable[Rows]] | None
    total_steps: int
    resumes: bool
