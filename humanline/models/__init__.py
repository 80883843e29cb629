"""What torchtune's models lack: log-probs without logits, a check of checkpoints, and SmolLM2."""

from humanline.models._load import check_architecture, load_decoder
from humanline.models._log_probs import token_log_probs
from humanline.models._policy import LogProbDecoder, log_probs
from humanline.models._smollm2 import smollm2_135m

__all__ = ["LogProbDecoder", "check_architecture", "load_decoder", "log_probs", "smollm2_135m", "token_log_probs"]
