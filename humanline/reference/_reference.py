from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from humanline.data import Rows
from humanline.errors import ConfigError
from humanline.reference._run_context import RunContext


@dataclass(frozen=True)
class Strategy(ABC):
    """Settings of the reference; :meth:`build` creates the reference for a run's policy.

    Args:
        sync_every (int | None): optimizer steps between two syncs, at least 1; null never syncs (an ordinary frozen
            reference).

    Raises:
        ConfigError: if ``sync_every`` is neither a positive integer nor None.
    """

    sync_every: int | None = 1

    def __post_init__(self) -> None:
        whole = isinstance(self.sync_every, int) and not isinstance(self.sync_every, bool)
        if self.sync_every is not None and (not whole or self.sync_every < 1):
            raise ConfigError(
                f"reference.sync_every: expected a positive integer or null (never sync), got {self.sync_every!r}; "
                "1 to 4 suit instruction following"
            )

    @abstractmethod
    def build(self, context: RunContext) -> "Reference":
        """Returns the reference, which equals the policy as it is now.

        Raises:
            ConfigError: if the strategy cannot work with the policy or the source.
        """


class Reference(ABC):
    """The model that the policy's log-probs are compared with; at a sync it becomes the policy.

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
        """Syncs if this step is due; call it at every step (1-based), after gradient clipping, before the optimizer."""
        if self.sync_every is not None and step % self.sync_every == 0:
            self.sync(step)

    def sync(self, step: int) -> None:
        """Sets the reference to the current policy, before the optimizer changes the weights in ``step``."""
        self.become_policy(step)
        self.last_sync = step

    @abstractmethod
    def log_probs(self, rows: Rows) -> Tensor:
        """Returns log-probs of the response tokens under the reference, nats, float32 ``[N]``, without gradient."""

    @abstractmethod
    def become_policy(self, step: int) -> None:
        """Performs the strategy's part of :meth:`sync`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint; here, the step of the last sync."""
        return {"last_sync": self.last_sync}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from :meth:`state_dict`.

        Raises:
            ConfigError: if this run cannot resume from it.
        """
        self.last_sync = state["last_sync"]
