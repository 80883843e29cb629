"""torchtune's private names, each behind a public one. Nothing else in humanline names one; a test holds it to that."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtune.config._utils import _get_component_from_path
from torchtune.models import convert_weights as _llama_weights
from torchtune.models.gemma2 import _convert_weights as _gemma2_weights
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune, gemma2_tune_to_hf
from torchtune.models.phi3 import _convert_weights as _phi3_weights
from torchtune.models.qwen2 import _convert_weights as _qwen2_weights
from torchtune.modules import MultiHeadAttention
from torchtune.modules.attention_utils import _MaskType as Mask
from torchtune.training.checkpointing._utils import safe_torch_load
from torchtune.utils._import_guard import _SUPPORTS_FLEX_ATTENTION

__all__ = [
    "GEMMA2_FROM_HF",
    "LLAMA_FROM_HF",
    "Mask",
    "PHI3_FROM_HF",
    "QWEN2_FROM_HF",
    "SUPPORTS_FLEX_ATTENTION",
    "Attend",
    "attention_call",
    "checkpoint_dir",
    "checkpoint_files",
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

SUPPORTS_FLEX_ATTENTION: bool = _SUPPORTS_FLEX_ATTENTION
"""Whether torchtune finds a GPU here that FlexAttention runs on."""

LLAMA_FROM_HF: dict[str, str] = _llama_weights._FROM_HF
QWEN2_FROM_HF: dict[str, str] = _qwen2_weights._FROM_HF
PHI3_FROM_HF: dict[str, str] = _phi3_weights._PHI3_MINI
GEMMA2_FROM_HF: dict[str, str] = _gemma2_weights._GEMMA2_FROM_HF
"""A family's weights: Hugging Face's name of each to torchtune's. These are the tables its checkpointers read."""


def find_component(dotpath: str) -> Any:
    """What stands at a dotpath, as ``config.instantiate`` finds it."""
    return _get_component_from_path(dotpath)


def attention_call(attention: MultiHeadAttention) -> Attend:
    """What computes an attention layer's output from q, k, v and a mask."""
    call: Attend = attention._attention_call
    return call


def set_attention_call(attention: MultiHeadAttention, call: Attend) -> None:
    attention._attention_call = call


def checkpoint_dir(checkpointer: Any) -> Path:
    """The folder that a checkpointer reads."""
    return Path(checkpointer._checkpoint_dir)


def checkpoint_files(checkpointer: Any) -> Iterable[Path]:
    """The files that a checkpointer of Hugging Face's format reads."""
    files: Iterable[Path] = checkpointer._checkpoint_paths
    return files


def hf_config(checkpointer: Any) -> dict[str, Any] | None:
    """The config.json beside the weights; None for a checkpointer of another format."""
    return getattr(checkpointer, "_config", None)


def hf_files(checkpointer: Any) -> dict[str, str]:
    """Which file each weight goes into, by Hugging Face's names: the very map that the checkpointer writes by. Empty
    for a checkpointer of another format, and before it has loaded."""
    return getattr(checkpointer, "_weight_map", {})


def model_type(checkpointer: Any) -> str:
    """A checkpointer's ``model_type``, such as ``LLAMA3``."""
    kind = checkpointer._model_type
    return str(getattr(kind, "name", kind))


def write_into(checkpointer: Any, folder: Path) -> None:
    """Makes a checkpointer write its epochs into a folder."""
    checkpointer._output_dir = folder
