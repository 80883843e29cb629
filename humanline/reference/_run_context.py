from collections.abc import Callable, Iterable
from dataclasses import dataclass

from humanline.data import Rows
from humanline.models import LogProbDecoder


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a run has for its reference to set itself up with.

    Attributes:
        new_model (Callable[[], LogProbDecoder]): builds a model like the policy, placed on devices like it; its
            trainable weights are undefined.
        passes (Callable[[int], Iterable[Rows]] | None): the passes for which this rank will ask the reference at an
            optimizer step, given before the step; all ranks make the same number. None where the source has a step's
            groups only when the step comes.
        total_steps (int): optimizer steps of the whole run.
        resumes (bool): whether a checkpoint is about to be loaded.
        fingerprint (Callable[[], str]): a digest of the weights that the run starts from and of the function that they
            make; all ranks call it together.
        computation (str): a digest of what computes it: code, device, precision. Other code may give other log-probs.
    """

    new_model: Callable[[], LogProbDecoder]
    passes: Callable[[int], Iterable[Rows]] | None
    total_steps: int
    resumes: bool
    fingerprint: Callable[[], str]
    computation: str = ""
