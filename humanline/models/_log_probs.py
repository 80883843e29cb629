"""Log-probs of chosen tokens from hidden states and the output matrix, without holding all logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Most logits computed at a time, as float32 elements: 256 MiB on an accelerator, 16 MiB elsewhere.
_LOGITS = {"accelerator": 2**26, "cpu": 2**22}


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
        total, products = (hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(2))
        peak = torch.full_like(total, torch.finfo(torch.float32).min)
        chosen = torch.full_like(total, torch.nan)  # stays for a target outside of the vocabulary
        for piece in _pieces(hidden, weight):
            logits = _logits(hidden, weight[piece], soft_cap, temperature)
            index, inside = _targets_in(piece, targets)
            chosen = torch.where(inside, logits.gather(1, index).squeeze(1), chosen)
            # Sums over the vocabulary so far, of e^x and x e^x, with x the logits relative to their peak so far.
            before, peak = peak, torch.maximum(peak, logits.amax(1))
            shrink = (before - peak).exp()
            exps = _exp_(logits.sub_(peak[:, None]), keep=with_entropy)
            if with_entropy:
                products = shrink * (products + (before - peak) * total)
                products += torch.bmm(exps[:, None], logits[:, :, None]).flatten()
            total = shrink * total + exps.sum(1)
        # Relative to the peak: next to logits of 30, the log-prob of a nearly certain token has no digits.
        log_sum = total.log()
        log_probs, entropies = chosen - peak - log_sum, log_sum - products / total
        ctx.save_for_backward(hidden, weight, targets, log_sum + peak)
        ctx.soft_cap, ctx.temperature = soft_cap, temperature
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        # Summed over the pieces in float32, since bfloat16 would round later pieces away.
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        scale = grad / ctx.temperature
        for piece in _pieces(hidden, weight):
            logits = _logits(hidden, weight[piece], ctx.soft_cap, ctx.temperature)
            # Of cap * tanh(x / cap); the capped logits were divided by the temperature.
            slope = 1 - (logits * (ctx.temperature / ctx.soft_cap)).square_() if ctx.soft_cap else None
            # d logp / d logits = (onehot(target) - softmax(logits / temperature)) / temperature
            grad_logits = _exp_(logits.sub_(normalizers[:, None])).mul_(-scale[:, None])
            index, inside = _targets_in(piece, targets)
            grad_logits.scatter_add_(1, index, (scale * inside)[:, None])
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden += _mm(grad_logits, weight[piece])
            if grad_weight is not None:
                torch.mm(grad_logits.t(), hidden, out=grad_weight[piece])
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


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


def _pieces(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Returns slices of the vocabulary: rows of ``weight`` to multiply with ``hidden``, one at a time."""
    budget = _LOGITS["cpu" if hidden.device.type == "cpu" else "accelerator"]
    rows = max(1, budget // max(1, len(hidden)))
    rows = rows - rows % 128 or rows  # whole tiles of a GPU's product
    return (slice(i, min(i + rows, len(weight))) for i in range(0, len(weight), rows))


def _targets_in(piece: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the places of targets in a piece of the vocabulary, ``[N, 1]``, and which are in it, bool ``[N]``."""
    inside = (targets >= piece.start) & (targets < piece.stop)
    return torch.where(inside, targets - piece.start, 0)[:, None], inside


def _logits(hidden: Tensor, weight: Tensor, soft_cap: float | None, temperature: float) -> Tensor:
    logits = _mm(hidden, weight.t()).float()
    if soft_cap:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits if temperature == 1 else logits.div_(temperature)


def _exp_(logits: Tensor, keep: bool = False) -> Tensor:
    """Computes ``exp`` in place, or with ``keep`` in a new tensor.

    On a CPU, logits below -87 are raised to it first: ``exp`` would give denormal numbers, 30 times as slowly.
    """
    if logits.device.type == "cpu":
        logits.clamp_(min=-87.0)  # exp(-87) is 1.6e-38
    return logits.exp() if keep else logits.exp_()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Computes ``a @ b``; on CUDA a bfloat16 product keeps its float32 accumulator, so logits keep their precision."""
    return torch.mm(a, b, out_dtype=torch.float32) if _keeps_float32(a) else a @ b


def _keeps_float32(a: Tensor) -> bool:
    return a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)
