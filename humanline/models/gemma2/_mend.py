"""Corrections to torchtune's Gemma 2. Each of the three functions below fixes one fault:

1. Its model builders swap the soft-caps of attention and logits. The right values are 50 for attention's scores and 30
   for the logits (https://arxiv.org/abs/2408.00118, table 1).
2. It caps the hidden state from which the logits are computed, instead of the logits.
3. Release 0.6.1 swaps the norms before and after the MLP when it reads or writes Hugging Face's weights.

Its attention is also replaced. It is correct, but supports neither block masks nor positions for its sliding window.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from humanline.models.gemma2._attention import Gemma2Attention
from humanline.torchtune_seam.internals import GEMMA2_FROM_HF

ATTENTION_CAP, LOGIT_CAP = 50.0, 30.0


class CappedTiedLinear(TiedLinear):
    """Computes logits ``cap * tanh(x . embedding / cap)``, in float32."""

    def __init__(self, tied_module: nn.Module, soft_cap: float) -> None:
        super().__init__(tied_module)
        self.soft_cap = soft_cap

    def __call__(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.tied_module.weight).float()
        return self.soft_cap * (logits / self.soft_cap).tanh()


def mend(decoder: TransformerDecoder) -> TransformerDecoder:
    """Makes a decoder from torchtune's ``gemma2`` or ``lora_gemma2`` compute Gemma 2's function."""
    cap_scores(decoder)
    cap_logits(decoder)
    return decoder


def cap_scores(decoder: TransformerDecoder) -> None:
    """Replaces each layer's attention with one that has the right soft-cap, built from torchtune's parts."""
    for layer in decoder.layers:
        theirs = layer.attn
        layer.attn = Gemma2Attention(
            scale=theirs.scaling,
            soft_cap=ATTENTION_CAP,
            sliding_window=theirs.sliding_window_size,
            **{name: getattr(theirs, name) for name in _PARTS},
        )


def cap_logits(decoder: TransformerDecoder) -> None:
    """Moves the final soft-cap from the hidden state to the logits."""
    decoder.norm.logit_capping = nn.Identity()
    decoder.output = CappedTiedLinear(decoder.tok_embeddings, LOGIT_CAP)


def name_norms() -> None:
    """Corrects torchtune's table of names, by which checkpointers read and write weights and adapters are named."""
    GEMMA2_FROM_HF["model.layers.{}.pre_feedforward_layernorm.weight"] = "layers.{}.mlp_norm.scale"
    GEMMA2_FROM_HF["model.layers.{}.post_feedforward_layernorm.weight"] = "layers.{}.mlp_scale.scale"


_PARTS = (
    *("embed_dim", "num_heads", "num_kv_heads", "head_dim", "max_seq_len", "is_causal", "attn_dropout"),
    *("q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm", "pos_embeddings"),
)
