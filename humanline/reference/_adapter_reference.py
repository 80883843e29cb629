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
    """The reference of a LoRA or QLoRA policy: both share the frozen base, and the reference has its own adapter.

    The reference starts as the policy's adapter. A fresh adapter does not change the base model's function, so the
    reference is then the base model. If the run continues an existing adapter, the reference starts as that adapter.
    Syncing copies the adapter in place.

    For the reference's log-probs the two adapters are swapped during one forward pass in evaluation mode, without LoRA
    dropout. This happens before the policy's forward or after its backward: in between, autograd would find the
    policy's adapter changed.

    Args:
        sync_every (int | None): optimizer steps between two syncs, at least 1; null never syncs (an ordinary frozen
            reference).

    Raises:
        ConfigError: if ``sync_every`` is neither a positive integer nor None.
    """

    def build(self, context: RunContext) -> "SyncedAdapter":
        """
        Raises:
            ConfigError: if the policy has no adapter.
        """
        if not adapter_modules(context.policy):
            raise ConfigError(
                "reference._component_: AdapterReference needs a model with an adapter (a lora_ or qlora_ builder); "
                "for full fine-tuning use humanline.reference.ModelReference"
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
        """Returns log-probs of the response tokens under the reference, nats, float32 ``[N]``."""
        with self._swapped():
            return fixed_log_probs(self.policy, rows)

    @torch.no_grad()
    def become_policy(self, step: int) -> None:
        """Copies the policy's adapter, each rank its own shards."""
        torch._foreach_copy_(_shards(self.adapter), _shards(self.trained))

    def state_dict(self) -> dict[str, Any]:
        """Returns the reference's adapter and the step of the last sync."""
        return super().state_dict() | {"adapter": self.adapter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the adapter and the step of the last sync from :meth:`state_dict`."""
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
        policy, reference = _shards(self.trained), _shards(self.adapter)
        kept = [each.clone() for each in policy]
        torch._foreach_copy_(policy, reference)  # on a GPU a few launches instead of one for each tensor
        torch._foreach_copy_(reference, kept)


def _shards(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns this rank's part of each tensor, in the order of their names."""
    return [local_shard(tensors[name]) for name in sorted(tensors)]
