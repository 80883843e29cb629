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
import torch.nn.functional as F
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
            at, count = (block.row, slice(None), block.queries), block.queries.stop - block.queries.start
            its_q, its_keys = _queries(q, block), _keys(keys, block, 2)
            peak = _hide(torch.bmm(its_q, its_keys), block).float().amax(-1, keepdim=True).mul_(scale / _LN_2)
            peaks[at] = peak[:, :count]
            weights = _weights(its_q, its_keys, peak.to(q.dtype), block, scale)
            sums[at] = weights[:, :count].sum(-1, keepdim=True, dtype=torch.float32)
            outputs[at] = torch.bmm(weights, _keys(v, block, 1))[:, :count] / sums[at]
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
            at, count = (block.row, slice(None), block.queries), block.queries.stop - block.queries.start
            its_q, its_grad = _queries(q, block), _queries(grad, block)  # the gradients of padding are 0
            weights = _weights(its_q, _keys(keys, block, 2), _queries(peaks, block), block, scale)
            _scatter(grad_v, torch.bmm(weights.transpose(1, 2), its_grad), block)
            # d score = weight * (d weight - mean of d weight)
            grad_scores = torch.baddbmm(-_queries(means, block), its_grad, _keys(values, block, 2)).mul_(weights)
            grad_q[at] = torch.bmm(grad_scores, _keys(k, block, 1))[:, :count].mul_(scale)
            _scatter(grad_k, torch.bmm(grad_scores.transpose(1, 2), its_q), block)
        return grad_q, grad_k.mul_(scale).to(k.dtype), grad_v.to(v.dtype), None, None


def _weights(q: Tensor, keys: Tensor, peaks: Tensor, block: QueryBlock, scale: float) -> Tensor:
    """Computes ``exp(scores - peaks)``, as powers of 2, ``[H, n, D]`` and ``[H, D, m]`` to ``[H, n, m]``."""
    return _hide(torch.baddbmm(-peaks, q, keys, alpha=scale / _LN_2), block).exp2_()


def _hide(scores: Tensor, block: QueryBlock) -> Tensor:
    scores[..., -block.bias.size(1) :] += block.bias  # several times as fast as masked_fill_
    return scores


def _transposed(heads: Tensor) -> Tensor:
    """``[R, H, L, D]`` to ``[R, H, D, L]``, in memory too: a product with a transposed slice would copy the slice."""
    return heads.transpose(2, 3).contiguous()


def _queries(heads: Tensor, block: QueryBlock) -> Tensor:
    """Returns the block's queries, ``[R, H, L, D]`` to ``[H, N, D]``, padded with 0."""
    its = heads[block.row, :, block.queries]
    missing = block.size[0] - its.size(1)
    return F.pad(its, (0, 0, 0, missing)) if missing else its


def _keys(heads: Tensor, block: QueryBlock, dim: int) -> Tensor:
    """Returns the block's keys along ``dim``, ``[R, H, L, D]`` to ``[H, M, D]`` for 1, padded with 0."""
    row = heads[block.row]
    parts = [row.narrow(dim, part.start, part.stop - part.start) for part in block.keys]
    if missing := block.size[1] - sum(part.size(dim) for part in parts):
        parts.append(row.new_zeros(*row.shape[:dim], missing, *row.shape[dim + 1 :]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _scatter(heads: Tensor, values: Tensor, block: QueryBlock) -> None:
    """Adds one value per key of the block, ``[H, M, D]``, to its place in ``[R, H, L, D]``."""
    done = 0
    for part in block.keys:
        size = part.stop - part.start
        heads[block.row, :, part] += values[:, done : done + size]
        done += size


def _zeros_like(heads: Tensor) -> Tensor:
    """``[R, H, L, D]``, in memory ``[R, L, H, D]``, which the layer's next product needs."""
    rows, count, length, size = heads.shape
    return heads.new_zeros(rows, length, count, size).transpose(1, 2)
