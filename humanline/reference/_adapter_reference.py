from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from humanline.data import Rows
from humanline.errors import ConfigError
from humanline.models import LogProbDecoder, adapter_modules, fixed_log_probs, trainable_parameters
from humanline.reference._model_reference import check_sync_every, local
from humanline.reference._plan import Plan


class AdapterReference:
    """The reference of a LoRA or QLoRA policy: it shares the frozen base, and only the adapter is kept twice.

    The reference starts as the policy's own adapter. A fresh adapter leaves the base model's function as it is, so the
    reference is then the base model; a run that continues an adapter starts from that adapter. Syncing (timing as in
    :class:`ModelReference`) copies the adapter, in place.

    For its log-probs the two adapters change places for the length of one forward pass, in evaluation mode, so that
    LoRA dropout is off. That is before the policy's own forward pass, or after its backward: between the two autograd
    would find its adapter changed.

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
        """Takes the policy's adapter as the reference's.

        Raises:
            ConfigError: if the policy has no adapter.
        """
        if not adapter_modules(policy):
            raise ConfigError(
                "reference._component_: AdapterReference needs a model with an adapter (a lora_ or qlora_ builder); a "
                "model that trains as a whole takes humanline.reference.ModelReference"
            )
        self.policy = policy
        self.trained = trainable_parameters(policy)
        self.adapter = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def log_probs(self, rows: Rows) -> Tensor:
        """Log-probs of the response tokens under the reference, nats, float32 ``[N]``."""
        with self._swapped():
            return fixed_log_probs(self.policy, rows)

    def before_optimizer_step(self, step: int) -> None:
        """The sync hook: call it at every step (1-based), after gradient clipping and before ``optimizer.step()``."""
        if self.sync_every is not None and step % self.sync_every == 0:
            with torch.no_grad():
                torch._foreach_copy_(_shards(self.adapter), _shards(self.trained))
            self.last_sync = step

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the reference's adapter and the step of the last sync."""
        return {"adapter": self.adapter, "last_sync": self.last_sync}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(_shards(self.adapter), _shards(state["adapter"]))
        self.last_sync = state["last_sync"]

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
    return [local(tensors[name]) for name in sorted(tensors)]
