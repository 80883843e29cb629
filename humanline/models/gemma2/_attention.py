"""Gemma 2's attention: a soft-cap on scores, and a sliding window on every other layer."""

from typing import Any

import torch
from torch import Tensor
from torchtune.modules import MultiHeadAttention

from humanline.torchtune_seam.internals import set_attention_call

_QUERIES = 256  # of causal attention whose scores are computed at a time


class Gemma2Attention(MultiHeadAttention):
    """torchtune's attention with scores ``cap * tanh(q . k * scale / cap)``.

    A mask already includes the sliding window. The window counts positions, which differ from places in the row if a
    row holds several responses.

    Args:
        scale (float): scale of the products of queries and keys.
        soft_cap (float): bound on the absolute value of scores.
        sliding_window (int | None): number of positions a token attends to, itself included; None sets no limit.
        **kwargs (Any): arguments of ``MultiHeadAttention``.
    """

    def __init__(self, *, scale: float, soft_cap: float, sliding_window: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale, self.soft_cap, self.sliding_window = scale, soft_cap, sliding_window
        set_attention_call(self, self._masked)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Like ``scaled_dot_product_attention``: ``[B, H, Q, D]`` and twice ``[B, H, K, D]`` to ``[B, H, Q, D]``."""
        if is_causal:
            return self._causal(q, k, v)
        scores = self._cap((q @ k.transpose(-2, -1)).float() * self.scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends to earlier positions within the window, with the scores of a few queries in memory at a time."""
        length = q.size(2)
        window = self.sliding_window or length
        outputs = []
        for start in range(0, length, _QUERIES):
            end, first = min(start + _QUERIES, length), max(0, start + 1 - window)
            distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
            mask, seen = (distance >= 0) & (distance < window), slice(first, end)
            outputs.append(self.attend(q[:, :, start:end], k[:, :, seen], v[:, :, seen], attn_mask=mask))
        return torch.cat(outputs, 2)

    def _masked(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout_p: float, is_causal: bool
    ) -> Tensor:
        return self.attend(q, k, v, attn_mask=None if mask is None else mask[:, None], is_causal=is_causal)

    def _cap(self, scores: Tensor) -> Tensor:
        return scores.div_(self.soft_cap).tanh() * self.soft_cap
