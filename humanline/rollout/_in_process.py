from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from humanline.models import LogProbDecoder
from humanline.rollout._engine import Completion, TorchtuneEngine
from humanline.rollout._sampling import SamplingParams
from humanline.rollout._token_ids import token_ids


class InProcessEngine:
    """Samples from the policy itself, by :class:`TorchtuneEngine`; each rank has the whole weights while it does.

    Args:
        batch_size (int): the most completions that a rank draws at a time.
    """

    def __init__(self, batch_size: int = 64) -> None:
        self.batch_size = batch_size

    def setup(self, tokenizer: Any, policy: LogProbDecoder, whole: Callable[[], AbstractContextManager[None]]) -> None:
        """
        Args:
            tokenizer (Any): a ``ChatTokenizer``.
            policy (LogProbDecoder): what is sampled from.
            whole (Callable[[], AbstractContextManager[None]]): gives each rank the policy's whole weights.
        """
        self.whole = whole
        self.engine = TorchtuneEngine(
            policy,
            stop_tokens=tokenizer.stop_tokens,
            batch_size=self.batch_size,
            token_ids=token_ids(tokenizer),
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """The completions of each prompt, which are this rank's; all ranks call it together, and one may have none."""
        with self.whole():
            return self.engine.generate(prompts, params, seeds)

    def stop(self) -> None:
        """Ends sampling for good; what is under way raises :class:`~humanline.rollout.Stopped`."""
        self.engine.stop()
