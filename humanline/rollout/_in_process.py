from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from humanline.models import LogProbDecoder, whole_weights
from humanline.rollout._engine import Completion, Engine, EngineSettings, progress_of
from humanline.rollout._sampling import SamplingParams
from humanline.rollout._token_ids import token_ids
from humanline.rollout._torchtune_engine import TorchtuneEngine


@dataclass(frozen=True)
class InProcessEngine(EngineSettings):
    """Samples from the policy itself with :class:`TorchtuneEngine`. Meanwhile each rank holds the whole weights.

    Args:
        batch_size (int): the maximum number of completions that a rank samples at a time.
    """

    in_process: ClassVar[bool] = True

    batch_size: int = 64

    def build(self, tokenizer: Any, policy: LogProbDecoder) -> "PolicyEngine":
        return PolicyEngine(policy, tokenizer, self.batch_size)


class PolicyEngine(Engine):
    """The engine of :class:`InProcessEngine`.

    Args:
        policy (LogProbDecoder): the model that trains.
        tokenizer (Any): the run's ``ChatTokenizer``.
        batch_size (int): the most completions that a rank draws at a time.
    """

    def __init__(self, policy: LogProbDecoder, tokenizer: Any, batch_size: int) -> None:
        self.policy = policy
        self.engine = TorchtuneEngine(
            policy, stop_tokens=tokenizer.stop_tokens, batch_size=batch_size, token_ids=token_ids(tokenizer)
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Returns the completions of this rank's prompts. All ranks call it together; a rank may have no prompts."""
        with whole_weights(self.policy), progress_of(len(prompts) * params.samples_per_prompt) as bar:
            return self.engine.generate(prompts, params, seeds, bar)

    def stop(self) -> None:
        self.engine.stop()
