"""The weights that a run hands out, in a dtype that keeps what training changed."""

import copy
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtune import training, utils

from humanline.checkpoint._adapter_files import write_adapter
from humanline.checkpoint._kept_update import KeptUpdate
from humanline.checkpoint._replace import remove, replace_folder
from humanline.distributed import first_error
from humanline.models import (
    adapter_modules,
    full_state_dict,
    has_quantized_base,
    merged_name,
    merged_weight,
    trainable_parameters,
)
from humanline.torchtune_seam.internals import checkpoint_dir, write_into

log = utils.get_logger("INFO")

ENOUGH = 0.95
"""Share of an update below which an export is warned of."""


def write_weights(
    folder: Path,
    policy: nn.Module,
    checkpointer: Any,
    *,
    checkpoint_dtypes: Mapping[str, torch.dtype],
    export_dtype: torch.dtype | None,
    merged: bool,
    is_hand_over: bool = False,
) -> str | None:
    """Writes a model as an HF folder; one with an adapter into ``folder/adapter``.

    The folder's ``config.json`` names the widest dtype in it, since loaders round to what it names. Afterwards the log
    says what share of the update is in the folder and, if that is in float32, what share a reader in bfloat16 gets.

    The folder gets its name once it is whole; until then one that had it keeps it. A collective.

    Args:
        folder (Path): where to; replaced if it is there.
        policy (nn.Module): the model.
        checkpointer (Any): torchtune's checkpointer.
        checkpoint_dtypes (Mapping[str, torch.dtype]): the dtype of each weight of the checkpoint.
        export_dtype (torch.dtype | None): see :func:`export_dtypes`. An adapter is always float32.
        merged (bool): with an adapter, whether to write the merged weights too.
        is_hand_over (bool): whether the folder is for a server that samples from it.

    Returns:
        str | None: why it could not be written, on all ranks; None if it was.
    """
    rank = dist.get_rank()
    layers = adapter_modules(policy)
    dtypes = export_dtypes(policy, checkpoint_dtypes, export_dtype)
    changed = changed_weights(policy)
    adapter: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    if layers:
        adapter = full_state_dict(policy, rank=rank, dtypes=dict.fromkeys(trainable_parameters(policy), torch.float32))
    if merged or not layers:  # what changed is gathered as it is, and rounded where the loss is measured
        held: dict[str, torch.dtype | None] = {**dtypes, **dict.fromkeys(changed & dtypes.keys())}
        weights = full_state_dict(policy, rank=rank, dtypes=held)
    error = None
    if rank == 0:
        # As torchtune's checkpointer names it.
        partial = folder.with_name(f"epoch_{folder.name.removeprefix('epoch_')}.partial")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove(partial)
            level, said = logging.INFO, "float32; 100.0% of the update's norm survived rounding"
            if layers:
                write_adapter(partial / "adapter", adapter, policy, checkpointer)
            if weights:
                exact = not layers and _holds(dtypes, weights)
                initial = None if layers or (exact and is_hand_over) else _initial(checkpointer)
                is_known = bool(layers) or exact or initial is not None
                kept, read_in_bf16 = _round(weights, dtypes, changed, initial, adapter, layers)
                del initial
                _save(weights, partial, checkpointer)
                level, said = _report(dtypes, kept if is_known else None, read_in_bf16, bool(layers), is_hand_over)
                if has_quantized_base(policy):
                    said += "; the adapter is merged into the base as NF4 has it, not as the checkpoint has it"
            size = _to_disk(partial)
            replace_folder(partial, folder)
            log.log(level, f"{folder if weights else folder / 'adapter'}: {size / 1e9:.3g} GB, {said}")
        except Exception as failure:  # safetensors and torch have errors of their own for a full disk
            error = " ".join(f"{type(failure).__name__}: {failure}".split())
            remove(partial)
    return first_error(error)


def changed_weights(policy: nn.Module) -> set[str]:
    """The checkpoint's weights that training changes: all that train, or those that an adapter is merged into."""
    layers = adapter_modules(policy)
    return {merged_name(name) for name in layers} if layers else set(trainable_parameters(policy))


def export_dtypes(
    policy: nn.Module, checkpoint_dtypes: Mapping[str, torch.dtype], export_dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype in which each weight is written: ``export_dtype`` or, if that is None, one that keeps the update.

    Weights that trained are then written in the dtype that they trained in, and merged ones in float32, since base and
    update together have more digits than either. The others keep the checkpoint's dtype.
    """
    trained = trainable_parameters(policy)
    changed = dict.fromkeys(changed_weights(policy), torch.float32)
    keeping = {name: trained[name].dtype if name in trained else dtype for name, dtype in changed.items()}
    return {name: export_dtype or keeping.get(name, dtype) for name, dtype in checkpoint_dtypes.items()}


def _initial(checkpointer: Any) -> Mapping[str, Tensor] | None:
    """The weights that the run started from, memory-mapped; None if they are gone, which must not cost the new ones."""
    try:
        # A copy: loading renews the map by which weights are written, without what was dropped from it.
        weights: Mapping[str, Tensor] = copy.copy(checkpointer).load_checkpoint()[training.MODEL_KEY]
        return weights
    except Exception as failure:  # of torchtune, safetensors and the disk
        log.warning(f"checkpointer: {checkpoint_dir(checkpointer)} cannot be read any more: {failure}")
        return None


def _holds(dtypes: Mapping[str, torch.dtype], weights: Mapping[str, Tensor]) -> bool:
    """Whether no weight loses a digit in these dtypes."""
    return all(torch.promote_types(weights[name].dtype, dtype) == dtype for name, dtype in dtypes.items())


def _round(
    weights: dict[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    changed: set[str],
    initial: Mapping[str, Tensor] | None,
    adapter: Mapping[str, Tensor],
    layers: Mapping[str, Any],
) -> tuple[KeptUpdate, KeptUpdate]:
    """Merges the adapter into the weights that changed, if there is one, and rounds them to their dtypes, in place.

    Returns:
        tuple[KeptUpdate, KeptUpdate]: what that leaves of the update, and what a reader in bfloat16 has left of it;
            both empty if there is nothing to compare with.
    """
    kept, read_in_bf16 = KeptUpdate(), KeptUpdate()
    by_weight = {merged_name(name): layer for name, layer in layers.items()}
    for name in sorted(changed & weights.keys()):
        held = weights[name]
        exact = merged_weight(held, adapter, name, by_weight[name]) if layers else held
        weights[name] = exact.to(dtypes[name])
        before = held if layers else None if initial is None else initial[name]
        if before is not None:
            kept.add(before, exact, weights[name])
            read_in_bf16.add(before, exact, weights[name].to(torch.bfloat16))
    return kept, read_in_bf16


def _report(
    dtypes: Mapping[str, torch.dtype],
    kept: KeptUpdate | None,
    read_in_bf16: KeptUpdate,
    has_adapter: bool,
    is_hand_over: bool,
) -> tuple[int, str]:
    """The log's level, and what it says of the weights' dtypes and of the update's share in them, if it is known."""
    names = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))
    if kept is None:
        return logging.WARNING, f"{names}; what share of the update's norm survived rounding is not known"
    said = f"{names}; {kept.share:.1%} of the update's norm survived rounding"
    or_adapter = ", or use the adapter in it" if has_adapter and not is_hand_over else ""
    if kept.share < ENOUGH:
        return logging.WARNING, f"{said}; set export_dtype: fp32{or_adapter}"
    if read_in_bf16.share < ENOUGH:
        said += f", read in bfloat16 {read_in_bf16.share:.1%}; load it in float32 (vLLM: --dtype float32){or_adapter}"
        return logging.WARNING if is_hand_over else logging.INFO, said
    return logging.INFO, said


def _save(weights: dict[str, Tensor], partial: Path, checkpointer: Any) -> None:
    """Has torchtune's checkpointer write the weights, without its log lines, which name ``partial``."""
    writer = copy.copy(checkpointer)
    write_into(writer, partial.parent)
    with _quiet("_checkpointer"):
        writer.save_checkpoint({training.MODEL_KEY: weights}, epoch=partial.name.removeprefix("epoch_"))
    widest = functools.reduce(torch.promote_types, {weight.dtype for weight in weights.values()})
    if (config := partial / "config.json").is_file():
        _name_dtype(config, str(widest).removeprefix("torch."))


def _name_dtype(path: Path, dtype: str) -> None:
    """Lets a ``config.json`` name a dtype, under whichever of the two names it has (``dtype`` is transformers 5's)."""
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config")):
        for key in ("torch_dtype", "dtype"):
            if isinstance(part, dict) and part.get(key) is not None:
                part[key] = dtype
    if not {"torch_dtype", "dtype"} & {key for key, value in config.items() if value is not None}:
        config["torch_dtype"] = dtype
    if config != json.loads(path.read_text()):
        new = path.with_name(f"{path.name}.new")  # a copied file has the mode of its original, which may be read-only
        new.write_text(json.dumps(config, indent=2) + "\n")
        new.replace(path)


@contextmanager
def _quiet(module: str) -> Iterator[None]:
    """Within it, what a module of torchtune tells of its progress is not logged. All of torchtune has one logger."""

    def is_other(record: logging.LogRecord) -> bool:
        return record.module != module or record.levelno > logging.INFO

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def _to_disk(folder: Path) -> int:
    """Waits until the files are on the disk, so that the old ones may go; returns their bytes."""
    size = 0
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
                size += os.fstat(written.fileno()).st_size
    return size
