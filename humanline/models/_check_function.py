"""Checks that a built model computes the function described in its checkpoint's config.json."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import torch
from torchtune.models.gemma2 import gemma2
from torchtune.modules import TransformerDecoder

from humanline.errors import ConfigError
from humanline.models._measure import Built, measure
from humanline.models._policy import LogProbDecoder
from humanline.models._published import Published
from humanline.models._rotation import Rotation

Decoder: TypeAlias = TransformerDecoder | LogProbDecoder

# Row layout of queries and keys after a checkpointer's conversion, by its model_type: these keep transformers' layout,
# with pairs of dimensions half a head apart; the others place the two dimensions of a pair side by side.
_IN_HALVES = ("QWEN2", "QWEN3", "GEMMA3", "PHI3_MINI", "PHI4")

# Modules with builders for a family's checkpoints, and the builders that accept every size as an argument.
_BUILDERS = {
    "llama": ("llama2", "code_llama2", "llama3", "llama3_1", "llama3_2", "llama3_3"),
    "mistral": ("mistral",),
    "qwen2": ("qwen2", "qwen2_5"),
    "qwen3": (),
    "gemma": ("gemma",),
    "gemma2": (),
    "gemma3_text": (),
    "phi3": ("phi3", "phi4"),
}
_OWN_BUILDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"humanline.models": ("smollm2_135m",)},
    "qwen3": {
        "humanline.models.qwen3": (
            *("qwen3_0_6b", "qwen3_1_7b", "qwen3_4b", "qwen3_4b_2507", "qwen3_8b", "qwen3_14b", "qwen3_32b"),
        )
    },
    "gemma2": {"humanline.models.gemma2": ("gemma2_2b", "gemma2_9b", "gemma2_27b")},
    "gemma3_text": {"humanline.models.gemma3": ("gemma3_270m", "gemma3_1b", "gemma3_4b", "gemma3_12b", "gemma3_27b")},
}
_COMPONENTS = {
    "llama": ("torchtune.models.llama3.llama3", "torchtune.models.llama3_2.llama3_2"),
    "mistral": ("torchtune.models.mistral.mistral",),
    "qwen2": ("torchtune.models.qwen2.qwen2",),
    "qwen3": ("humanline.models.qwen3.qwen3",),
    "gemma": ("torchtune.models.gemma.gemma",),
    "gemma2": ("humanline.models.gemma2.gemma2",),
    "gemma3_text": ("humanline.models.gemma3.gemma3",),
    "phi3": ("torchtune.models.phi3.phi3",),
}


class Difference(NamedTuple):
    """A quantity that differs between config.json and the model."""

    quantity: str
    published: object
    built: object

    def __str__(self) -> str:
        theirs, ours = _said(self.published), _said(self.built)
        if theirs == ours and isinstance(self.published, Rotation) and isinstance(self.built, Rotation):
            one, other = self.published.frequencies, self.built.frequencies
            at = int(((one - other).abs() / one).argmax())
            theirs = f"{theirs}, frequency {at} = {one[at]:.5g}"
            ours = f"{ours}, frequency {at} = {other[at]:.5g}"
        return f"{self.quantity} is {theirs} in config.json and {ours} in the model"


def differences(built: Built, published: Published, model_type: str | None = None) -> Iterator[Difference]:
    """Yields the quantities in which a model's function differs from its checkpoint's config.json.

    Sliding windows in config.json that torchtune's attention lacks are no difference: see :func:`set_windows`.

    Args:
        built (Built): the model, measured by :func:`~humanline.models.measure`.
        published (Published): the content of config.json.
        model_type (str | None): the checkpointer's model_type; None if it does not convert from the Hugging Face
            format.
    """
    halves = None if model_type is None else model_type in _IN_HALVES
    words = {True: "1 + weight", False: "weight"}
    pairs: list[tuple[str, object, object]] = []
    # The number of layers is checked with the weights.
    for layer, rotation in zip(built.layers, _per_layer(published.rotations, len(built.layers)), strict=True):
        pairs += [
            ("num_attention_heads", published.num_attention_heads, layer.num_heads),
            ("num_key_value_heads", published.num_key_value_heads, layer.num_kv_heads),
            ("head_dim", published.head_dim, layer.head_dim),
            ("the rotation of RoPE", replace(rotation, halves=halves), layer.rotation),
            ("the norms of queries and keys", "before RoPE" if published.head_norms else "none", layer.head_norms),
            ("hidden_act", published.activation, layer.activation),
        ]
        if isinstance(layer.scores, str):
            pairs.append(("attention", "torchtune's", layer.scores))
        else:
            pairs.append(("the scale of attention", published.attention_scale, layer.scores.scale))
            pairs.append(("attn_logit_softcapping", published.attention_cap, layer.scores.cap))
    for norm in built.norms:
        if isinstance(norm, str):
            pairs.append(("the norm", "RMSNorm", norm))
        else:
            pairs.append(("rms_norm_eps", published.rms_norm_eps, norm.eps))
            pairs.append(("the scale of norms", words[published.one_plus_weight], words[norm.one_plus_weight]))
    pairs += [
        ("the scale of embeddings", published.embedding_scale, built.embedding_scale),
        ("final_logit_softcapping", published.logit_cap, built.logit_cap),
        ("tie_word_embeddings", published.tie_word_embeddings, built.tied),
    ]
    own = [layer.window for layer in built.layers]
    if any(layer.has_windows for layer in built.layers) and len(own) == len(published.windows):
        pairs.append(("sliding_window", _windows_said(published.windows), _windows_said(own)))
    unlike = [Difference(*pair) for pair in pairs if not _alike(*pair[1:])]
    yield from {str(difference): difference for difference in unlike}.values()


def check_function(
    model: Decoder, published: Published, builder: Mapping[str, Any], model_type: str | None = None
) -> None:
    """Raises ConfigError if a model computes another function than its checkpoint's config.json describes.

    Args:
        model (Decoder): the model, possibly on the meta device.
        published (Published): the content of config.json.
        builder (Mapping[str, Any]): the config's ``model``: ``_component_`` and its arguments, for the message.
        model_type (str | None): the checkpointer's model_type; None if it does not convert from the Hugging Face
            format.

    Raises:
        ConfigError: with every difference, both values, and the builder that fits.
    """
    found = list(differences(measure(model), published, model_type))
    if found:
        raise ConfigError(
            f"checkpointer.checkpoint_dir: {published.path.parent} has another architecture than model "
            f"({builder.get('_component_')}): {'; '.join(map(str, found))}; {remedy(published, builder, model_type)}"
        )


def set_windows(model: TransformerDecoder, published: Published) -> None:
    """Adds the sliding windows of config.json to torchtune's attention, which has none.

    :class:`LogProbDecoder` and sampling make a mask for each window that a layer has.
    """
    for layer, window in zip(model.layers, published.windows, strict=False):
        if window is not None and not hasattr(layer.attn, "sliding_window"):
            layer.attn.sliding_window = window


def remedy(published: Published, builder: Mapping[str, Any], model_type: str | None) -> str:
    """Returns the settings for a model that computes config.json's function; each builder in it has been tried."""
    name = str(builder.get("_component_"))
    prefix = next((prefix for prefix in ("qlora_", "lora_") if name.rpartition(".")[2].startswith(prefix)), "")
    wanted = None if model_type is None else _model_types(published.model_type, model_type)
    if wanted is not None:
        return f"set checkpointer.model_type: {wanted}"
    if fitting := [_with_prefix(path, prefix) for path in fitting_builders(published)]:
        return f"set model._component_: {' or '.join(fitting)}"
    for path in _COMPONENTS[published.model_type]:
        arguments = _arguments(path, published)
        if _fits(path, published, arguments):
            path = _with_prefix(path, prefix)
            same = path == name
            changed = {key: value for key, value in arguments.items() if not same or builder.get(key) != value}
            words = ", ".join(f"model.{key}: {_said(value, plain=True)}" for key, value in changed.items())
            return f"set {words}" if same else f"set model._component_: {path}, {words}"
    return "no builder of torchtune or humanline computes this function"


def fitting_builders(published: Published) -> list[str]:
    """Returns the builders of fixed size in torchtune and humanline that compute config.json's function."""
    found = []
    for module in (f"torchtune.models.{name}" for name in _BUILDERS[published.model_type]):
        names = [name for name in import_module(module).__all__ if "lora" not in name and "reward" not in name]
        found += [f"{module}.{name}" for name in names if _fits(f"{module}.{name}", published, {})]
    for module, own in _OWN_BUILDERS.get(published.model_type, {}).items():
        found += [f"{module}.{name}" for name in own if _fits(f"{module}.{name}", published, {})]
    return found


def _fits(path: str, published: Published, arguments: Mapping[str, Any]) -> bool:
    module, _, name = path.rpartition(".")
    try:
        with torch.device("meta"):
            model = getattr(import_module(module), name)(**arguments)
    except (TypeError, AttributeError, ValueError):  # not a builder, or a builder with required arguments
        return False
    if not isinstance(model, TransformerDecoder) or not hasattr(model.layers[0].mlp, "w2"):
        return False
    built = {
        "hidden_size": model.tok_embeddings.embedding_dim,
        "vocab_size": model.tok_embeddings.num_embeddings,
        "num_hidden_layers": len(model.layers),
        "intermediate_size": model.layers[0].mlp.w2.in_features,
    }
    return built == dict(published.sizes) and next(differences(measure(model), published), None) is None


def _arguments(path: str, published: Published) -> dict[str, Any]:
    """Returns config.json's values for the arguments that a builder of any size has."""
    sizes, rope = published.sizes, published.rope
    arguments = {
        "vocab_size": sizes["vocab_size"],
        "num_layers": sizes["num_hidden_layers"],
        "num_heads": published.num_attention_heads,
        "num_kv_heads": published.num_key_value_heads,
        "head_dim": published.head_dim,
        "embed_dim": sizes["hidden_size"],
        "intermediate_dim": sizes["intermediate_size"],
        "max_seq_len": published.max_position_embeddings,
        "norm_eps": published.rms_norm_eps,
        "rope_base": rope["rope_theta"],
        "scale_factor": rope.get("factor", 1) if rope["rope_type"] == "llama3" else 1,
        "local_rope_base": published.local_rope["rope_theta"],
        "rope_factor": rope.get("factor", 1) if rope["rope_type"] == "linear" else 1,
        "sliding_window_pattern": published.windows.index(None) + 1 if None in published.windows else None,
        "tie_word_embeddings": published.tie_word_embeddings,
        "query_pre_attn_scalar": round(published.attention_scale**-2),
        "sliding_window_size": next(filter(None, published.windows), None),
    }
    module, _, name = path.rpartition(".")
    # humanline's Gemma 2 passes its arguments on to torchtune's
    build = gemma2 if published.model_type == "gemma2" else getattr(import_module(module), name)
    taken = inspect.signature(build).parameters
    return {key: _whole(value) for key, value in arguments.items() if key in taken}


def _with_prefix(path: str, prefix: str) -> str:
    """Returns the builder of the same model with an adapter, if there is one."""
    module, _, name = path.rpartition(".")
    return f"{module}.{prefix}{name}" if hasattr(import_module(module), prefix + name) else path


def _model_types(family: str, given: str) -> str | None:
    """Returns the checkpointer's model_type for a family; None if the given one has the same row layout."""
    right = {
        "qwen2": "QWEN2",
        "qwen3": "QWEN3",
        "phi3": "PHI3_MINI",
        "gemma": "GEMMA",
        "gemma2": "GEMMA2",
        "gemma3_text": "GEMMA3",
        "mistral": "MISTRAL",
    }
    wanted = right.get(family, "LLAMA3")
    return wanted if (wanted in _IN_HALVES) != (given in _IN_HALVES) else None


def _per_layer(values: tuple[Any, ...], layers: int) -> tuple[Any, ...]:
    """Returns one value per layer of the model; the number of layers is checked with the weights."""
    return (*values, *values[-1:] * layers)[:layers]


def _alike(expected: object, found: object) -> bool:
    if isinstance(expected, Rotation) and isinstance(found, Rotation):
        return expected.like(found)
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(expected, found, rel_tol=1e-3)
    return expected == found


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _said(value: object, plain: bool = False) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    return str(value)


def _windows_said(windows: Sequence[int | None]) -> str:
    """Describes the windows in words, with the layers if they differ."""
    if len(set(windows)) == 1:
        return _said(windows[0])
    sliding = [str(layer) for layer, window in enumerate(windows) if window is not None]
    return f"{sorted(set(filter(None, windows)))} on layers {', '.join(sliding)}"
