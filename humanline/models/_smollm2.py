from typing import Any

from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LORA_ATTN_MODULES

SHAPE: dict[str, Any] = {
    "vocab_size": 49_152,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "embed_dim": 576,
    "intermediate_dim": 1536,
    "max_seq_len": 8192,
    "norm_eps": 1e-5,
    "rope_base": 100_000,
    "scale_factor": 1,
    "tie_word_embeddings": True,
}


def smollm2_135m() -> TransformerDecoder:
    """Builder for SmolLM2-135M (https://arxiv.org/abs/2502.02737), the model of the demo.

    It is a Llama with tied embeddings and plain rotary positions. So torchtune's Llama 3.2 builder builds it, with
    ``scale_factor=1`` to disable Llama 3.2's scaled frequencies. Its checkpoints load with ``model_type: LLAMA3_2``.

    Returns:
        TransformerDecoder: 134.5M parameters; token ids ``[B, S]`` to logits ``[B, S, 49152]``, ``S <= 8192``.
    """
    return llama3_2(**SHAPE)


def lora_smollm2_135m(
    lora_attn_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
) -> TransformerDecoder:
    """Builder for SmolLM2-135M with LoRA, with the arguments of torchtune's LoRA builders.

    The output layer cannot have an adapter, since its weights are the embeddings'. The base cannot be quantized, since
    attention's projections do not divide into blocks of NF4.

    Args:
        lora_attn_modules (list[LORA_ATTN_MODULES]): attention projections with an adapter, from ``q_proj``, ``k_proj``,
            ``v_proj`` and ``output_proj``.
        apply_lora_to_mlp (bool): True adds adapters to the three projections of each MLP.
        lora_rank (int): rank of the adapter's update.
        lora_alpha (float): the update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout (float): probability of dropping an input of the adapter in training.
        use_dora (bool): True trains each row's magnitude separately from its direction (DoRA,
            https://arxiv.org/abs/2402.09353).

    Returns:
        TransformerDecoder: as :func:`smollm2_135m`, with adapters.
    """
    return lora_llama3_2(
        lora_attn_modules=lora_attn_modules,
        apply_lora_to_mlp=apply_lora_to_mlp,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        **SHAPE,
    )
