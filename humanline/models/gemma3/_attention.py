from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from humanline.models._head_normed_attention import HeadNormedAttention
from humanline.torchtune_seam.internals import set_attention_call


class Gemma3Attention(HeadNormedAttention):
    """Attention with its own scale and, in local layers, a sliding window.

    A mask includes the sliding window. The window counts positions, which differ from places in a row of several
    responses.

    Args:
        scale (float): of the products of queries and keys.
        sliding_window (int | None): number of positions that a token attends to, itself included; None for all
            positions before it.
        **kwargs (Any): as for ``HeadNormedAttention``.
    """

    def __init__(self, *, scale: float, sliding_window: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale, self.sliding_window = scale, sliding_window
        set_attention_call(self, self._masked)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As ``scaled_dot_product_attention``: ``[B, H, Q, D]``, ``[B, H, K, D]`` and the same to ``[B, H, Q, D]``."""
        if is_causal and self.sliding_window is not None and q.size(2) > self.sliding_window:
            at = torch.arange(q.size(2), device=q.device)
            distance = at[:, None] - at
            attn_mask, is_causal = (distance >= 0) & (distance < self.sliding_window), False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale)

    def _masked(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout_p: float, is_causal: bool
    ) -> Tensor:
        return self.attend(q, k, v, attn_mask=None if mask is None else mask[:, None], is_causal=is_causal)
