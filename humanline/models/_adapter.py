"""LoRA, QLoRA and DoRA adapters: which parameters train, their initial values, and merging."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torchtune.modules.common_utils import NF4Tensor  # its place in torchao depends on the version
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params
from torchtune.modules.peft.lora import to_nf4

from humanline._seeds import stream_seed
from humanline.errors import ConfigError


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that train, by their names in the state dict: a whole model's, or its adapter's."""
    named = ((name.replace(_CHECKPOINT_PREFIX, ""), parameter) for name, parameter in model.named_parameters())
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def adapter_modules(model: nn.Module) -> dict[str, LoRALinear | DoRALinear]:
    """Returns the linear layers with an adapter, by name; none for full fine-tuning."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear | DoRALinear)}


def rank_and_alpha(module: LoRALinear | DoRALinear) -> tuple[int, float]:
    """Returns the rank and alpha of an adapter, whose update is scaled by ``alpha / rank``."""
    if isinstance(module, DoRALinear):
        return module.lora_a.out_features, module.scaling * module.lora_a.out_features
    return module.rank, module.alpha


def has_quantized_base(model: nn.Module) -> bool:
    """Whether layers of a model keep their base in NF4."""
    return any(isinstance(parameter, NF4Tensor) for parameter in model.parameters())


def check_adapter(model: nn.Module, world_size: int, replicas: int) -> None:
    """Checks that the layers with an adapter can train on these ranks.

    Raises:
        ConfigError: if a DoRA layer has a bias, since torchtune then computes another function than PEFT; if an NF4
            base cannot be split evenly among ``world_size`` ranks; or if it is to be replicated (``replicas`` > 1).
    """
    if replicas > 1 and has_quantized_base(model):
        raise ConfigError("data_parallel_replicate_dim: an NF4 base can only be sharded over all ranks; set it to 1")
    for name, module in adapter_modules(model).items():
        weight = module.weight
        if isinstance(weight, NF4Tensor) and world_size > 1:
            block = weight.block_size * weight.scaler_block_size
            if weight.shape[0] % world_size or weight.numel() % (block * world_size):
                raise ConfigError(
                    f"nproc_per_node: {name} has {weight.shape[0]} rows and {weight.numel():,} elements in NF4, which "
                    f"do not divide into {world_size} parts of whole blocks of {block:,}; use another number of ranks"
                )
        if isinstance(module, DoRALinear) and module.bias is not None:
            raise ConfigError(
                f"model.use_dora: {name} has a bias, which torchtune's DoRA scales with the weight's magnitude, but "
                "PEFT and the paper do not; set use_dora: False, or remove such layers from model.lora_attn_modules"
            )


def freeze_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes only the adapter trainable, in ``dtype``; does nothing to a model without an adapter."""
    adapter = {id(parameter) for parameter in get_adapter_params(model).values()}
    if not adapter:
        return
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            trains = id(parameter) in adapter
            tensor = parameter.detach().to(dtype) if trains else parameter.detach()
            setattr(module, name, nn.Parameter(tensor, requires_grad=trains))


def initial_adapter(model: nn.Module, base: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Returns a fresh adapter, which does not change the base model's function; the same on every rank.

    ``lora_a`` is uniform in ``+-1 / sqrt(in_dim)`` and ``lora_b`` is zero (https://arxiv.org/abs/2106.09685). DoRA's
    magnitudes are the norms of the base weight's rows (https://arxiv.org/abs/2402.09353).

    Args:
        model (nn.Module): the model with adapters, possibly on the meta device.
        base (Mapping[str, Tensor]): the base model's weights, in torchtune's names.
        seed (int): seed of ``lora_a``.

    Returns:
        dict[str, Tensor]: float32, in torchtune's names.
    """
    generator = torch.Generator().manual_seed(stream_seed("initial adapter", seed))
    adapter = {}
    for name, module in adapter_modules(model).items():
        (rank, in_dim), out_dim = module.lora_a.weight.shape, module.lora_b.weight.shape[0]
        bound = 1 / math.sqrt(in_dim)
        adapter[f"{name}.lora_a.weight"] = torch.empty(rank, in_dim).uniform_(-bound, bound, generator=generator)
        adapter[f"{name}.lora_b.weight"] = torch.zeros(out_dim, rank)
        if isinstance(module, DoRALinear):
            weight = base[f"{name}.weight"].to(module.weight.dtype)
            adapter[f"{name}.magnitude"] = as_stored(weight, module.weight).float().norm(dim=1)
    return adapter


def as_stored(weight: Tensor, parameter: Tensor) -> Tensor:
    """Returns ``weight`` as a layer that stores it like ``parameter`` uses it: rounded to NF4 if ``parameter`` is."""
    return quantized_like(weight, parameter).get_original_weight() if isinstance(parameter, NF4Tensor) else weight


def quantized_like(weight: Tensor, parameter: NF4Tensor) -> NF4Tensor:
    """Returns ``weight`` in NF4, with the block sizes of ``parameter``."""
    return to_nf4(weight, block_size=parameter.block_size, scaler_block_size=parameter.scaler_block_size)


def merged_name(layer: str) -> str:
    """Returns the state dict's name of the weight that a layer's adapter is merged into."""
    return f"{layer.replace(_CHECKPOINT_PREFIX, '')}.weight"


@torch.no_grad()
def merged_weight(base: Tensor, adapter: Mapping[str, Tensor], name: str, layer: LoRALinear | DoRALinear) -> Tensor:
    """Returns a base weight with its adapter merged: ``W + alpha / rank * B A``; DoRA also scales rows to magnitude.

    Args:
        base (Tensor): the base weight ``[out, in]``, in any dtype.
        adapter (Mapping[str, Tensor]): the adapter, float32.
        name (str): the weight's name, in torchtune's names.
        layer (LoRALinear | DoRALinear): the layer of the weight.

    Returns:
        Tensor: ``[out, in]``, float32.
    """
    prefix = name.removesuffix(".weight")
    scaling = layer.scaling if isinstance(layer, DoRALinear) else layer.alpha / layer.rank
    merged = base.float() + scaling * adapter[f"{prefix}.lora_b.weight"] @ adapter[f"{prefix}.lora_a.weight"]
    if isinstance(layer, DoRALinear):
        merged *= (adapter[f"{prefix}.magnitude"] / merged.norm(dim=1))[:, None]
    return merged
