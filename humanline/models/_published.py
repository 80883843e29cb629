"""The function described by a checkpoint's config.json, in the quantities that are measured on a built model.

transformers defines the meaning of keys: the defaults of each family, and the two forms of rotary positions
(``rope_theta`` with ``rope_scaling``, and ``rope_parameters``).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from humanline.errors import ConfigError
from humanline.models._family_defaults import FAMILY_DEFAULTS
from humanline.models._rotation import Rotation, llama3_frequencies, yarn

FAMILIES = tuple(FAMILY_DEFAULTS)

_NUMBERS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")

# Keys that affect the function in some model. If the family does not read such a key, its value must be neutral.
_OF_THE_FUNCTION = re.compile(
    r"scal|multipl|capping|norm|rope|rotary|theta|window|attn|attention|bias|_act$|^act|activation|alibi|moe|expert"
    r"|router|qk_|residual|parallel|mask|causal|bidirection|mup|position|quant|embed|logit|pool|layer|skip|nope"
)
# Keys that match it but do not change the function: weights' shapes and names, training or a kernel decide them.
_HARMLESS = re.compile(
    r"attention_bias|mlp_bias|num_(hidden_layers|key_value_heads|attention_heads)|hidden_size|\w*(dropout|pdrop)"
    r"|_?attn_implementation\w*|_?experts_implementation\w*|use_flash_attn|_?flash_attn\w*|\w*flash_attention\w*"
    r"|output_(attentions|hidden_states|router_logits|scores)|num_logits_to_keep|logits_to_keep|initializer_range"
    r"|prefix|(begin_)?suppress_tokens|forced_\w+|use_cache|\w*_token_id|return_dict\w*|_name_or_path|pretraining_tp"
    r"|transformers_version|(torch_)?dtype|is_llama_config|unsloth\w*|task_specific_params|\w*id2label|\w*label2id"
    r"|is_(encoder_)?decoder|transformers\.js_config|_commit_hash|chunk_size_feed_forward|cache_implementation"
)

# Keys beside a vision_config that do not concern the text model.
_OF_IMAGES = re.compile(r"vision_config|mm_tokens_per_image|(boi|eoi|image)_token_(index|id)")

# Names under which files repeat a value that their family reads under another name, as Gemma 2 9B's does.
_SECOND_NAMES = {"sliding_window_size": "sliding_window"}

_ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"},
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """The function described by a config.json.

    Attributes:
        path (Path): the file.
        model_type (str): the family, one of ``FAMILIES``.
        sizes (Mapping[str, int]): layers, widths and vocabulary, by the file's own names.
        rotations (tuple[Rotation, ...]): rotation of each layer.
        windows (tuple[int | None, ...]): number of positions that a token of each layer attends to, itself included;
            None without a sliding window.
        attention_scale (float): scale of the products of queries and keys.
        attention_cap (float | None): soft-cap of attention's scores; None if there is none.
        logit_cap (float | None): soft-cap of the logits; None if there is none.
        embedding_scale (float): factor of the embeddings.
        one_plus_weight (bool): whether norms scale by ``1 + weight`` instead of ``weight``.
        head_norms (bool): whether queries and keys are normed, before RoPE.
        activation (str): activation of the MLP.
        rope (Mapping[str, Any]): parameters of RoPE in layers without a sliding window.
        local_rope (Mapping[str, Any]): parameters of RoPE in layers with one.
        scaled (bool): whether rotary positions are scaled.
        remarks (tuple[str, ...]): messages about ignored keys, to be logged.
    """

    path: Path
    model_type: str
    sizes: Mapping[str, int]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rotations: tuple[Rotation, ...]
    windows: tuple[int | None, ...]
    attention_scale: float
    attention_cap: float | None
    logit_cap: float | None
    embedding_scale: float
    one_plus_weight: bool
    head_norms: bool
    activation: str
    tie_word_embeddings: bool
    rope: Mapping[str, Any]  # of layers without a window
    local_rope: Mapping[str, Any]  # of those with one
    max_position_embeddings: int
    scaled: bool
    remarks: tuple[str, ...]


def read_published(checkpoint_dir: str | Path, max_seq_len: int) -> Published | None:
    """Reads a checkpoint's config.json; returns None if there is none.

    Args:
        checkpoint_dir (str | Path): the checkpoint's folder.
        max_seq_len (int): longest sequence of the built model, tokens; scaled positions may depend on it.

    Raises:
        ConfigError: if the file cannot be read, has an unknown family, or has a key that changes the function in an
            unknown way.
    """
    path = Path(checkpoint_dir) / "config.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"checkpointer.checkpoint_dir: {path} cannot be read as JSON ({error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"checkpointer.checkpoint_dir: {path}: expected an object, got {type(content).__name__}")
    for key in ("text_config", "quantization_config"):
        if not isinstance(content.get(key) or {}, dict):
            raise ConfigError(
                f"checkpointer.checkpoint_dir: {path}: {key}: expected an object, got {content[key]!r}; download the "
                "file again"
            )
    content |= content.pop("text_config", None) or {}
    family = content.get("model_type")
    if not isinstance(family, str) or family not in FAMILY_DEFAULTS:
        raise ConfigError(
            f"checkpointer.checkpoint_dir: {path} has model_type {family!r}, which no builder of torchtune or "
            f"humanline is known to compute; expected one of {', '.join(FAMILIES)}"
        )
    return _Reader(path, family, content, max_seq_len).published()


class _Reader:
    """Reads one config.json of a known family."""

    def __init__(self, path: Path, family: str, content: dict[str, Any], max_seq_len: int) -> None:
        self.path, self.family, self.content, self.max_seq_len = path, family, content, max_seq_len
        self.defaults = FAMILY_DEFAULTS[family]

    def published(self) -> Published:
        remarks = self._check_keys()
        sizes = {key: self._whole(key) for key in _NUMBERS}
        heads = sizes.pop("num_attention_heads")
        kv_heads = heads if self._value("num_key_value_heads") is None else self._whole("num_key_value_heads")
        head_dim = sizes["hidden_size"] // heads if self._value("head_dim") is None else self._whole("head_dim")
        if self._value("head_dim") is None and sizes["hidden_size"] % heads:
            raise self._error("hidden_size", f"expected a multiple of {heads} heads, got {sizes['hidden_size']}")
        gemma = self.family in ("gemma", "gemma2", "gemma3_text")
        layer_types = self._layer_types(sizes["num_hidden_layers"])
        ropes = [self._rope(layer_type) for layer_type in layer_types]
        by_rope = {str(rope): self._rotation(rope, head_dim) for rope in ropes}
        scalar = head_dim if self._value("query_pre_attn_scalar") is None else self._number("query_pre_attn_scalar")
        rope, local_rope = (
            next((rope for rope, kind in zip(ropes, layer_types, strict=True) if kind == each), ropes[0])
            for each in ("full_attention", "sliding_attention")
        )
        return Published(
            path=self.path,
            model_type=self.family,
            sizes=sizes,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self._number("rms_norm_eps"),
            rotations=tuple(by_rope[str(rope)] for rope in ropes),
            windows=self._windows(layer_types),
            attention_scale=scalar**-0.5,
            attention_cap=self._cap("attn_logit_softcapping"),
            logit_cap=self._cap("final_logit_softcapping"),
            embedding_scale=sizes["hidden_size"] ** 0.5 if gemma else 1.0,
            one_plus_weight=gemma,
            head_norms=self.family in ("qwen3", "gemma3_text"),
            activation=self._activation(),
            tie_word_embeddings=bool(self._value("tie_word_embeddings")),
            rope=rope,
            local_rope=local_rope,
            max_position_embeddings=self._number("max_position_embeddings"),
            scaled=any(rope["rope_type"] != "default" for rope in ropes)
            or bool(self._value("rope_scaling") and self._value("rope_parameters")),
            remarks=remarks,
        )

    def _error(self, key: str, found: str) -> ConfigError:
        return ConfigError(f"checkpointer.checkpoint_dir: {self.path}: {key}: {found}")

    def _value(self, key: str) -> Any:
        return self.content.get(key, self.defaults.get(key))

    def _number(self, key: str) -> Any:
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._error(key, f"expected a number above 0, got {value!r}")
        return value

    def _whole(self, key: str) -> int:
        number = self._number(key)
        if number != int(number):
            raise self._error(key, f"expected a whole number, got {number!r}")
        return int(number)

    def _cap(self, key: str) -> float | None:
        return None if self._value(key) is None else float(self._number(key))

    def _check_keys(self) -> tuple[str, ...]:
        """Raises ConfigError for unknown keys that change the function; returns remarks about other unknown keys."""
        if self.content.get("quantization_config"):
            method = self.content["quantization_config"].get("quant_method", "some method")
            raise self._error(
                "quantization_config", f"the weights are quantised ({method}); use a checkpoint that is not"
            )
        known = {*self.defaults, *_NUMBERS, "model_type", "architectures", "auto_map", "quantization_config"}
        unknown = {key: value for key, value in self.content.items() if key not in known and not _is_neutral(value)}
        harmless = [_HARMLESS, *([_OF_IMAGES] if self.content.get("vision_config") else [])]
        unknown = {key: each for key, each in unknown.items() if not any(one.fullmatch(key) for one in harmless)}
        for key, name in _SECOND_NAMES.items():
            if key in unknown and unknown[key] == self._value(name):
                del unknown[key]
        for key, value in unknown.items():
            if _OF_THE_FUNCTION.search(key):
                raise self._error(
                    key,
                    f"{json.dumps(value)[:80]} changes what the model computes, but transformers' {self.family} does "
                    "not read this key and no builder supports it. Remove the key if the weights are of a plain "
                    f"{self.family}",
                )
        remarks = []
        if self.content.get("vision_config"):
            remarks.append(f"{self.path}: of its parts the text model trains; the others stay as they are")
        if self.content.get("auto_map"):
            remarks.append(f"{self.path}: auto_map: its code is not run; the model is transformers' {self.family}")
        if unknown:
            remarks.append(f"{self.path}: unknown keys, assumed not to change the function: {', '.join(unknown)}")
        return tuple(remarks)

    def _activation(self) -> str:
        # Early Gemma files say gelu but mean its approximation, as transformers does.
        name = self._value("hidden_activation") or self._value("hidden_act")
        if not isinstance(name, str):
            raise self._error("hidden_act", f"expected the name of an activation, got {name!r}")
        if self.family == "gemma" and name == "gelu":
            name = "gelu_pytorch_tanh"
        return _ACTIVATIONS.get(name, name)

    def _layer_types(self, layers: int) -> list[str]:
        window = self._value("sliding_window")
        qwen = self.family in ("qwen2", "qwen3")
        if window is None or (qwen and not self._value("use_sliding_window")):
            sliding = [False] * layers
        elif self.family in ("gemma2", "gemma3_text"):
            pattern = self._whole("sliding_window_pattern") if self.family == "gemma3_text" else 2
            sliding = [(layer + 1) % pattern > 0 for layer in range(layers)]
        else:
            first = self._whole("max_window_layers") if qwen and self._value("max_window_layers") != 0 else 0
            sliding = [layer >= first for layer in range(layers)]
        types = self._value("layer_types") or [("full", "sliding")[each] + "_attention" for each in sliding]
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or not all(each in kinds for each in types):
            raise self._error(
                "layer_types", f"expected full_attention or sliding_attention {layers} times, got {str(types)[:80]}"
            )
        return list(types)

    def _windows(self, layer_types: list[str]) -> tuple[int | None, ...]:
        if "sliding_attention" not in layer_types:
            return (None,) * len(layer_types)
        window = self._whole("sliding_window")
        return tuple(window if each == "sliding_attention" else None for each in layer_types)

    def _rope(self, layer_type: str) -> dict[str, Any]:
        """Returns the parameters of rotary positions, in the form that transformers 5 writes."""
        scaling, parameters = (self._value(key) or {} for key in ("rope_scaling", "rope_parameters"))
        for key, each in (("rope_scaling", scaling), ("rope_parameters", parameters)):
            if not isinstance(each, dict):
                raise self._error(key, f"expected null or an object, got {each!r}")
        given, theta = scaling or parameters, "rope_theta"  # in transformers' order
        if self.family == "gemma3_text":  # parameters per layer type; scaling applies to global layers
            is_local = layer_type == "sliding_attention"
            given = parameters.get(layer_type, {}) | ({} if is_local else scaling)
            theta = "rope_local_base_freq" if is_local else "rope_theta"
        elif layer_type in given:
            given = given[layer_type]
        kind = given.get("rope_type", given.get("type", "default"))
        return {
            "rope_theta": self._number(theta),
            "partial_rotary_factor": self._number("partial_rotary_factor"),
            **{key: value for key, value in given.items() if key != "type"},
            "rope_type": "longrope" if kind == "su" or (kind == "yarn" and self.family == "phi3") else kind,
        }

    def _rotation(self, rope: dict[str, Any], head_dim: int) -> Rotation:
        try:
            return self._scaled(rope, int(head_dim * rope["partial_rotary_factor"]))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            key = "rope_scaling" if self._value("rope_scaling") else "rope_parameters"
            raise self._error(key, f"{rope} cannot be computed ({type(error).__name__}: {error})") from error

    def _scaled(self, rope: dict[str, Any], dim: int) -> Rotation:
        base, kind = float(rope["rope_theta"]), rope["rope_type"]
        plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        length = rope.get("original_max_position_embeddings") or self._value("original_max_position_embeddings")
        limit = self._number("max_position_embeddings")
        if kind == "default":
            return Rotation(plain)
        if kind == "linear":
            return Rotation(plain / rope["factor"])
        if kind == "llama3":
            return Rotation(llama3_frequencies(plain, rope, length or limit))
        if kind == "yarn":
            return yarn(plain, base, rope, length or limit)
        if kind == "dynamic":
            self._check_length(kind, limit)
            return Rotation(plain)
        if kind == "longrope":
            length = length or limit
            self._check_length(kind, length)
            ratio = rope.get("factor") or limit / length
            factor = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(length))
            short = torch.tensor(rope["short_factor"], dtype=torch.float64)
            return Rotation(plain / short, rope.get("attention_factor") or factor)
        raise self._error("rope_scaling", f"rope_type {kind!r} is unknown, and no builder computes it")

    def _check_length(self, kind: str, limit: int) -> None:
        if self.max_seq_len > limit:
            raise self._error(
                "rope_scaling",
                f"rope_type {kind!r} rotates by other angles if a sequence is longer than {limit:,} positions, which "
                f"no builder computes; set model.max_seq_len: {limit} (the model has {self.max_seq_len})",
            )


def _is_neutral(value: Any) -> bool:
    """Whether a key with this value switches something off: absent, off, empty, or a factor of one."""
    return value is None or value is False or value in ("", [], {}) or (type(value) in (int, float) and value in (0, 1))
