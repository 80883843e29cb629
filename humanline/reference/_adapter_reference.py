from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from humanline.data import Rows
from humanline.errors import ConfigError
from humanline.models import LogProbDecoder, adapter_modules, fixed_log_probs, local_shard, trainable_parameters
from humanline.reference._reference import Reference, Strategy
from humanline.reference._run_context import RunContext


@dataclass(frozen=True)
class AdapterReference(Strategy):
    """The reference of a LoRA or QLoRA policy: it shares the frozen base, and only the adapter is kept twice.

    The reference starts as the policy's own adapter. A fresh adapter leaves the base model's function as it is, so the
    reference is then the base model; a run that continues an adapter starts from that adapter. Syncing copies
    the adapter, in place.

    For its log-probs the two adapters change places for the length of one forward pass, in evaluation mode, so that
    LoRA dropout is off. That is before the policy's own forward pass, or after its backward: between the two autograd
    would find its adapter changed.

    Args:
        sync_every (int | None): optimizer steps between two syncs; None never syncs (the ordinary frozen reference).

    Raises:
        ConfigError: if ``sync_every`` is not a positive whole number or None.
    """

    def build(self, context: RunContext) -> "SyncedAdapter":
        """
        Raises:
            ConfigError: if the policy has no adapter.
        """
        if not adapter_modules(context.policy):
            raise ConfigError(
                "reference._component_: AdapterReference needs a model with an adapter (a lora_ or qlora_ builder); a "
                "model that trains as a whole takes humanline.reference.ModelReference"
            )
        return SyncedAdapter(context.policy, self.sync_every)


class SyncedAdapter(Reference):
    """The reference of :class:`AdapterReference`.

    Args:
        policy (LogProbDecoder): a model with an adapter.
        sync_every (int | None): optimizer steps between two syncs; None never syncs.
    """

    def __init__(self, policy: LogProbDecoder, sync_every: int | None) -> None:
        super().__init__(sync_every)
        self.policy = policy
        self.trained = trainable_parameters(policy)
        self.adapter = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def log_probs(self, rows: Rows) -> Tensor:
        """Log-probs of the response tokens under the reference, nats, float32 ``[N]``."""
        with self._swapped():
            return fixed_log_probs(self.policy, rows)

    @torch.no_grad()
    def become_policy(self, step: int) -> None:
        """Copies the policy's adapter, each rank its own shards."""
        torch._foreach_copy_(_shards(self.adapter), _shards(self.trained))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the reference's adapter and the step of the last sync."""
        return super().state_dict() | {"adapter": self.adapter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the adapter and the step of the last sync from what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        torch._foreach_copy_(_shards(self.adapter), _shards(state["adapter"]))

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for policy, reference in zip(_shards(self.trained), _shards(self.adapter), strict=True):
            kept = policy.clone()
            policy.copy_(reference)
            reference.copy_(kept)


def _shards(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, in the order of their names."""
    return [local_shard(tensors[name]) for name in sorted(tensors)]
