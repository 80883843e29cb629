"""Loads the model of a config, whole and for one device, for the recipes that do not train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import utils
from torchtune.modules import TransformerDecoder

from humanline.checkpoint import (
    build_decoder,
    check_checkpoint_folder,
    code_digest,
    named_files,
    read_decoder_weights,
    rounding_on_load,
)
from humanline.errors import ConfigError
from humanline.models import adapter_modules, load_decoder

log = utils.get_logger("INFO")

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def whole_model(
    cfg: DictConfig, device: torch.device, dtype: torch.dtype, check: Callable[[TransformerDecoder], None]
) -> TransformerDecoder:
    """Loads the model of a config, in evaluation mode.

    Args:
        cfg (DictConfig): the whole config, of which ``model`` and ``checkpointer`` are read.
        device (torch.device): device of the weights.
        dtype (torch.dtype): dtype of the weights.
        check (Callable[[TransformerDecoder], None]): compares the model, without its weights, with the data.

    Raises:
        ConfigError: if files are missing, or the model has an adapter or does not match the weights.
    """
    check_checkpoint_folder(cfg)
    with torch.device("meta"):
        model = build_decoder(cfg)
    if adapter_modules(model):
        raise ConfigError(
            f"model: {cfg.model._component_} builds a model with an adapter, but this recipe needs whole weights; use "
            "the builder without lora_ or qlora_, and in checkpointer a folder with the adapter merged "
            "(save_adapter_weights_only: False)"
        )
    check(model)
    _, weights = read_decoder_weights(cfg, model)
    if warning := rounding_on_load(cfg, weights, "dtype", dtype):
        log.warning(warning)
    return load_decoder(model, weights, device=device, dtype=dtype)


def model_sources(cfg: DictConfig) -> list[Any]:
    """Returns what the output of a config's model depends on: settings, code, weights and config.json."""
    return [
        *(OmegaConf.to_container(cfg[key], resolve=True) for key in ("model", "checkpointer")),
        [file for file in named_files(cfg.checkpointer.checkpoint_dir) if _decides(Path(file[0]))],
        code_digest(cfg.model._component_),
    ]


def _decides(file: Path) -> bool:
    return file.suffix in _WEIGHTS or file.name == "config.json"
