"""FlexAttention over block masks, for the attention of all families.

A kernel is compiled for each shape. At its limit of eight, Dynamo would run FlexAttention uncompiled, without an error,
and hold all scores of a row. Here the limit is what a run needs, and one kernel more is an error.
"""

import functools
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
    try:
        with dynamo.patch(fail_on_recompile_limit_hit=True, recompile_limit=_MOST_KERNELS):
            return flex()(q, k, v, score_mod=_capped(soft_cap), block_mask=mask, scale=scale)
    except FailOnRecompileLimitHit as error:
        raise TrainingError(
            f"attention: rows of {q.size(2)} tokens need one kernel of FlexAttention too many, since each shape of a "
            "pass needs its own; use RowBudget(fixed_shape=True), which has few shapes"
        ) from error


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
