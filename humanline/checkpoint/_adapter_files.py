"""Reads and writes adapters in torchtune's format and in PEFT's.

torchtune's own export permutes the query and key rows of every model like Llama's, and does not permute DoRA's
magnitudes. PEFT then computes another function for Qwen2.5 and for DoRA. Here an adapter's rows move with the rows of
the base weight: they pass through the checkpoint's own conversion, as columns of that weight.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchtune import utils
from torchtune.models import convert_weights
from torchtune.modules.peft import DoRALinear

from humanline.checkpoint._fused_layers import fuse, patterns, split
from humanline.errors import ConfigError
from humanline.models import adapter_modules, rank_and_alpha
from humanline.torchtune_seam.hf_checkpointer import GEMMA3_FROM_HF, QWEN3_FROM_HF
from humanline.torchtune_seam.internals import (
    GEMMA2_FROM_HF,
    LLAMA_FROM_HF,
    PHI3_FROM_HF,
    QWEN2_FROM_HF,
    checkpoint_dir,
    gemma2_hf_to_tune,
    gemma2_tune_to_hf,
    hf_config,
    model_type,
)

log = utils.get_logger("INFO")

Weights = dict[str, Tensor]

Convert = Callable[..., Weights]


class Family(NamedTuple):
    """The names and the layout of a family's weights in the Hugging Face format."""

    names: dict[str, str]  # HF name -> torchtune name
    to_hf: Convert | None = None  # None if rows keep their order
    from_hf: Convert | None = None
    is_fused: bool = False  # see _fused_layers


LLAMA = Family(LLAMA_FROM_HF, convert_weights.tune_to_hf, convert_weights.hf_to_tune)
QWEN2 = Family(QWEN2_FROM_HF)
QWEN3 = Family(QWEN3_FROM_HF)
GEMMA3 = Family(GEMMA3_FROM_HF)
GEMMA2 = Family(GEMMA2_FROM_HF, gemma2_tune_to_hf, gemma2_hf_to_tune)
PHI3 = Family(PHI3_FROM_HF, is_fused=True)
FAMILIES = {
    "LLAMA2": LLAMA,
    "LLAMA3": LLAMA,
    "LLAMA3_2": LLAMA,
    "MISTRAL": LLAMA,
    "QWEN2": QWEN2,
    "QWEN3": QWEN3,
    "GEMMA": LLAMA,
    "GEMMA2": GEMMA2,
    "GEMMA3": GEMMA3,
    "PHI3_MINI": PHI3,
    "PHI4": PHI3,
}
TORCHTUNE_FILE, PEFT_FILE, PEFT_CONFIG = "adapter_model.pt", "adapter_model.safetensors", "adapter_config.json"
# Keys of PEFT's config that change the function of the same weights, and initializations that keep the base weights.
OTHER_FUNCTIONS = ("use_rslora", "alpha_pattern", "layer_replication", "alora_invocation_tokens")
KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
PEFT_NAMES = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def write_adapter(folder: Path, adapter: Weights, model: nn.Module, checkpointer: Any) -> None:
    """Writes an adapter in torchtune's format, and in PEFT's if the base is an HF checkpoint of a known family.

    Args:
        folder (Path): the destination.
        adapter (Weights): the full adapter on the host, in torchtune's names.
        model (nn.Module): the model with the adapter, for its shape.
        checkpointer (Any): torchtune's checkpointer of the base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(adapter, folder / TORCHTUNE_FILE)
    if (family := _family(checkpointer)) is None:
        return
    hf_names = {ours: theirs for theirs, ours in family.names.items()}
    peft = {}
    whole = fuse(adapter, model) if family.is_fused else adapter
    if whole is None:
        log.warning(f"{folder}: written in torchtune's format alone: PEFT has no DoRA on a part of a fused layer")
        return
    for name, tensor in whole.items():
        base, kind = _split(name, PEFT_NAMES)
        layer = convert_weights.get_mapped_key(f"{base}.weight", hf_names).removesuffix(".weight")
        # The rows of lora_a belong to the rank and do not move.
        moved = tensor if kind == "lora_a.weight" else _moved(family.to_hf, f"{base}.weight", tensor, checkpointer)
        layer = layer.replace("model.", _text_model(checkpointer), 1)
        peft[f"base_model.model.{layer}.{PEFT_NAMES[kind]}"] = moved.contiguous()
    save_file(peft, folder / PEFT_FILE, metadata={"format": "pt"})
    (folder / PEFT_CONFIG).write_text(json.dumps(_peft_config(model, peft, checkpointer), indent=2) + "\n")


def read_adapter(path: str, model: nn.Module, checkpointer: Any) -> Weights:
    """Reads an adapter in torchtune's or PEFT's format. Returns it in torchtune's names.

    Args:
        path (str): an ``adapter_model.pt``, PEFT's ``adapter_model.safetensors``, or a folder that holds one of them.
        model (nn.Module): the model that gets the adapter.
        checkpointer (Any): torchtune's checkpointer of the base model.

    Raises:
        ConfigError: if the adapter cannot be read, or its rank, layers or alpha differ from the model's. Only
            ``adapter_config.json`` names the alpha.
    """
    where = Path(path)
    # torchtune's file first: if torchtune wrote both formats, its PEFT file computes another function for Qwen2.
    candidates = [where / TORCHTUNE_FILE, where / PEFT_FILE] if where.is_dir() else [where]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ConfigError(
            f"adapter: expected {TORCHTUNE_FILE} or {PEFT_FILE} in {path}, found neither; correct the path"
        )
    try:
        _check_config(file, model, checkpointer)
        if file.suffix == ".safetensors":
            adapter = _read_peft(file, model, checkpointer)
        else:
            adapter = torch.load(file, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # a file that is not an adapter can raise anything
        raise ConfigError(f"adapter: {file} cannot be read as an adapter: {' '.join(str(error).split())}") from error
    _check_shapes(adapter, model, path)
    return adapter


def _check_config(file: Path, model: nn.Module, checkpointer: Any) -> None:
    """Compares ``adapter_config.json``, which is the same in both formats, with the model."""
    path = file.with_name(PEFT_CONFIG)
    if not path.is_file():
        if file.suffix == ".safetensors":
            raise ConfigError(f"adapter: {path} is missing; PEFT's format needs this file beside {file.name}")
        return
    config = json.loads(path.read_text())
    for module in adapter_modules(model).values():
        rank, alpha = rank_and_alpha(module)
        for key, theirs, ours in (("lora_rank", config["r"], rank), ("lora_alpha", config["lora_alpha"], alpha)):
            if theirs != ours:
                raise ConfigError(
                    f"adapter: {path} has {key} {theirs}, the model has {ours}; set model.{key}: {theirs}"
                )
    family = _family(checkpointer)
    fused = patterns(model) if family is not None and family.is_fused else {}
    for key in OTHER_FUNCTIONS:
        if config.get(key) and config[key] != fused.get(key):
            raise ConfigError(
                f"adapter: {path} has {key}, expected a plain LoRA or DoRA; use an adapter trained without {key}"
            )
    if config.get("init_lora_weights", True) not in KEEP_THE_BASE:
        raise ConfigError(
            f"adapter: {path} has init_lora_weights {config['init_lora_weights']}, which also changes the base; "
            "convert it to a plain LoRA with PEFT first (save_pretrained's path_initial_model_for_weight_conversion)"
        )


def _read_peft(file: Path, model: nn.Module, checkpointer: Any) -> Weights:
    if (family := _family(checkpointer)) is None:
        raise ConfigError(
            f"adapter: {file} is in PEFT's format, which needs a Hugging Face checkpoint of Llama, Mistral, Qwen, "
            "Gemma or Phi in checkpointer; use an adapter in torchtune's format"
        )
    kinds = {theirs: ours for ours, theirs in PEFT_NAMES.items()}
    adapter = {}
    for name, tensor in load_file(file).items():
        layer, kind = _split(name.removeprefix("base_model.model."), kinds)
        layer = layer.replace(_text_model(checkpointer), "model.", 1)
        base = convert_weights.get_mapped_key(f"{layer}.weight", family.names).removesuffix(".weight")
        moved = tensor if kind == "lora_A.weight" else _moved(family.from_hf, f"{layer}.weight", tensor, checkpointer)
        adapter[f"{base}.{kinds[kind]}"] = moved
    return split(adapter, model, str(file)) if family.is_fused else adapter


def _check_shapes(adapter: Weights, model: nn.Module, path: str) -> None:
    wanted = {
        f"{prefix}.{name}": tuple(parameter.shape)
        for prefix, module in adapter_modules(model).items()
        for name, parameter in module.named_parameters()
        if name in module.adapter_params()
    }
    found = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"adapter: {path} does not fit model: {name} is {found.get(name, 'absent')} in the file and "
                f"{wanted.get(name, 'absent')} in the model; use the same rank and layers in both"
            )


def _family(checkpointer: Any) -> Family | None:
    return None if hf_config(checkpointer) is None else FAMILIES.get(model_type(checkpointer))


def _text_model(checkpointer: Any) -> str:
    """Returns the start of transformers' names of the text model's layers, which may be a part of a larger model."""
    return "model.language_model." if "text_config" in (hf_config(checkpointer) or {}) else "model."


def _moved(convert: Convert | None, name: str, tensor: Tensor, checkpointer: Any) -> Tensor:
    """Returns the adapter's tensor with its rows moved as ``convert`` moves the rows of the base weight ``name``."""
    if convert is None:
        return tensor
    config = hf_config(checkpointer) or {}
    width = config["hidden_size"]
    columns = tensor.view(len(tensor), -1)
    (converted,) = convert(
        {name: F.pad(columns, (0, width - columns.size(1)))},
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        dim=width,
        head_dim=config.get("head_dim"),
    ).values()
    return converted[:, : columns.size(1)].reshape(tensor.shape)


def _split(name: str, kinds: Iterable[str]) -> tuple[str, str]:
    """Splits ``layers.0.attn.q_proj.lora_a.weight`` into ``layers.0.attn.q_proj`` and ``lora_a.weight``."""
    for kind in kinds:
        if name.endswith(f".{kind}"):
            return name.removesuffix(f".{kind}"), kind
    raise ConfigError(f"adapter: expected weights of LoRA or DoRA, found {name}; use an adapter of one of these kinds")


def _peft_config(model: nn.Module, peft: Weights, checkpointer: Any) -> dict[str, Any]:
    layers = adapter_modules(model)
    rank, alpha = rank_and_alpha(next(iter(layers.values())))
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in peft})
    has_images = _text_model(checkpointer) != "model."  # by other layers of the same names
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(checkpointer, "repo_id", None) or str(checkpoint_dir(checkpointer)),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": rf".*language_model.*\.({'|'.join(targets)})" if has_images else targets,
        "use_dora": any(isinstance(module, DoRALinear) for module in layers.values()),
        "bias": "none",
        "inference_mode": True,
        **(patterns(model) if FAMILIES[model_type(checkpointer)].is_fused else {}),
    }
