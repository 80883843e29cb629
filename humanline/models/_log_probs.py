"""Log-probs of chosen tokens from hidden states and the output matrix, without holding all logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Most logits computed at a time, as float32 elements: 256 MiB on an accelerator, 64 MiB elsewhere.
_LOGITS = {"accelerator": 2**26, "cpu": 2**24}


def token_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, soft_cap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """Computes ``log softmax(cap(hidden @ weight.T) / temperature)[targets]`` in pieces, and again in backward.

    Between forward and backward it keeps ``hidden`` and one float per token. Softmax and its gradient are computed in
    float32; the matrix products run in the inputs' dtype (with float32 results if the device supports it).

    Args:
        hidden (Tensor): final hidden states that predict the targets, ``[N, D]``.
        weight (Tensor): output embedding, ``[V, D]``.
        targets (Tensor): token ids, int64 ``[N]``.
        soft_cap (float | None): logits become ``soft_cap * tanh(logits / soft_cap)`` (Gemma 2); None leaves them.
        temperature (float): divides the logits, after the soft-cap; above 0.

    Returns:
        Tensor: log-probs in nats, float32 ``[N]``.
    """
    return _TokenLogProbs.apply(hidden, weight, targets, soft_cap, temperature, False)[0]


def token_log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, soft_cap: float | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Computes :func:`token_log_probs`, and the entropy of each of these distributions.

    Returns:
        tuple[Tensor, Tensor]: log-probs in nats, float32 ``[N]``; entropies in nats, float32 ``[N]``, without gradient.
    """
    return _TokenLogProbs.apply(hidden, weight, targets, soft_cap, temperature, True)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        soft_cap: float | None,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        normalizers = torch.empty_like(log_probs)
        entropies = torch.zeros_like(log_probs)
        for piece in _pieces(hidden, weight):
            logits = _logits(hidden[piece], weight, soft_cap, temperature)
            peak = logits.amax(1, keepdim=True)
            # Relative to the peak: next to logits of 30, the log-prob of a nearly certain token has no digits.
            log_probs[piece] = logits.sub_(peak).gather(1, targets[piece, None]).squeeze(1)
            _skip_denormals(logits)
            exps = logits.exp() if with_entropy else logits.exp_()
            total = exps.sum(1)
            log_sum = total.log()
            if with_entropy:  # log sum(e^x) - sum(x e^x) / sum(e^x), with x the logits relative to the peak
                mean = torch.bmm(exps[:, None], logits[:, :, None]).flatten() / total
                entropies[piece] = log_sum - mean
            log_probs[piece] -= log_sum
            normalizers[piece] = log_sum.add_(peak.squeeze(1))
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.soft_cap, ctx.temperature = soft_cap, temperature
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Summed over the pieces in float32, since bfloat16 would round later pieces away.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for piece in _pieces(hidden, weight):
            logits = _logits(hidden[piece], weight, ctx.soft_cap, ctx.temperature)
            # Of cap * tanh(x / cap); the capped logits were divided by the temperature.
            slope = 1 - (logits * (ctx.temperature / ctx.soft_cap)).square_() if ctx.soft_cap else None
            # d logp / d logits = (onehot(target) - softmax(logits / temperature)) / temperature
            scale = (grad[piece] / ctx.temperature)[:, None]
            grad_logits = _skip_denormals(logits.sub_(normalizers[piece, None])).exp_().mul_(-scale)
            grad_logits.scatter_add_(1, targets[piece, None], scale)
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[piece])
            if grad_weight is not None:
                _add_mm(grad_weight, grad_logits.t(), hidden[piece])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


@contextmanager
def logits_as_on(device: str) -> Iterator[None]:
    """Within the block, the CPU holds as many logits at a time as a device of this type."""
    before = _LOGITS["cpu"]
    if device != "cpu":
        _LOGITS["cpu"] = _LOGITS["accelerator"]
    try:
        yield
    finally:
        _LOGITS["cpu"] = before


def _pieces(left: Tensor, right: Tensor) -> Iterator[slice]:
    """Returns slices of the rows of ``left`` to multiply with ``right.t()``, one at a time."""
    budget = _LOGITS["cpu" if left.device.type == "cpu" else "accelerator"]
    rows = max(1, budget // right.size(0))
    rows = rows - rows % 128 or rows  # whole tiles of a GPU's product
    return (slice(i, i + rows) for i in range(0, len(left), rows))


def _logits(hidden: Tensor, weight: Tensor, soft_cap: float | None, temperature: float) -> Tensor:
    logits = _mm(hidden, weight.t()).float()
    if soft_cap:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits if temperature == 1 else logits.div_(temperature)


def _skip_denormals(logits: Tensor) -> Tensor:
    """Raises logits below -87, on a CPU and in place: ``exp`` would give denormal numbers there, 30 times as slowly."""
    return logits if logits.is_cuda else logits.clamp_(min=-87.0)  # exp(-87) is 1.6e-38


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Computes ``a @ b``; on CUDA a bfloat16 product keeps its float32 accumulator, so logits keep their precision."""
    return torch.mm(a, b, out_dtype=torch.float32) if _keeps_float32(a) else a @ b


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds ``a @ b`` to ``total``, float32, without a second matrix of its size."""
    if _keeps_float32(a) and torch.__version__ >= "2.10":  # before, a float32 sum with bfloat16 factors is refused
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        for part in _pieces(total, b.t()):
            total[part] += _mm(a[part], b)


def _keeps_float32(a: Tensor) -> bool:
    return a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)
