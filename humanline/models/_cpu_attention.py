"""Attention over blocks of queries, for a CPU.

A mask over a whole row makes a CPU compute all its scores, most of them to be hidden, in a kernel that reaches a tenth
of the speed of plain matrix products. Here each block is a few plain products.

A product of bfloat16 tensors rounds its result to bfloat16. That is too coarse for scores, since what counts is their
distance from the largest and not their size. So the scores are computed twice, the second time minus their peak,
``q . k * scale - peak``, which the product adds up in float32 and rounds once. Then the weights ``exp(score - peak)``
are as exact as bfloat16 can hold them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from humanline.data import QueryBlock

_LN_2 = math.log(2)  # peaks are in units of it: on a CPU exp2 takes a quarter of the time of exp


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[QueryBlock], scale: float) -> Tensor:
    """Computes attention of each block's queries to its keys.

    Args:
        q (Tensor): queries, ``[R, H, L, D]``.
        k (Tensor): keys, ``[R, H, L, D]``.
        v (Tensor): values, ``[R, H, L, D]``.
        blocks (Sequence[QueryBlock]): the blocks of all rows.
        scale (float): of the products of queries and keys.

    Returns:
        Tensor: ``[R, H, L, D]``; 0 for tokens of no block, which are padding.
    """
    return _Attend.apply(q, k, v, blocks, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[QueryBlock], scale: float) -> Tensor:
        keys = _transposed(k)
        outputs = _zeros_like(q)
        peaks, sums = q.new_zeros(*q.shape[:3], 1), q.new_ones(*q.shape[:3], 1, dtype=torch.float32)
        for block in blocks:
            at = block.row, slice(None), block.queries
            its_keys = _gather(keys[block.row], block, 2)
            peaks[at] = _hide(torch.bmm(q[at], its_keys), block).float().amax(-1, keepdim=True).mul_(scale / _LN_2)
            weights = _weights(q[at], its_keys, peaks[at], block, scale)
            sums[at] = weights.sum(-1, keepdim=True, dtype=torch.float32)
            outputs[at] = torch.bmm(weights, _gather(v[block.row], block, 1)) / sums[at]
        ctx.save_for_backward(q, k, v, outputs, peaks, sums)
        ctx.blocks, ctx.scale = blocks, scale
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, outputs, peaks, sums = ctx.saved_tensors
        blocks, scale = ctx.blocks, ctx.scale
        keys, values = _transposed(k), _transposed(v)
        grad = (grad / sums).contiguous()  # in place of the weights
        means = (grad * outputs).sum(-1, keepdim=True).to(q.dtype)  # of the weights' gradients
        grad = grad.to(q.dtype)
        grad_q = _zeros_like(q)
        grad_k, grad_v = (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))
        for block in blocks:
            row, at = block.row, (block.row, slice(None), block.queries)
            weights = _weights(q[at], _gather(keys[row], block, 2), peaks[at], block, scale)
            _scatter(grad_v[row], torch.bmm(weights.transpose(1, 2), grad[at]), block)
            # d score = weight * (d weight - mean of d weight)
            grad_scores = torch.baddbmm(-means[at], grad[at], _gather(values[row], block, 2)).mul_(weights)
            grad_q[at] = torch.bmm(grad_scores, _gather(k[row], block, 1)).mul_(scale)
            _scatter(grad_k[row], torch.bmm(grad_scores.transpose(1, 2), q[at]), block)
        return grad_q, grad_k.mul_(scale).to(k.dtype), grad_v.to(v.dtype), None, None


def _weights(q: Tensor, keys: Tensor, peaks: Tensor, block: QueryBlock, scale: float) -> Tensor:
    """Computes ``exp(scores - peaks)``, as powers of 2, ``[H, n, D]`` and ``[H, D, m]`` to ``[H, n, m]``."""
    return _hide(torch.baddbmm(-peaks, q, keys, alpha=scale / _LN_2), block).exp2_()


def _hide(scores: Tensor, block: QueryBlock) -> Tensor:
    hidden = torch.zeros(block.hidden.shape, dtype=scores.dtype).masked_fill_(block.hidden, float("-inf"))
    scores[..., -hidden.size(1) :] += hidden  # several times as fast as masked_fill_
    return scores


def _transposed(heads: Tensor) -> Tensor:
    """``[R, H, L, D]`` to ``[R, H, D, L]``, in memory too: a product with a transposed slice would copy the slice."""
    return heads.transpose(2, 3).contiguous()


def _gather(row: Tensor, block: QueryBlock, dim: int) -> Tensor:
    parts = [row.narrow(dim, part.start, part.stop - part.start) for part in block.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _scatter(row: Tensor, values: Tensor, block: QueryBlock) -> None:
    """Adds one value per key of the block, ``[H, m, D]``, to its place in the row, ``[H, L, D]``."""
    sizes = [part.stop - part.start for part in block.keys]
    for part, its in zip(block.keys, values.split(sizes, 1), strict=True):
        row[:, part] += its


def _zeros_like(heads: Tensor) -> Tensor:
    """``[R, H, L, D]``, in memory ``[R, L, H, D]``, which the layer's next product needs."""
    rows, count, length, size = heads.shape
    return heads.new_zeros(rows, length, count, size).transpose(1, 2)
