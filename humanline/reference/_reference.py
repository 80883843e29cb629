from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from humanline.data import Rows
from humanline.errors import ConfigError
from humanline.reference._run_context import RunContext


@dataclass(frozen=True)
class Strategy(ABC):
    """What the config says of the reference; :meth:`build` makes it of a run's policy.

    Args:
        sync_every (int | None): optimizer steps between two syncs; None never syncs (the ordinary frozen reference).

    Raises:
        ConfigError: if ``sync_every`` is not a positive whole number or None.
    """

    sync_every: int | None = 1

    def __post_init__(self) -> None:
        whole = isinstance(self.sync_every, int) and not isinstance(self.sync_every, bool)
        if self.sync_every is not None and (not whole or self.sync_every < 1):
            raise ConfigError(
                f"reference.sync_every: {self.sync_every!r} is not a positive number of optimizer steps; 1 to 4 suit "
                "instruction following, null never syncs"
            )

    @abstractmethod
    def build(self, context: RunContext) -> "Reference":
        """The reference, which is the policy as it is now.

        Raises:
            ConfigError: if the policy or the source does not suit the strategy.
        """


class Reference(ABC):
    """What the policy's log-probs are compared with, and when it becomes the policy.

    **Syncing** (https://arxiv.org/abs/2509.24207): at optimizer step ``t`` (1-based), if ``t % sync_every == 0``, the
    reference becomes the policy after backward and gradient clipping and *before* the optimizer's step. With
    ``sync_every: 1`` it therefore lags the policy by exactly one step.

    Args:
        sync_every (int | None): optimizer steps between two syncs; None never syncs.

    Attributes:
        last_sync (int): optimizer step of the last sync; 0 before the first.
    """

    def __init__(self, sync_every: int | None) -> None:
        self.sync_every = sync_every
        self.last_sync = 0

    def before_optimizer_step(self, step: int) -> None:
        """The sync hook: call it at every step (1-based), after gradient clipping and before ``optimizer.step()``."""
        if self.sync_every is not None and step % self.sync_every == 0:
            self.sync(step)

    def sync(self, step: int) -> None:
        """Makes the reference what the policy is now, before the weights move in ``step``."""
        self.become_policy(step)
        self.last_sync = step

    @abstractmethod
    def log_probs(self, rows: Rows) -> Tensor:
        """Log-probs of the response tokens under the reference, nats, float32 ``[N]``; they carry no gradient."""

    @abstractmethod
    def become_policy(self, step: int) -> None:
        """What a strategy does in :meth:`sync`."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; here, the step of the last sync."""
        return {"last_sync": self.last_sync}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from what :meth:`state_dict` gave.

        Raises:
            ConfigError: if this run cannot resume from it.
        """
        self.last_sync = state["last_sync"]
