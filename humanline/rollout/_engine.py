"""The interface of engines, which sample completions: token ids in, token ids out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch.distributed as dist

from humanline.models import LogProbDecoder
from humanline.progress import Progress
from humanline.rollout._sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response. If ``finish_reason`` is "stop", its last token is the stop token, as training expects.

    ``logps`` are the tokens' log-probs, nats, at :meth:`Engine.logps_temperature`; None if the engine has none.
    Completions with the same tokens compare equal, because their log-probs are equal up to rounding.
    """

    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    logps: list[float] | None = field(default=None, compare=False)


class EngineSettings(ABC):
    """The ``engine`` of a config. It is checked when it is constructed; :meth:`build` makes the engine of a run.

    Attributes:
        in_process (bool): whether the engine samples with the training weights themselves.
    """

    in_process: ClassVar[bool] = False

    @abstractmethod
    def build(self, tokenizer: Any, policy: LogProbDecoder) -> "Engine":
        """Builds the engine of a rank, ready to sample.

        Args:
            tokenizer (Any): the run's ``ChatTokenizer``.
            policy (LogProbDecoder): the model that trains.

        Raises:
            ConfigError: if the engine cannot sample for this run.
        """


class Engine(ABC):
    """Samples completions from the policy. Each rank has one.

    Attributes:
        weights_dir (Path | None): the folder where each round's weights are written for the engine; None writes none.
    """

    weights_dir: Path | None = None

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Returns up to ``params.samples_per_prompt`` completions of each prompt, without those unusable for training.

        Args:
            prompts (Sequence[Sequence[int]]): the token ids of this rank's prompts; may be empty.
            params (SamplingParams): the sampling settings.
            seeds (Sequence[int]): the seed of each prompt's draws.
        """

    def logps_temperature(self, params: SamplingParams) -> float | None:
        """Returns the temperature that divides the logits of the completions' ``logps``; None if it is not known."""
        return params.temperature

    def ready(self) -> None:
        """Waits until the engine can sample. Called on rank 0, while the other ranks wait."""

    def update(self, folder: Path, *, announce: bool = True) -> None:
        """Loads weights from a folder in ``weights_dir``. Rank 0 calls it first, with ``announce=True``."""

    def stop(self) -> None:
        """Called from another thread when the run must end; ``generate`` then raises Stopped soon."""


def progress_of(responses: int) -> Progress:
    """Returns the bar of a call that samples this many responses of this rank.

    It is shown on rank 0, once the call lasts two seconds.
    """
    hidden = dist.is_initialized() and dist.get_rank() > 0
    return Progress(
        total=responses, desc="sampling", unit="response", smoothing=0, delay=2, leave=False, disable=hidden
    )
