from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from humanline.data import Rows
from humanline.errors import ConfigError
from humanline.models import LogProbDecoder
from humanline.reference._run_context import RunContext


class Reference(ABC):
    """What the policy's log-probs are compared with, and when it becomes the policy.

    **Syncing** (https://arxiv.org/abs/2509.24207): at optimizer step ``t`` (1-based), if ``t % sync_every == 0``, the
    reference becomes the policy after backward and gradient clipping and *before* the optimizer's step. With
    ``sync_every: 1`` it therefore lags the policy by exactly one step.

    Args:
        sync_every (int | None): optimizer steps between two syncs; None never syncs (the ordinary frozen reference).

    Attributes:
        last_sync (int): optimizer step of the last sync; 0 before the first.

    Raises:
        ConfigError: if ``sync_every`` is not a positive whole number or None.
    """

    def __init__(self, sync_every: int | None = 1) -> None:
        whole = isinstance(sync_every, int) and not isinstance(sync_every, bool)
        if sync_every is not None and (not whole or sync_every < 1):
            raise ConfigError(
                f"reference.sync_every: {sync_every!r} is not a positive number of optimizer steps; 1 to 4 suit "
                "instruction following, null never syncs"
            )
        self.sync_every = sync_every
        self.last_sync = 0

    def before_optimizer_step(self, step: int) -> None:
        """The sync hook: call it at every step (1-based), after gradient clipping and before ``optimizer.step()``."""
        if self.sync_every is not None and step % self.sync_every == 0:
            self.sync(step)
            self.last_sync = step

    @abstractmethod
    def setup(self, policy: LogProbDecoder, context: RunContext) -> None:
        """Makes the reference what the policy is before the first step.

        Args:
            policy (LogProbDecoder): the policy, with the weights that the run starts from.
            context (RunContext): what else the run has to give.

        Raises:
            ConfigError: if the policy or the source does not suit the strategy.
        """

    @abstractmethod
    def log_probs(self, rows: Rows) -> Tensor:
        """Log-probs of the response tokens under the reference, nats, float32 ``[N]``; they carry no gradient."""

    @abstractmethod
    def sync(self, step: int) -> None:
        """Makes the reference what the policy is now, before the weights move in ``step``."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; here, the step of the last sync."""
        return {"last_sync": self.last_sync}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint, after :meth:`setup`.

        Args:
            state (dict[str, Any]): what :meth:`state_dict` gave.

        Raises:
            ConfigError: if this run cannot go on from it.
        """
        self.last_sync = state["last_sync"]
