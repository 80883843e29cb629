"""Gemma 2 (https://arxiv.org/abs/2408.00118) in three sizes, without and with adapters."""

import inspect
from functools import partial
from typing import Any

from torchtune.models.gemma2 import gemma2 as torchtune_gemma2
from torchtune.models.gemma2 import lora_gemma2 as torchtune_lora_gemma2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LORA_ATTN_MODULES

from humanline.errors import ConfigError
from humanline.models.gemma2._mend import ATTENTION_CAP, LOGIT_CAP, mend

_ALL: dict[str, Any] = {"vocab_size": 256_000, "max_seq_len": 8192, "norm_eps": 1e-6, "sliding_window_size": 4096}
_2B = _ALL | {
    **{"num_layers": 26, "embed_dim": 2304, "intermediate_dim": 9216},
    **{"num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
}
_9B = _ALL | {
    **{"num_layers": 42, "embed_dim": 3584, "intermediate_dim": 14_336},
    **{"num_heads": 16, "num_kv_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256},
}
_27B = _ALL | {
    **{"num_layers": 46, "embed_dim": 4608, "intermediate_dim": 36_864},
    **{"num_heads": 32, "num_kv_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144},
}


def gemma2(**shape: Any) -> TransformerDecoder:
    """Builder for a Gemma 2 of any shape.

    The arguments are those of torchtune's ``gemma2`` without the soft-caps, which are fixed to Gemma 2's. Checkpoints
    load with ``model_type: GEMMA2``.

    Returns:
        TransformerDecoder: token ids ``[B, S]`` to logits ``[B, S, V]``.
    """
    _check_shape(shape)
    return mend(torchtune_gemma2(**shape))


def lora_gemma2(
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
    """Builder for a Gemma 2 of any shape with LoRA.

    The output layer cannot have an adapter, since its weights are the embeddings'.

    Args:
        lora_attn_modules (list[LORA_ATTN_MODULES]): attention projections with an adapter, from ``q_proj``, ``k_proj``,
            ``v_proj`` and ``output_proj``.
        apply_lora_to_mlp (bool): True adds adapters to the three projections of each MLP.
        lora_rank (int): rank of the adapter's update.
        lora_alpha (float): the update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout (float): probability of dropping an input of the adapter in training.
        use_dora (bool): True trains each row's magnitude separately from its direction (DoRA,
            https://arxiv.org/abs/2402.09353).
        quantize_base (bool): True keeps the linear layers of the base in NF4 (https://arxiv.org/abs/2305.14314).
        **shape (Any): arguments of :func:`gemma2`.

    Returns:
        TransformerDecoder: as :func:`gemma2`, with adapters.
    """
    _check_shape(shape)
    return mend(
        torchtune_lora_gemma2(
            lora_attn_modules,
            apply_lora_to_mlp,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_dora=use_dora,
            quantize_base=quantize_base,
            **shape,
        )
    )


def _check_shape(shape: dict[str, Any]) -> None:
    taken = [name for name in inspect.signature(torchtune_gemma2).parameters if "capping" not in name]
    for name in shape:
        if name not in taken:
            caps = f"; the soft-caps are fixed to {ATTENTION_CAP:g} and {LOGIT_CAP:g}" if "capping" in name else ""
            raise ConfigError(f"model.{name}: is not an argument of humanline's Gemma 2{caps}; remove it")


# 2.61e9, 9.24e9 and 27.2e9 parameters, a vocabulary of 256,000, sequences of at most 8192 tokens. The qlora_ builders
# keep the base in NF4. Arguments and results are those of gemma2 and lora_gemma2.
gemma2_2b, gemma2_9b, gemma2_27b = (partial(gemma2, **shape) for shape in (_2B, _9B, _27B))
lora_gemma2_2b, lora_gemma2_9b, lora_gemma2_27b = (partial(lora_gemma2, **shape) for shape in (_2B, _9B, _27B))
qlora_gemma2_2b, qlora_gemma2_9b, qlora_gemma2_27b = (
    partial(lora_gemma2, **shape, quantize_base=True) for shape in (_2B, _9B, _27B)
)
