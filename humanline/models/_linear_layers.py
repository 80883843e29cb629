"""Functions that make the linear layers of a decoder: plain, or with adapters on a base that may be in NF4."""

from collections.abc import Callable
from typing import TypeAlias

from torch import nn
from torchtune.modules import FrozenNF4Linear
from torchtune.modules.peft import LORA_ATTN_MODULES, DoRALinear, LoRALinear

MakeLinear: TypeAlias = Callable[[str, int, int], nn.Module]
"""Makes a layer without bias from its name, such as ``q_proj`` or ``w1``, and its input and output dimensions."""

_OF_THE_MLP = ("w1", "w2", "w3")


def plain_linear(name: str, in_dim: int, out_dim: int) -> nn.Module:
    """Returns a linear layer that trains."""
    return nn.Linear(in_dim, out_dim, bias=False)


def linear_with_adapter(
    lora_attn_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> MakeLinear:
    """Returns a function that makes linear layers with an adapter on those named, and without on the others.

    Args:
        lora_attn_modules (list[LORA_ATTN_MODULES]): attention projections with an adapter, of ``q_proj``, ``k_proj``,
            ``v_proj`` and ``output_proj``.
        apply_lora_to_mlp (bool): whether the three projections of each MLP have one too.
        lora_rank (int): rank of the adapter's update.
        lora_alpha (float): the update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout (float): probability of dropping an input of the adapter in training.
        use_dora (bool): train each row's magnitude apart from its direction (https://arxiv.org/abs/2402.09353).
        quantize_base (bool): keep the linear layers of the base in NF4 (https://arxiv.org/abs/2305.14314).
    """
    adapted = (*lora_attn_modules, *(_OF_THE_MLP if apply_lora_to_mlp else ()))

    def make(name: str, in_dim: int, out_dim: int) -> nn.Module:
        if name in adapted:
            kind = DoRALinear if use_dora else LoRALinear
            settings = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout}
            return kind(in_dim, out_dim, **settings, quantize_base=quantize_base)
        if quantize_base:
            return FrozenNF4Linear(in_dim, out_dim, bias=False)
        return plain_linear(name, in_dim, out_dim)

    return make
