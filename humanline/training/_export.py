"""The weights that a run hands out."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchtune import training

from humanline.models import adapter_modules, merge_adapter, trainable_parameters
from humanline.training._adapter_files import write_adapter
from humanline.training._agreement import first_error
from humanline.training._model import full_state_dict


def write_weights(
    folder: Path, policy: nn.Module, checkpointer: Any, *, dtypes: dict[str, torch.dtype], merged: bool
) -> str | None:
    """Writes a model as an HF folder, in the dtypes that it came in; one with an adapter into ``folder/adapter``.

    The folder gets its name once it is whole. A collective.

    Args:
        folder (Path): where to; replaced if it is there.
        policy (nn.Module): the model.
        checkpointer (Any): torchtune's checkpointer.
        dtypes (dict[str, torch.dtype]): the dtype of each weight.
        merged (bool): with an adapter, whether to write the merged weights too.

    Returns:
        str | None: why it could not be written, on all ranks; None if it was.
    """
    rank = dist.get_rank()
    layers = adapter_modules(policy)
    adapter: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    if layers:
        adapter = full_state_dict(policy, rank=rank, dtypes=dict.fromkeys(trainable_parameters(policy), torch.float32))
    if merged or not layers:
        weights = full_state_dict(policy, rank=rank, dtypes=dtypes)
    error = None
    if rank == 0:
        partial = (
            Path(checkpointer._output_dir) / f"epoch_{folder.name}.partial"
        )  # as torchtune's checkpointer names it
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            if layers:
                write_adapter(partial / "adapter", adapter, policy, checkpointer)
            if weights:
                merge_adapter(weights, adapter, layers)
                checkpointer.save_checkpoint({training.MODEL_KEY: weights}, epoch=f"{folder.name}.partial")
            shutil.rmtree(folder, ignore_errors=True)
            shutil.move(partial, folder)
        except Exception as failure:  # safetensors and torch have errors of their own for a full disk
            error = " ".join(f"{type(failure).__name__}: {failure}".split())
            shutil.rmtree(partial, ignore_errors=True)
    return first_error(error)
