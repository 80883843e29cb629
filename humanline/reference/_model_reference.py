from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from humanline.data import Rows
from humanline.models import LogProbDecoder, fixed_log_probs, local_shard, trainable_parameters
from humanline.reference._reference import Reference, Strategy
from humanline.reference._run_context import RunContext


@dataclass(frozen=True)
class ModelReference(Strategy):
    """The reference as a second model, sharded like the policy.

    Syncing copies each rank's own shards, without communication. The copy is kept in the model's compute dtype, since
    its log-probs do not depend on more precision.

    Args:
        sync_every (int | None): optimizer steps between two syncs, at least 1; null never syncs (an ordinary frozen
            reference).

    Raises:
        ConfigError: if ``sync_every`` is neither a positive integer nor None.
    """

    def build(self, context: RunContext) -> "SyncedModel":
        return SyncedModel(context.policy, context.model.reference_model(), self.sync_every)


class SyncedModel(Reference):
    """The reference of :class:`ModelReference`.

    Args:
        policy (LogProbDecoder): the policy.
        model (LogProbDecoder): a model with the policy's architecture; its trainable weights are overwritten.
        sync_every (int | None): optimizer steps between two syncs; None never syncs.
    """

    def __init__(self, policy: LogProbDecoder, model: LogProbDecoder, sync_every: int | None) -> None:
        super().__init__(sync_every)
        self.policy = policy
        self.model = model.eval().requires_grad_(False)
        self.become_policy(0)

    def log_probs(self, rows: Rows) -> Tensor:
        """Returns log-probs of the response tokens under the reference, nats, float32 ``[N]``."""
        return fixed_log_probs(self.model, rows)

    def become_policy(self, step: int) -> None:
        """Copies the policy's trainable weights, each rank its own shards."""
        self._copy(trainable_parameters(self.policy))

    def state_dict(self) -> dict[str, Any]:
        """Returns the reference's weights that a sync changes, and the step of the last sync."""
        return super().state_dict() | {"model": self._weights()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the weights and the step of the last sync from :meth:`state_dict`."""
        super().load_state_dict(state)
        self._copy(state["model"])

    def _weights(self) -> dict[str, Tensor]:
        """Returns the reference's copies of the policy's trainable weights."""
        weights = self.model.state_dict()
        return {name: weights[name] for name in trainable_parameters(self.policy)}

    @torch.no_grad()
    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        for name, mine in self._weights().items():
            local_shard(mine).copy_(local_shard(weights[name]))
