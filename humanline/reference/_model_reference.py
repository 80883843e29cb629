from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from humanline.data import Rows
from humanline.errors import ConfigError
from humanline.models import LogProbDecoder, fixed_log_probs, trainable_parameters
from humanline.reference._plan import Plan


class ModelReference:
    """The reference as a second model, sharded like the policy; syncing copies each rank's own shards, without
    communication.

    **Syncing** (https://arxiv.org/abs/2509.24207): at optimizer step ``t`` (1-based), if ``t % sync_every == 0``, the
    reference becomes the policy after backward and gradient clipping and *before* the optimizer's step. With
    ``sync_every: 1`` it therefore lags the policy by exactly one step.

    The copy is kept in the dtype in which the model computes, since its log-probs depend on nothing finer.

    Args:
        sync_every (int | None): optimizer steps between two syncs; None never syncs (the ordinary frozen reference).

    Raises:
        ConfigError: if ``sync_every`` is not a positive whole number or None.
    """

    def __init__(self, sync_every: int | None = 1) -> None:
        check_sync_every(sync_every)
        self.sync_every = sync_every
        self.last_sync = 0

    def setup(self, policy: LogProbDecoder, plan: Plan) -> None:
        """Builds the reference: a model like the policy, whose weights it then takes."""
        self.policy = policy
        self.model = plan.new_model().eval().requires_grad_(False)
        self._sync()

    def log_probs(self, rows: Rows) -> Tensor:
        """Log-probs of the response tokens under the reference, nats, float32 ``[N]``."""
        return fixed_log_probs(self.model, rows)

    def before_optimizer_step(self, step: int) -> None:
        """The sync hook: call it at every step (1-based), after gradient clipping and before ``optimizer.step()``."""
        if self.sync_every is not None and step % self.sync_every == 0:
            self._sync()
            self.last_sync = step

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the weights of the reference that a sync changes, and the step of the last sync."""
        return {"model": self._weights(), "last_sync": self.last_sync}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in self._weights().items():
            local(tensor).copy_(local(state["model"][name]))
        self.last_sync = state["last_sync"]

    def _weights(self) -> dict[str, Tensor]:
        """The reference's copies of what trains in the policy."""
        weights = self.model.state_dict()
        return {name: weights[name] for name in trainable_parameters(self.policy)}

    @torch.no_grad()
    def _sync(self) -> None:
        weights = self._weights()
        for name, parameter in trainable_parameters(self.policy).items():
            local(weights[name]).copy_(local(parameter))


def check_sync_every(sync_every: int | None) -> None:
    """Raises ConfigError unless ``sync_every`` is a positive whole number or None."""
    if sync_every is None:
        return
    if isinstance(sync_every, bool) or not isinstance(sync_every, int) or sync_every < 1:
        raise ConfigError(
            f"reference.sync_every: {sync_every!r} is not a positive number of optimizer steps; 1 to 4 suit "
            "instruction following, null never syncs"
        )


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
