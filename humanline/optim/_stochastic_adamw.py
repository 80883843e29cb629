from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from humanline._seeds import stream_seed
from humanline.errors import ConfigError
from humanline.models import local_shard

PIECE = 1 << 24  # elements; large enough to keep a GPU busy


class StochasticAdamW(Optimizer):
    """AdamW with stochastic rounding for bfloat16 weights and moments: 8 bytes per parameter, gradient included.

    The update is computed in float32, piece by piece, and stored in the parameter's dtype. A bfloat16 value is rounded
    up with a probability equal to the fraction cut off. Updates far below a bfloat16 step therefore survive on average;
    rounding to nearest would lose them all. The moments are rounded in the same way: a second moment that changes by
    one part in a thousand per step would otherwise never change. On FSDP2's sharded parameters each rank updates its
    own shard.

    Args:
        params (Iterable[Any]): parameters or parameter groups. The recipe passes them.
        lr (float): learning rate, at least 0.
        betas (tuple[float, float]): decay rates of the first and the second moment, each at least 0 and below 1.
        eps (float): number added to the root of the second moment, at least 0.
        weight_decay (float): decoupled weight decay, at least 0.
        seed (int): seed of the rounding noise. Write ``seed: ${seed}`` to use the run's seed. The noise of a step
            depends on seed, step and shard alone. A resumed run therefore rounds like an uninterrupted one, and ranks
            that hold the same shard round it alike.

    Raises:
        ConfigError: if a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        for key, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ConfigError(f"optimizer.{key}: expected a number of at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"optimizer.betas: expected numbers of at least 0 and below 1, got {tuple(betas)}")
        self.seed = seed
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        noise: torch.Generator | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                step = int(state["step"])
                noise = noise or self._noise(step, parameter)
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                for piece in zip(*map(_pieces, tensors), strict=True):
                    self._update(*piece, step=step, noise=noise, **group)

    def _noise(self, step: int, parameter: Tensor) -> torch.Generator:
        shard = 0
        if isinstance(parameter, DTensor):  # the mesh's last dimension shards; an earlier one replicates
            shard = parameter.device_mesh.get_local_rank(parameter.device_mesh.ndim - 1)
        return torch.Generator(parameter.device).manual_seed(stream_seed("rounding", self.seed, step, shard))

    @staticmethod
    def _update(
        weight: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        step: int,
        noise: torch.Generator,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **_: Any,
    ) -> None:
        beta1, beta2 = betas
        grad = grad.float()
        first = exp_avg.float().lerp(grad, 1 - beta1)
        second = exp_avg_sq.float().lerp(grad.square(), 1 - beta2)
        _store(exp_avg, first, noise)
        _store(exp_avg_sq, second, noise)
        denominator = second.div_(1 - beta2**step).sqrt_().add_(eps)
        # The decay is part of the update: a factor of 1 - lr * weight_decay rounds to 1 in float32 at 1e-8.
        update = first.div_(denominator).div_(1 - beta1**step).add_(weight, alpha=weight_decay)
        _store(weight, weight.float().sub_(update, alpha=lr), noise)


def stochastic_round(values: Tensor, noise: torch.Generator | None = None) -> Tensor:
    """Rounds float32 to bfloat16. Rounds up with the probability of the fraction cut off, so the mean is exact.

    Args:
        values (Tensor): float32, any shape; overwritten.
        noise (torch.Generator | None): source of the random bits; None uses torch's default generator.

    Returns:
        Tensor: bfloat16, same shape.
    """
    # A bfloat16 is the upper half of a float32. Uniform noise in the lower half carries over with that probability.
    bits = values.view(torch.int32)
    random = torch.randint(1 << 16, bits.shape, generator=noise, dtype=bits.dtype, device=bits.device)
    bits.add_(random).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).bfloat16()


def _store(target: Tensor, values: Tensor, noise: torch.Generator) -> None:
    """Copies float32 values into a tensor of any dtype, with stochastic rounding to bfloat16."""
    target.copy_(stochastic_round(values.clone(), noise) if target.dtype == torch.bfloat16 else values)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Splits this rank's shard by rows into views of about ``PIECE`` elements, so that float32 copies stay small."""
    shard = torch.atleast_1d(local_shard(tensor))
    rows = PIECE * len(shard) // max(1, shard.numel())
    return shard.split(max(1, rows))
