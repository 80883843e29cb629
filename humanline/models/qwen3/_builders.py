"""Dense Qwen3 (https://arxiv.org/abs/2505.09388) in six sizes, whole and with adapters."""

from functools import partial
from typing import Any

from torch import nn
from torchtune.modules import FeedForward, RMSNorm, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import LORA_ATTN_MODULES
from torchtune.modules.tied_linear import TiedLinear

from humanline.models._head_normed_attention import HeadNormedAttention
from humanline.models._linear_layers import MakeLinear, linear_with_adapter, plain_linear
from humanline.models._rotary import RotaryEmbeddings

_ALL: dict[str, Any] = {"vocab_size": 151_936, "num_kv_heads": 8, "head_dim": 128, "max_seq_len": 40_960}
_0_6B = _ALL | {
    **{"num_layers": 28, "num_heads": 16, "embed_dim": 1024, "intermediate_dim": 3072},
    **{"tie_word_embeddings": True},
}
_1_7B = _0_6B | {"embed_dim": 2048, "intermediate_dim": 6144}
_4B = _0_6B | {"num_layers": 36, "num_heads": 32, "embed_dim": 2560, "intermediate_dim": 9728}
_4B_2507 = _4B | {"rope_base": 5_000_000, "max_seq_len": 262_144}
_8B = _ALL | {"num_layers": 36, "num_heads": 32, "embed_dim": 4096, "intermediate_dim": 12_288}
_14B = _ALL | {"num_layers": 40, "num_heads": 40, "embed_dim": 5120, "intermediate_dim": 17_408}
_32B = _ALL | {"num_layers": 64, "num_heads": 64, "embed_dim": 5120, "intermediate_dim": 25_600}
_SIZES = (_0_6B, _1_7B, _4B, _4B_2507, _8B, _14B, _32B)


def qwen3(
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
    tie_word_embeddings: bool = False,
    linear: MakeLinear = plain_linear,
) -> TransformerDecoder:
    """Builder for a dense Qwen3 of any shape.

    Its checkpoints load with ``humanline.checkpoint.FullModelHFCheckpointer`` and ``model_type: QWEN3``.

    Args:
        vocab_size (int): rows of the embeddings, those without a token among them.
        num_layers (int): number of layers.
        num_heads (int): heads of the queries.
        num_kv_heads (int): heads of the keys and values, a divisor of ``num_heads``.
        head_dim (int): dimensions of a head; ``num_heads * head_dim`` need not be ``embed_dim``.
        embed_dim (int): width of the hidden states, a multiple of ``num_heads``.
        intermediate_dim (int): width of the MLP.
        max_seq_len (int): positions in the tables of RoPE, and the longest sequence that is sampled.
        norm_eps (float): of the norms, those of queries and keys included.
        rope_base (float): base of the rotary frequencies.
        tie_word_embeddings (bool): whether the output layer's weights are the embeddings.
        linear (MakeLinear): makes the linear layers.

    Returns:
        TransformerDecoder: token ids ``[B, S]`` to logits ``[B, S, V]``.
    """
    rope = RotaryEmbeddings(head_dim, max_seq_len, rope_base)
    layers = [
        TransformerSelfAttentionLayer(
            attn=HeadNormedAttention(
                embed_dim=embed_dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                q_proj=linear("q_proj", embed_dim, num_heads * head_dim),
                k_proj=linear("k_proj", embed_dim, num_kv_heads * head_dim),
                v_proj=linear("v_proj", embed_dim, num_kv_heads * head_dim),
                output_proj=linear("output_proj", num_heads * head_dim, embed_dim),
                pos_embeddings=rope,
                q_norm=RMSNorm(head_dim, eps=norm_eps),
                k_norm=RMSNorm(head_dim, eps=norm_eps),
                max_seq_len=max_seq_len,
            ),
            mlp=FeedForward(
                gate_proj=linear("w1", embed_dim, intermediate_dim),
                down_proj=linear("w2", intermediate_dim, embed_dim),
                up_proj=linear("w3", embed_dim, intermediate_dim),
            ),
            sa_norm=RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
        )
        for _ in range(num_layers)
    ]
    embeddings = nn.Embedding(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=nn.ModuleList(layers),
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(embeddings) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False),
    )


def lora_qwen3(
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
    """Builder for a Qwen3 of any shape with LoRA on its layers; the output layer has no adapter.

    Args:
        lora_attn_modules (list[LORA_ATTN_MODULES]): attention projections with an adapter, of ``q_proj``, ``k_proj``,
            ``v_proj`` and ``output_proj``.
        apply_lora_to_mlp (bool): whether the three projections of each MLP have one too.
        lora_rank (int): rank of the adapter's update.
        lora_alpha (float): the update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout (float): probability of dropping an input of the adapter in training.
        use_dora (bool): train each row's magnitude apart from its direction (https://arxiv.org/abs/2402.09353).
        quantize_base (bool): keep the linear layers of the base in NF4 (https://arxiv.org/abs/2305.14314).
        **shape (Any): as for :func:`qwen3`.

    Returns:
        TransformerDecoder: as :func:`qwen3`, with adapters.
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
    return qwen3(**shape, linear=linear)


# Parameters: 0.60e9, 1.72e9, 4.02e9, 8.19e9, 14.8e9 and 32.8e9. The 4B of July 2025 (Instruct-2507, Thinking-2507) has
# another base of RoPE. The qlora_ builders keep the base in NF4. Arguments are those of qwen3 and lora_qwen3.
qwen3_0_6b, qwen3_1_7b, qwen3_4b, qwen3_4b_2507, qwen3_8b, qwen3_14b, qwen3_32b = (
    partial(qwen3, **shape) for shape in _SIZES
)
lora_qwen3_0_6b, lora_qwen3_1_7b, lora_qwen3_4b, lora_qwen3_4b_2507, lora_qwen3_8b, lora_qwen3_14b, lora_qwen3_32b = (
    partial(lora_qwen3, **shape) for shape in _SIZES
)
(
    qlora_qwen3_0_6b,
    qlora_qwen3_1_7b,
    qlora_qwen3_4b,
    qlora_qwen3_4b_2507,
    qlora_qwen3_8b,
    qlora_qwen3_14b,
    qlora_qwen3_32b,
) = (partial(lora_qwen3, **shape, quantize_base=True) for shape in _SIZES)
