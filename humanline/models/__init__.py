"""Additions to torchtune's models: log-probs without full logits, checks against checkpoints, SmolLM2, and a correct
Gemma 2.
"""

from humanline.models import gemma2, gemma3, qwen3
from humanline.models._adapter import (
    adapter_modules,
    check_adapter,
    freeze_base,
    has_quantized_base,
    initial_adapter,
    merged_name,
    merged_weight,
    rank_and_alpha,
    trainable_parameters,
)
from humanline.models._build import build_model, design_model, full_state_dict, mesh_of
from humanline.models._check_function import check_function, differences, fitting_builders, set_windows
from humanline.models._load import check_architecture, drop_tied_output, fill_rotary_tables, load_decoder
from humanline.models._log_probs import logits_as_on, token_log_probs, token_log_probs_and_entropy
from humanline.models._lora_arguments import check_arguments
from humanline.models._measure import Built, measure
from humanline.models._policy import LogProbDecoder, fixed_log_probs, log_probs, log_probs_and_entropy
from humanline.models._published import FAMILIES, Published, read_published
from humanline.models._second_opinion import second_opinion
from humanline.models._shard import local_shard
from humanline.models._smollm2 import lora_smollm2_135m, smollm2_135m
from humanline.models._whole_weights import cast_parameters, whole_weights

__all__ = [
    "FAMILIES",
    "Built",
    "LogProbDecoder",
    "Published",
    "adapter_modules",
    "build_model",
    "cast_parameters",
    "check_adapter",
    "check_architecture",
    "check_arguments",
    "check_function",
    "design_model",
    "differences",
    "drop_tied_output",
    "fill_rotary_tables",
    "fitting_builders",
    "fixed_log_probs",
    "freeze_base",
    "full_state_dict",
    "gemma2",
    "gemma3",
    "has_quantized_base",
    "initial_adapter",
    "load_decoder",
    "local_shard",
    "log_probs",
    "log_probs_and_entropy",
    "logits_as_on",
    "lora_smollm2_135m",
    "measure",
    "merged_name",
    "merged_weight",
    "mesh_of",
    "qwen3",
    "rank_and_alpha",
    "read_published",
    "second_opinion",
    "set_windows",
    "smollm2_135m",
    "token_log_probs",
    "token_log_probs_and_entropy",
    "trainable_parameters",
    "whole_weights",
]
