"""torchtune's private names, each behind a public one. No other module of humanline uses one; a test checks this."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torchtune
from torch import Tensor
from torchtune.modules import MultiHeadAttention

# A table is a family's weights, Hugging Face's name of each to torchtune's: the very one that its checkpointers read.
# Whether FlexAttention is supported, torchtune finds by the GPU here.
try:
    from torchtune.config._utils import _get_component_from_path
    from torchtune.models.convert_weights import _FROM_HF as LLAMA_FROM_HF
    from torchtune.models.gemma2._convert_weights import _GEMMA2_FROM_HF as GEMMA2_FROM_HF
    from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune, gemma2_tune_to_hf
    from torchtune.models.phi3._convert_weights import _PHI3_MINI as PHI3_FROM_HF
    from torchtune.models.qwen2._convert_weights import _FROM_HF as QWEN2_FROM_HF
    from torchtune.modules.attention_utils import _MaskType as Mask
    from torchtune.training.checkpointing._utils import SUFFIXES_TO_NOT_COPY, copy_files, safe_torch_load
    from torchtune.utils._import_guard import _SUPPORTS_FLEX_ATTENTION as SUPPORTS_FLEX_ATTENTION
except ImportError as error:
    raise ImportError(
        f"torchtune {torchtune.__version__ or 'from source'} in {Path(torchtune.__file__).parent} lacks a private "
        f"name that humanline uses: {error}. torchtune 0.6.1 has it; for a fork, change {__file__}"
    ) from error

__all__ = [
    "GEMMA2_FROM_HF",
    "LLAMA_FROM_HF",
    "Mask",
    "PHI3_FROM_HF",
    "QWEN2_FROM_HF",
    "SUFFIXES_TO_NOT_COPY",
    "SUPPORTS_FLEX_ATTENTION",
    "Attend",
    "attention_call",
    "checkpoint_dir",
    "checkpoint_files",
    "copy_files",
    "find_component",
    "gemma2_hf_to_tune",
    "gemma2_tune_to_hf",
    "hf_config",
    "hf_files",
    "model_type",
    "safe_torch_load",
    "set_attention_call",
    "write_into",
]

Attend = Callable[..., Tensor]


def find_component(dotpath: str) -> Any:
    """Returns the object at a dotpath, found in the same way as by ``config.instantiate``."""
    return _get_component_from_path(dotpath)


def attention_call(attention: MultiHeadAttention) -> Attend:
    """Returns the function that computes an attention layer's output from q, k, v and a mask."""
    call: Attend = attention._attention_call
    return call


def set_attention_call(attention: MultiHeadAttention, call: Attend) -> None:
    attention._attention_call = call


def checkpoint_dir(checkpointer: Any) -> Path:
    """Returns the folder that a checkpointer reads."""
    return Path(checkpointer._checkpoint_dir)


def checkpoint_files(checkpointer: Any) -> Iterable[Path]:
    """Returns the files that a checkpointer of Hugging Face's format reads."""
    files: Iterable[Path] = checkpointer._checkpoint_paths
    return files


def hf_config(checkpointer: Any) -> dict[str, Any] | None:
    """Returns the config.json beside the weights; None for a checkpointer of another format."""
    return getattr(checkpointer, "_config", None)


def hf_files(checkpointer: Any) -> dict[str, str]:
    """Returns the file of each weight by its Hugging Face name: the map that the checkpointer uses for writing.

    It is empty for a checkpointer of another format, and before the checkpointer has loaded.
    """
    return getattr(checkpointer, "_weight_map", {})


def model_type(checkpointer: Any) -> str:
    """Returns a checkpointer's ``model_type``, such as ``LLAMA3``."""
    kind = checkpointer._model_type
    return str(getattr(kind, "name", kind))


def write_into(checkpointer: Any, folder: Path) -> None:
    """Makes a checkpointer write its epochs into a folder."""
    checkpointer._output_dir = folder
