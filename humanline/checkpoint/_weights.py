import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import training, utils
from torchtune.modules import TransformerDecoder
from torchtune.training import ModelType

from humanline.checkpoint._provenance import named_files
from humanline.config import component
from humanline.errors import ConfigError
from humanline.models import (
    Published,
    check_architecture,
    check_arguments,
    check_function,
    drop_tied_output,
    read_published,
    second_opinion,
    set_windows,
)
from humanline.torchtune_seam.internals import checkpoint_files, hf_files, safe_torch_load

log = utils.get_logger("INFO")

_HEAD = "lm_head.weight"
_ANNOUNCED = 2e9  # bytes of weights: reading more takes long enough to say so
OWN_MODEL_TYPES = {"qwen3": "QWEN3", "gemma3_text": "GEMMA3"}
"""config.json's model_type -> the checkpointer's, for families that torchtune 0.6.1 does not have."""


def build_decoder(cfg: DictConfig) -> TransformerDecoder:
    """Builds ``cfg.model`` with the sliding windows of its checkpoint's config.json.

    Raises:
        ConfigError: if it is no text model, an argument has no effect, or config.json describes an unknown model.
    """
    model = component(cfg, "model")
    if not isinstance(model, TransformerDecoder):
        raise ConfigError(
            f"model._component_: {cfg.model._component_} builds a {type(model).__name__}, expected a "
            "TransformerDecoder; name a builder of a text model, such as those of docs/models.md"
        )
    check_arguments(model, cfg.model)
    if (published := read_published(cfg.checkpointer.get("checkpoint_dir") or "", model.max_seq_len)) is not None:
        set_windows(model, published)
    return model


def read_decoder_weights(cfg: DictConfig, model: TransformerDecoder) -> tuple[Any, dict[str, Tensor]]:
    """Reads the weights of ``cfg.checkpointer`` and checks that they fit a model.

    Args:
        cfg (DictConfig): the config. Its ``model`` and ``checkpointer`` are used.
        model (TransformerDecoder): the model from :func:`build_decoder`, without memory.

    Returns:
        tuple[Any, dict[str, Tensor]]: the result of :func:`read_weights`.

    Raises:
        ConfigError: if the model does not compute the function of config.json, or does not fit the weights.
    """
    folder = cfg.checkpointer.get("checkpoint_dir") or ""
    is_hf = "HF" in str(cfg.checkpointer.get("_component_"))
    remarks = []
    if (published := read_published(folder, model.max_seq_len)) is not None:
        if is_hf:
            _check_checkpointer(cfg, published)
        check_function(model, published, cfg.model, cfg.checkpointer.get("model_type") if is_hf else None)
        remarks = [*published.remarks, second_opinion(published)]
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    size = sum(size for _, size, _ in named_files(str(folder)))
    if is_first and size > _ANNOUNCED:
        log.info(f"{folder}: reading the weights; it holds {size / 1e9:.1f} GB")
    checkpointer, weights = read_weights(cfg)
    _leave_out(checkpointer, "rotary_emb.inv_freq")  # tables in Llama 2's files, which are computed here
    if published is None:
        remarks.append(f"{folder} has no config.json, so the model's function was not checked against it")
    if drop_tied_output(model, weights, _left_out_head(checkpointer, weights), folder):
        remarks.append(f"{folder}: left out {_HEAD}, a copy of the embeddings that the model ties")
        _leave_out(checkpointer, _HEAD)
    check_architecture(model, weights, folder)
    if is_first:
        for remark in filter(None, remarks):
            log.info(remark)
    return checkpointer, weights


def _check_checkpointer(cfg: DictConfig, published: Published) -> None:
    """Raises an error if the checkpointer has no names for the weights of config.json's family."""
    given, path = cfg.checkpointer.get("model_type"), str(cfg.checkpointer.get("_component_"))
    wanted = OWN_MODEL_TYPES.get(published.model_type)
    is_known = given == wanted and (hasattr(ModelType, given) or not path.startswith("torchtune."))
    if wanted is None and given in OWN_MODEL_TYPES.values():
        raise ConfigError(
            f"checkpointer.model_type: {given} is of another family than {published.path}, a {published.model_type}; "
            "set the model_type of that family, see docs/models.md"
        )
    if wanted is not None and not is_known:
        raise ConfigError(
            f"checkpointer: {path} with model_type {given} has no names for the weights of a {published.model_type}; "
            f"set checkpointer._component_: humanline.checkpoint.FullModelHFCheckpointer and "
            f"checkpointer.model_type: {wanted}"
        )


def _leave_out(checkpointer: Any, ending: str) -> None:
    """Removes names from the map that the final weights are written by."""
    files = hf_files(checkpointer)
    for name in [name for name in files if name.endswith(ending)]:
        del files[name]


def _left_out_head(checkpointer: Any, weights: dict[str, Tensor]) -> Tensor | None:
    """Returns the files' output layer if torchtune's conversion drops it (Qwen2, if config.json ties it), else None."""
    if _HEAD not in hf_files(checkpointer) or "output.weight" in weights:
        return None
    files = (safe_torch_load(path) for path in checkpoint_files(checkpointer))
    return next((file[_HEAD] for file in files if _HEAD in file), None)


def read_weights(cfg: DictConfig) -> tuple[Any, dict[str, Tensor]]:
    """Reads the weights of ``cfg.checkpointer`` in torchtune's names, memory-mapped if the format allows it.

    Returns:
        tuple[Any, dict[str, Tensor]]: the checkpointer, which also writes the final weights, and the state dict.

    Raises:
        ConfigError: if files are missing or cannot be converted.
    """
    where = f"checkpointer: {cfg.checkpointer.get('checkpoint_dir')}"
    try:
        checkpointer = component(cfg, "checkpointer")
        return checkpointer, checkpointer.load_checkpoint()[training.MODEL_KEY]
    except (ConfigError, OSError) as error:
        missing = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(missing, OSError):
            raise
        raise ConfigError(
            f"{where}: {missing}; download the model to this folder (tune download), or correct the path"
        ) from error
    except Exception as error:  # torchtune raises a bare Exception for a weight without a known name
        raise ConfigError(
            f"{where}: cannot read the weights as {cfg.checkpointer.get('model_type')}: {' '.join(str(error).split())}"
        ) from error


def sampled_digest(weights: dict[str, Tensor]) -> str:
    """Returns a digest of a few numbers of each weight. It distinguishes checkpoints without a full read."""
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        whole = weights[name]
        flat = whole.view(-1) if whole.is_contiguous() else whole[0].reshape(-1)
        numbers = flat[:: max(1, len(flat) // 16)].contiguous().view(torch.uint8)
        total.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode() + numbers.numpy().tobytes())
    return total.hexdigest()


def rounding_on_load(cfg: DictConfig, weights: Mapping[str, Tensor], key: str, dtype: torch.dtype) -> str | None:
    """Returns a warning if weights lose digits in ``dtype``, which the config's ``key`` sets; None otherwise."""
    rounded = [each.dtype for each in weights.values() if torch.promote_types(each.dtype, dtype) != dtype]
    if not rounded:
        return None
    theirs, ours = (str(each).removeprefix("torch.") for each in (rounded[0], dtype))
    return (
        f"{key}: {len(rounded)} weights of {cfg.checkpointer.checkpoint_dir} are rounded from {theirs} to {ours}, "
        f"which can lose a small update from earlier training; set {key}: fp32 to keep it"
    )


def fingerprint(weights: dict[str, Tensor], model: DictConfig, dtype: str) -> str:
    """Returns a digest of the weights, the model's config and its compute dtype, the same on all ranks; a collective.

    It does not cover the code; see :func:`~humanline.checkpoint._provenance.code_digest`.

    Args:
        weights (dict[str, Tensor]): the full state dict.
        model (DictConfig): the builder and its arguments.
        dtype (str): the model's compute dtype.
    """
    digest = [""]
    if dist.get_rank() == 0:
        total = hashlib.blake2b(f"{OmegaConf.to_container(model, resolve=True)} {dtype}".encode(), digest_size=16)
        for name in sorted(weights):
            total.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
            total.update(weights[name].contiguous().view(-1).view(torch.uint8).numpy().data)
        digest = [total.hexdigest()]
    dist.broadcast_object_list(digest)
    return digest[0]
