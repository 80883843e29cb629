"""What draws completions: token ids in, token ids out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from humanline.models import LogProbDecoder
from humanline.rollout._sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote after a prompt. After ``"stop"`` its last token is the stop token, as training wants it.

    ``logps`` are the log-probs of the tokens under the model itself (temperature 1), nats; None where an engine has
    none. Completions of the same tokens are equal, as their log-probs are up to rounding.
    """

    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    logps: list[float] | None = field(default=None, compare=False)


class EngineSettings(ABC):
    """The ``engine`` of a config. It is checked when it is constructed; :meth:`build` makes the engine of a run.

    Attributes:
        in_process (bool): whether the engine samples with the very weights that train.
    """

    in_process: ClassVar[bool] = False

    @abstractmethod
    def build(self, tokenizer: Any, policy: LogProbDecoder) -> "Engine":
        """The engine of a rank, ready to sample.

        Args:
            tokenizer (Any): the run's ``ChatTokenizer``.
            policy (LogProbDecoder): the model that trains.

        Raises:
            ConfigError: if it cannot sample for this run.
        """


class Engine(ABC):
    """Draws completions from the policy. Each rank has one.

    Attributes:
        weights_dir (Path | None): the folder into which each round's weights are written for it; None writes none.
    """

    weights_dir: Path | None = None

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """The completions of each prompt; fewer than ``params.samples_per_prompt`` where others cannot be trained on.

        Args:
            prompts (Sequence[Sequence[int]]): the token ids of this rank's prompts; there may be none.
            params (SamplingParams): how completions are drawn.
            seeds (Sequence[int]): one for each prompt, which decides its draws.
        """

    def ready(self) -> None:
        """Waits until it can sample; called on rank 0 before the ranks ask together, while they wait."""

    def update(self, folder: Path, *, announce: bool = True) -> None:
        """Takes over the weights in a folder of ``weights_dir``; rank 0's engine first, with ``announce=True``."""

    def stop(self) -> None:
        """Called in another thread when the run has been asked to end: ``generate`` then raises Stopped soon."""
