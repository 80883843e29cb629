"""The text model of Gemma 3 (https://arxiv.org/abs/2503.19786) in five sizes, whole and with adapters."""

from functools import partial
from typing import Any

from torch import nn
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import FeedForward, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import LORA_ATTN_MODULES
from torchtune.modules.tied_linear import TiedLinear

from humanline.models._linear_layers import MakeLinear, linear_with_adapter, plain_linear
from humanline.models._rotary import RotaryEmbeddings
from humanline.models.gemma3._attention import Gemma3Attention

_SMALL: dict[str, Any] = {
    **{"vocab_size": 262_144, "num_heads": 4, "num_kv_heads": 1, "head_dim": 256},
    **{"max_seq_len": 32_768, "sliding_window_size": 512},
}
_270M = _SMALL | {"num_layers": 18, "embed_dim": 640, "intermediate_dim": 2048}
_1B = _SMALL | {"num_layers": 26, "embed_dim": 1152, "intermediate_dim": 6912}
# The checkpoints of these sizes have a vision tower too.
_LARGE: dict[str, Any] = {
    **{"vocab_size": 262_208, "head_dim": 256, "rope_factor": 8},
    **{"max_seq_len": 131_072, "sliding_window_size": 1024},
}
_4B = _LARGE | {
    **{"num_layers": 34, "num_heads": 8, "num_kv_heads": 4},
    **{"embed_dim": 2560, "intermediate_dim": 10_240},
}
_12B = _LARGE | {
    **{"num_layers": 48, "num_heads": 16, "num_kv_heads": 8},
    **{"embed_dim": 3840, "intermediate_dim": 15_360},
}
_27B = _LARGE | {
    **{"num_layers": 62, "num_heads": 32, "num_kv_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168},
    **{"embed_dim": 5376, "intermediate_dim": 21_504},
}
_SIZES = (_270M, _1B, _4B, _12B, _27B)


def gemma3(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000,
    local_rope_base: float = 10_000,
    rope_factor: float = 1,
    sliding_window_size: int,
    sliding_window_pattern: int = 6,
    query_pre_attn_scalar: float = 256,
    linear: MakeLinear = plain_linear,
) -> TransformerDecoder:
    """Builder for the text model of a Gemma 3 of any shape.

    Its checkpoints load with ``humanline.checkpoint.FullModelHFCheckpointer`` and ``model_type: GEMMA3``.

    Args:
        vocab_size (int): rows of the embeddings, which are the output layer's too.
        num_layers (int): number of layers.
        num_heads (int): heads of the queries.
        num_kv_heads (int): heads of the keys and values, a divisor of ``num_heads``.
        head_dim (int): dimensions of a head.
        embed_dim (int): width of the hidden states, a multiple of ``num_heads``.
        intermediate_dim (int): width of the MLP.
        max_seq_len (int): positions in the tables of RoPE, and the longest sequence that is sampled.
        norm_eps (float): of the norms, those of queries and keys included.
        rope_base (float): base of the rotary frequencies of global layers.
        local_rope_base (float): base of those of local layers.
        rope_factor (float): divisor of positions in global layers.
        sliding_window_size (int): number of positions that a token of a local layer attends to, itself included.
        sliding_window_pattern (int): every n-th layer is global, the others are local.
        query_pre_attn_scalar (float): scores are scaled by its inverse square root.
        linear (MakeLinear): makes the linear layers.

    Returns:
        TransformerDecoder: token ids ``[B, S]`` to logits ``[B, S, V]``.
    """
    everywhere = RotaryEmbeddings(head_dim, max_seq_len, rope_base, rope_factor)
    nearby = RotaryEmbeddings(head_dim, max_seq_len, local_rope_base)

    def norm(dim: int) -> nn.Module:
        return GemmaRMSNorm(dim, eps=norm_eps)

    layers = nn.ModuleList()
    for number in range(1, num_layers + 1):
        is_global = number % sliding_window_pattern == 0
        attention = Gemma3Attention(
            scale=query_pre_attn_scalar**-0.5,
            sliding_window=None if is_global else sliding_window_size,
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=linear("q_proj", embed_dim, num_heads * head_dim),
            k_proj=linear("k_proj", embed_dim, num_kv_heads * head_dim),
            v_proj=linear("v_proj", embed_dim, num_kv_heads * head_dim),
            output_proj=linear("output_proj", num_heads * head_dim, embed_dim),
            pos_embeddings=everywhere if is_global else nearby,
            q_norm=norm(head_dim),
            k_norm=norm(head_dim),
            max_seq_len=max_seq_len,
        )
        mlp = FeedForward(
            gate_proj=linear("w1", embed_dim, intermediate_dim),
            down_proj=linear("w2", intermediate_dim, embed_dim),
            up_proj=linear("w3", embed_dim, intermediate_dim),
            activation=nn.GELU(approximate="tanh"),
        )
        before = {"sa_norm": norm(embed_dim), "mlp_norm": norm(embed_dim)}
        behind = {"sa_scale": norm(embed_dim), "mlp_scale": norm(embed_dim)}
        layers.append(TransformerSelfAttentionLayer(attn=attention, mlp=mlp, **before, **behind))
    embeddings = GemmaNormEmbeddings(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=norm(embed_dim),
        output=TiedLinear(embeddings),
    )


def lora_gemma3(
    lora_attn_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    **shape: Any,
) -> TransformerDecoder:
    """Builder for the text model of a Gemma 3 of any shape with LoRA.

    The output cannot have an adapter, since its weights are those of the embeddings.

    Args:
        lora_attn_modules (list[LORA_ATTN_MODULES]): attention projections with an adapter, of ``q_proj``, ``k_proj``,
            ``v_proj`` and ``output_proj``.
        apply_lora_to_mlp (bool): whether the three projections of each MLP have one too.
        lora_rank (int): rank of the adapter's update.
        lora_alpha (float): the update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout (float): probability of dropping an input of the adapter in training.
        use_dora (bool): train each row's magnitude apart from its direction (https://arxiv.org/abs/2402.09353).
        quantize_base (bool): keep the linear layers of the base in NF4 (https://arxiv.org/abs/2305.14314).
        **shape (Any): as for :func:`gemma3`.

    Returns:
        TransformerDecoder: as :func:`gemma3`, with adapters.
    """
    linear = linear_with_adapter(
        lora_attn_modules,
        apply_lora_to_mlp,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        quantize_base=quantize_base,
    )
    return gemma3(**shape, linear=linear)


# Parameters of the text models: 0.27e9, 1.00e9, 3.88e9, 11.8e9 and 27.0e9. The qlora_ builders keep the base in NF4.
# Arguments are those of gemma3 and lora_gemma3.
gemma3_270m, gemma3_1b, gemma3_4b, gemma3_12b, gemma3_27b = (partial(gemma3, **shape) for shape in _SIZES)
lora_gemma3_270m, lora_gemma3_1b, lora_gemma3_4b, lora_gemma3_12b, lora_gemma3_27b = (
    partial(lora_gemma3, **shape) for shape in _SIZES
)
qlora_gemma3_270m, qlora_gemma3_1b, qlora_gemma3_4b, qlora_gemma3_12b, qlora_gemma3_27b = (
    partial(lora_gemma3, **shape, quantize_base=True) for shape in _SIZES
)
