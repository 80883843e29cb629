from torch import Tensor, nn
from torchtune.modules import MultiHeadAttention

from humanline.torchtune_seam.internals import Mask, attention_call


class HeadNormedAttention(MultiHeadAttention):
    """torchtune's attention with the norms of queries and keys before RoPE, as in Qwen3 and Gemma 3.

    torchtune's own attention norms them after RoPE. That is another function, because a norm has different weights for
    the two dimensions that RoPE mixes.

    Args:
        **kwargs (Any): as for ``MultiHeadAttention``, ``q_norm``, ``k_norm`` and ``pos_embeddings`` among them.
    """

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Mask | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """Self-attention, ``[B, S, D]`` to ``[B, S, D]``; ``y`` is ``x``, which torchtune's layers pass twice."""
        q = self._turned(self.q_proj(x), self.q_norm, input_pos)
        k = self._turned(self.k_proj(x), self.k_norm, input_pos)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        if self.num_heads != self.num_kv_heads:
            k, v = (each.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for each in (k, v))
        output = attention_call(self)(
            q,
            k,
            v,
            mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=self.kv_cache is None and mask is None and self.is_causal,
        )
        return self.output_proj(output.transpose(1, 2).flatten(-2))

    def _turned(self, heads: Tensor, norm: nn.Module, positions: Tensor | None) -> Tensor:
        """``[B, S, H * D]`` to ``[B, H, S, D]``."""
        heads = norm(heads.unflatten(-1, (-1, self.head_dim)))
        return self.pos_embeddings(heads, input_pos=positions).transpose(1, 2)
