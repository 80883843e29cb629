"""What torchtune's models lack: log-probs without logits, a check of checkpoints, SmolLM2, and a right Gemma 2."""

from humanline.models import gemma2
from humanline.models._adapter import (
    adapter_modules,
    check_adapter,
    freeze_base,
    has_quantized_base,
    initial_adapter,
    merged_name,
    merged_weight,
    trainable_parameters,
)
from humanline.models._load import check_architecture, fill_rotary_tables, load_decoder
from humanline.models._log_probs import token_log_probs
from humanline.models._policy import LogProbDecoder, fixed_log_probs, log_probs
from humanline.models._shard import local_shard
from humanline.models._smollm2 import lora_smollm2_135m, smollm2_135m

__all__ = [
    "LogProbDecoder",
    "adapter_modules",
    "check_adapter",
    "check_architecture",
    "fill_rotary_tables",
    "fixed_log_probs",
    "freeze_base",
    "gemma2",
    "has_quantized_base",
    "initial_adapter",
    "load_decoder",
    "local_shard",
    "log_probs",
    "lora_smollm2_135m",
    "merged_name",
    "merged_weight",
    "smollm2_135m",
    "token_log_probs",
    "trainable_parameters",
]
