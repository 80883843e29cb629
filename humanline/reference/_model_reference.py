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
    """The reference as a second model, sharded like the policy; syncing copies each rank's own shards, without
    communication.

    The copy is kept in the dtype in which the model computes, since its log-probs depend on nothing finer.

    Args:
        sync_every (int | None): optimizer steps between two syncs; None never syncs (the ordinary frozen reference).

    Raises:
        ConfigError: if ``sync_every`` is not a positive whole number or None.
    """

    def build(self, context: RunContext) -> "SyncedModel":
        return SyncedModel(context.policy, context.model.reference_model(), self.sync_every)


class SyncedModel(Reference):
    """The reference of :class:`ModelReference`.

    Args:
        policy (LogProbDecoder): the policy.
        model (LogProbDecoder): a model like it, whose trainable weights are replaced by the policy's.
        sync_every (int | None): optimizer steps between two syncs; None never syncs.
    """

    def __init__(self, policy: LogProbDecoder, model: LogProbDecoder, sync_every: int | None) -> None:
        super().__init__(sync_every)
        self.policy = policy
        self.model = model.eval().requires_grad_(False)
        self.become_policy(0)

    def log_probs(self, rows: Rows) -> Tensor:
        """Log-probs of the response tokens under the reference, nats, float32 ``[N]``."""
        return fixed_log_probs(self.model, rows)

    def become_policy(self, step: int) -> None:
        """Copies what trains in the policy, each rank its own shards."""
        self._copy(trainable_parameters(self.policy))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the weights of the reference that a sync changes, and the step of the last sync."""
        return super().state_dict() | {"model": self._weights()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the weights and the step of the last sync from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self._copy(state["model"])

    def _weights(self) -> dict[str, Tensor]:
        """The reference's copies of what trains in the policy."""
        weights = self.model.state_dict()
        return {name: weights[name] for name in trainable_parameters(self.policy)}

    @torch.no_grad()
    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        for name, mine in self._weights().items():
            local_shard(mine).copy_(local_shard(weights[name]))
