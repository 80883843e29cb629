"""Reads and writes weights: model checkpoints, training state, exports, adapter files. Each is complete or absent."""

from humanline.checkpoint._adapter_files import read_adapter
from humanline.checkpoint._checkpoint import TrainingCheckpoint
from humanline.checkpoint._checkpoint_folder import check_checkpoint_folder
from humanline.checkpoint._export import export_dtypes
from humanline.checkpoint._provenance import code_digest, installed_version, named_files
from humanline.checkpoint._replace import restore_replaced
from humanline.checkpoint._steps import has_checkpoints, saved_dates
from humanline.checkpoint._weights import (
    build_decoder,
    fingerprint,
    read_decoder_weights,
    read_weights,
    rounding_on_load,
    sampled_digest,
)
from humanline.checkpoint._weights_out import WeightsOut
from humanline.torchtune_seam.hf_checkpointer import FullModelHFCheckpointer

__all__ = [
    "FullModelHFCheckpointer",
    "TrainingCheckpoint",
    "WeightsOut",
    "build_decoder",
    "check_checkpoint_folder",
    "code_digest",
    "installed_version",
    "export_dtypes",
    "fingerprint",
    "has_checkpoints",
    "named_files",
    "read_adapter",
    "read_decoder_weights",
    "read_weights",
    "restore_replaced",
    "rounding_on_load",
    "sampled_digest",
    "saved_dates",
]
