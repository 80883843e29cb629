"""Checks that the arguments in a config's ``model`` took effect in the built model.

torchtune's builders ignore names in ``lora_attn_modules`` that they do not know, and a builder with ``**kwargs`` may
ignore any argument.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear

from humanline.errors import ConfigError
from humanline.models._adapter import adapter_modules, has_quantized_base, rank_and_alpha

# Names of layers in other libraries.
_OUTPUT_PROJ = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o", "attn_out", "proj")
_FUSED = ("query_key_value", "qkv_proj", "qkv", "wqkv", "c_attn", "in_proj")
_MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "mlp", "fc1", "fc2", "c_fc")
_HEAD = ("lm_head", "output", "embed_out", "head")
_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte")


def check_arguments(model: TransformerDecoder, builder: Mapping[str, Any]) -> None:
    """Raises ConfigError if an argument has no effect in the built model.

    Args:
        model (TransformerDecoder): the model, possibly on the meta device.
        builder (Mapping[str, Any]): the config's ``model``: ``_component_`` and its arguments.

    Raises:
        ConfigError: if an adapter with these arguments cannot train, if ``lora_attn_modules`` names a layer that the
            model does not have, if an argument has no effect, or if a ``lora_`` builder built no adapter.
    """
    for key, holds, remedy in (
        ("lora_rank", lambda rank: rank >= 1, "a rank of at least 1"),
        ("lora_alpha", lambda alpha: alpha > 0, "a number above 0, which scales the adapter's update"),
        ("lora_dropout", lambda share: 0 <= share < 1, "the share of dropped inputs, in [0, 1)"),
    ):
        if builder.get(key) is not None and not holds(builder[key]):
            raise ConfigError(f"model.{key}: expected {remedy}, got {builder[key]}")
    layers = list(model.layers)
    names = builder.get("lora_attn_modules")
    if names is not None:
        _check_names(names, [_projections(layer.attn) for layer in layers])
    for key, value, found in _shown(model, builder):
        if found != value:
            raise ConfigError(
                f"model.{key}: {value} has no effect: {builder.get('_component_')} built a model with {found}; "
                "remove the key, or use a builder that applies it"
            )
    adapted = adapter_modules(model)
    asks = str(builder.get("_component_")).rpartition(".")[2].startswith(("lora_", "qlora_")) or any(
        key.startswith(("lora_", "apply_lora_")) and builder[key] for key in map(str, builder)
    )
    if asks and not adapted:
        raise ConfigError(
            f"model: {builder.get('_component_')} built a model without adapters, so all of its weights would train; "
            "set lora_attn_modules or apply_lora_to_mlp: True, or use the builder without lora_"
        )


def _check_names(names: Any, layers: list[dict[str, nn.Module]]) -> None:
    key = "model.lora_attn_modules"
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key}: expected a list of names such as [q_proj, v_proj], got {names!r}")
    known = list(dict.fromkeys(name for layer in layers for name in layer))
    for name, count in Counter(names).items():
        if name not in known:
            raise ConfigError(f"{key}: this model's attention has no layer {name}; {_instead(name, known)}")
        if count > 1:
            raise ConfigError(f"{key}: {name} is listed {count} times; list it once")
    for name in names:
        without = [at for at, layer in enumerate(layers) if not isinstance(layer.get(name), LoRALinear | DoRALinear)]
        if without:
            raise ConfigError(
                f"{key}: {name} has no adapter in layer {without[0]}, since the builder ignored it; use another builder"
            )
    for name in known:
        if name not in names and any(isinstance(layer.get(name), LoRALinear | DoRALinear) for layer in layers):
            raise ConfigError(f"{key}: {name} is not listed but has an adapter; add it")


def _projections(attention: nn.Module) -> dict[str, nn.Module]:
    return {
        name: child for name, child in attention.named_children() if hasattr(child, "weight") and "norm" not in name
    }


def _instead(name: str, known: list[str]) -> str:
    lower = name.lower().rpartition(".")[2]
    if lower in _OUTPUT_PROJ and "output_proj" in known:
        return "use output_proj"
    if lower in _FUSED:
        return "use q_proj, k_proj and v_proj"
    if lower in _MLP:
        return "it belongs to the MLP: set model.apply_lora_to_mlp: True"
    if lower in _HEAD:
        return "it is the output layer, whose adapter is not supported; remove it"
    if lower in _EMBEDDINGS:
        return "it is the embedding, which cannot have an adapter; remove it"
    if lower in ("all-linear", "all", "*"):
        return f"list the layers, {', '.join(known)}, and set model.apply_lora_to_mlp: True"
    letters = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    close = next((letters[key] for key in letters if lower in (key, f"w{key}", f"{key}_lin")), None)
    close = close or {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.get(lower.removesuffix("_proj"))
    close = close if close in known else next(iter(get_close_matches(lower, known, n=1)), None)
    return f"use {close}" if close else f"choose from {', '.join(known)}"


def _shown(model: TransformerDecoder, builder: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the arguments that can be read back from the model: key, value in the config, value in the model."""
    first = model.layers[0].attn
    sizes = {
        "vocab_size": model.tok_embeddings.num_embeddings,
        "embed_dim": model.tok_embeddings.embedding_dim,
        "num_layers": len(model.layers),
        "max_seq_len": model.max_seq_len,
        "num_heads": getattr(first, "num_heads", None),
        "num_kv_heads": getattr(first, "num_kv_heads", None),
        "head_dim": getattr(first, "head_dim", None),
    }
    for key, found in sizes.items():
        if builder.get(key) and found is not None:
            yield key, builder[key], found
    adapters = adapter_modules(model)
    for module in adapters.values():
        rank, alpha = rank_and_alpha(module)
        own = {
            "lora_rank": rank,
            "lora_alpha": round(alpha, 6),
            "lora_dropout": getattr(module.dropout, "p", 0.0),
            "use_dora": isinstance(module, DoRALinear),
        }
        yield from ((key, builder[key], value) for key, value in own.items() if builder.get(key) is not None)
    placed = {
        "apply_lora_to_mlp": any(".mlp." in name for name in adapters),
        "apply_lora_to_output": "output" in adapters,
    }
    yield from ((key, bool(builder[key]), found) for key, found in placed.items() if builder.get(key) is not None)
    if builder.get("quantize_base") is not None:
        yield "quantize_base", bool(builder["quantize_base"]), has_quantized_base(model)
