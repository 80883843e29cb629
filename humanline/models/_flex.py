"""FlexAttention over block masks, for the attention of all families.

A kernel is compiled for each shape. At its limit of eight, Dynamo would run FlexAttention uncompiled, without an error,
and hold all scores of a row. Here the limit is what a run needs, and one kernel more is an error.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torchtune.modules import MultiHeadAttention

from humanline.errors import ConfigError, TrainingError
from humanline.torchtune_seam.internals import Attend, Mask, attention_call, set_attention_call

# A run needs at most 24: for four widths of rows, with and without a window, without gradient and with gradients of all
# or some of queries, keys and values (an adapter's in the first layer).
_MOST_KERNELS = 32
# Bytes of shared memory that the largest kernel for heads of 512 or 1,024 bytes needs, as Triton 3.7 compiles it: with
# the blocks of torch 2.13, and with those of `kernel_options`.
_TORCHS_BLOCKS, _OWN_BLOCKS = 153_600, 74_496


def use_flex(attention: MultiHeadAttention) -> None:
    """Makes a layer compute block masks with FlexAttention as it is compiled here, not as torchtune compiles it."""
    call = attention_call(attention)
    if not isinstance(call, _MaskedAttention):
        scale, soft_cap = getattr(attention, "scale", None), getattr(attention, "soft_cap", None)
        set_attention_call(attention, _MaskedAttention(call, scale, soft_cap))


@dataclass(frozen=True)
class _MaskedAttention:
    """A layer's function of queries, keys, values and a mask.

    Attributes:
        otherwise (Attend): the function for other masks than block masks.
        scale (float | None): of the products of queries and keys; None for ``1 / sqrt(D)``.
        soft_cap (float | None): bound on the absolute value of scores; None for no bound.
    """

    otherwise: Attend
    scale: float | None
    soft_cap: float | None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, dropout_p: float, is_causal: bool
    ) -> Tensor:
        """``[R, H, L, D]`` three times to ``[R, H, L, D]``."""
        if not isinstance(mask, BlockMask):
            return self.otherwise(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        if dropout_p:
            raise ConfigError(f"model.attn_dropout: expected 0, since FlexAttention has no dropout, got {dropout_p}")
        return _flex(q, k, v, mask, self.scale, self.soft_cap)


@torch.compiler.disable(recursive=False)  # compiled on its own, for fixed shapes, in compiled layers too
def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None, soft_cap: float | None) -> Tensor:
    card = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
    options = kernel_options(getattr(card, "shared_memory_per_block_optin", 0), q.size(-1), q.dtype)
    try:
        with dynamo.patch(fail_on_recompile_limit_hit=True, recompile_limit=_MOST_KERNELS):
            settings = {"block_mask": mask, "scale": scale, "kernel_options": options}
            return flex()(q, k, v, score_mod=_capped(soft_cap), **settings)
    except FailOnRecompileLimitHit as error:
        raise TrainingError(
            f"attention: rows of {q.size(2)} tokens need one kernel of FlexAttention too many, since each shape of a "
            "pass needs its own; use RowBudget(fixed_shape=True), which has few shapes"
        ) from error


def kernel_options(shared_memory: int, head_dim: int, dtype: torch.dtype) -> dict[str, int] | None:
    """Returns smaller blocks than FlexAttention's own for GPUs on which these may not fit; None elsewhere.

    Args:
        shared_memory (int): the most bytes of it that a kernel can have: 101,376 with compute capability 8.6, 8.9 and
            12.x, and 166,912 with 8.0.
        head_dim (int): dimensions of a head.
        dtype (torch.dtype): dtype of queries, keys and values.
    """
    head = 2 ** math.ceil(math.log2(head_dim)) * dtype.itemsize  # bytes in a kernel, of a query for example
    if head not in (512, 1024) or not _OWN_BLOCKS <= shared_memory < _TORCHS_BLOCKS:
        return None
    # 64 KiB hold 4n heads: in forward 2n queries, and in its second stage n keys and n values; in backward n queries,
    # keys, values and gradients of outputs each.
    n = 2**14 // head
    forward = {"fwd_BLOCK_M": 2 * n, "fwd_BLOCK_N": n, "fwd_num_stages": 2}
    return forward | {f"bwd_BLOCK_{side}": n for side in ("M1", "N1", "M2", "N2")} | {"bwd_num_stages": 1}


@functools.cache
def flex() -> Any:
    """Returns FlexAttention, compiled for each shape."""
    # Inductor has no kernels with gradients for a CPU: there the operations run that define FlexAttention, for tests.
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(flex_attention, dynamic=False, backend=backend)


@functools.cache
def _capped(soft_cap: float | None) -> Callable[..., Tensor] | None:
    if soft_cap is None:
        return None

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    return score_mod
