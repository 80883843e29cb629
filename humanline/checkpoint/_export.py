"""Exports a run's weights in dtypes that keep the update."""

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
"""An export that keeps a smaller share of the update logs a warning."""


def write_weights(
    folder: Path,
    policy: nn.Module,
    checkpointer: Any,
    *,
    checkpoint_dtypes: Mapping[str, torch.dtype],
    export_dtype: torch.dtype | None,
    merged: bool,
    card: str | None,
    tokenizer: Any,
) -> str | None:
    """Writes a model as an HF folder, and its adapter, if it has one, into ``folder/adapter``.

    The folder has the run's tokenizer and chat template. The log names the files that are not the checkpoint's.

    ``config.json`` names the widest dtype in the folder, because loaders round to that dtype. The log gives the share
    of the update that the folder keeps and, if that is lower, the share that a reader in bfloat16 gets.

    The folder gets its name when it is complete. Until then an older folder keeps that name. A collective.

    Args:
        folder (Path): the destination; replaced if it exists.
        policy (nn.Module): the model.
        checkpointer (Any): torchtune's checkpointer.
        checkpoint_dtypes (Mapping[str, torch.dtype]): the dtype of each weight of the checkpoint.
        export_dtype (torch.dtype | None): see :func:`export_dtypes`. An adapter is always float32.
        merged (bool): with an adapter, whether to write the merged weights too.
        card (str | None): the text of ``README.md``, in the folder and beside the adapter; None writes none, and the
            folder is for a server that samples from it.
        tokenizer (Any): the run's tokenizer. One without ``write_files`` (see ``ChatTokenizer``), or None, leaves the
            checkpoint's files.

    Returns:
        str | None: on all ranks, the error if the folder could not be written; None if it was written.
    """
    rank, is_hand_over = dist.get_rank(), card is None
    layers = adapter_modules(policy)
    dtypes = export_dtypes(policy, checkpoint_dtypes, export_dtype)
    changed = changed_weights(policy)
    adapter: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    if layers:
        adapter = full_state_dict(policy, rank=rank, dtypes=dict.fromkeys(trainable_parameters(policy), torch.float32))
    if merged or not layers:  # changed weights are gathered unrounded; _round rounds them and measures the loss
        held: dict[str, torch.dtype | None] = {**dtypes, **dict.fromkeys(changed & dtypes.keys())}
        weights = full_state_dict(policy, rank=rank, dtypes=held)
    error = None
    if rank == 0:
        # torchtune's checkpointer writes into a folder named epoch_NAME.
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
                    said += "; the adapter is merged into the NF4 base, not into the checkpoint's weights"
            if hasattr(tokenizer, "write_files"):
                said += _save_tokenizer(tokenizer, partial if weights else partial / "adapter", checkpointer)
            if card is not None:
                if weights:
                    _replace_text(partial / "README.md", card)
                if layers:
                    of_adapter = card.replace('library_name: "transformers"', 'library_name: "peft"')
                    _replace_text(partial / "adapter" / "README.md", of_adapter)
            size = _to_disk(partial)
            replace_folder(partial, folder)
            log.log(level, f"{folder if weights else folder / 'adapter'}: {size / 1e9:.3g} GB, {said}")
        except Exception as failure:  # safetensors and torch raise their own errors for a full disk
            error = " ".join(f"{type(failure).__name__}: {failure}".split())
            remove(partial)
    return first_error(error)


def changed_weights(policy: nn.Module) -> set[str]:
    """Returns the names of the weights that training changes: those that train, or those that get a merged adapter."""
    layers = adapter_modules(policy)
    return {merged_name(name) for name in layers} if layers else set(trainable_parameters(policy))


def export_dtypes(
    policy: nn.Module, checkpoint_dtypes: Mapping[str, torch.dtype], export_dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Returns the dtype in which each weight is written: ``export_dtype`` or, if None, one that keeps the update.

    With None, trained weights are written in the dtype they were trained in. Merged weights are written in float32,
    because base plus update has more digits than either. Other weights keep the checkpoint's dtype.
    """
    trained = trainable_parameters(policy)
    changed = dict.fromkeys(changed_weights(policy), torch.float32)
    keeping = {name: trained[name].dtype if name in trained else dtype for name, dtype in changed.items()}
    return {name: export_dtype or keeping.get(name, dtype) for name, dtype in checkpoint_dtypes.items()}


def _initial(checkpointer: Any) -> Mapping[str, Tensor] | None:
    """Returns the run's initial weights, memory-mapped; None if they are unreadable, so that the export still works."""
    try:
        # On a copy: loading rebuilds the map by which weights are written, and loses the changes made to it.
        weights: Mapping[str, Tensor] = copy.copy(checkpointer).load_checkpoint()[training.MODEL_KEY]
        return weights
    except Exception as failure:  # from torchtune, safetensors or the disk
        log.warning(f"checkpointer: cannot read {checkpoint_dir(checkpointer)} any more: {failure}")
        return None


def _holds(dtypes: Mapping[str, torch.dtype], weights: Mapping[str, Tensor]) -> bool:
    """Returns whether these dtypes keep every digit of the weights."""
    return all(torch.promote_types(weights[name].dtype, dtype) == dtype for name, dtype in dtypes.items())


def _round(
    weights: dict[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    changed: set[str],
    initial: Mapping[str, Tensor] | None,
    adapter: Mapping[str, Tensor],
    layers: Mapping[str, Any],
) -> tuple[KeptUpdate, KeptUpdate]:
    """Merges the adapter, if there is one, into the changed weights and rounds them to their dtypes, in place.

    Returns:
        tuple[KeptUpdate, KeptUpdate]: the part of the update that the rounded weights keep, and the part that a reader
            in bfloat16 keeps; both empty if there are no initial weights to compare with.
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
    """Returns the log level and a text with the weights' dtypes and the share of the update that they keep."""
    names = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))
    if kept is None:
        return logging.WARNING, f"{names}; the share of the update's norm that survived rounding is unknown"
    said = f"{names}; {kept.share:.1%} of the update's norm survived rounding"
    or_adapter = ", or use the adapter in it" if has_adapter and not is_hand_over else ""
    if kept.share < ENOUGH:
        return logging.WARNING, f"{said}; set export_dtype: fp32{or_adapter}"
    if read_in_bf16.share < ENOUGH:
        said += f"; loaded in bfloat16 it keeps {read_in_bf16.share:.1%}, so load it in float32 (vLLM: --dtype float32)"
        said += or_adapter
        return logging.WARNING if is_hand_over else logging.INFO, said
    return logging.INFO, said


def _save(weights: dict[str, Tensor], partial: Path, checkpointer: Any) -> None:
    """Writes the weights with torchtune's checkpointer. Its log lines are hidden, because they name ``partial``."""
    writer = copy.copy(checkpointer)
    write_into(writer, partial.parent)
    with _quiet("_checkpointer"):
        writer.save_checkpoint({training.MODEL_KEY: weights}, epoch=partial.name.removeprefix("epoch_"))
    widest = functools.reduce(torch.promote_types, {weight.dtype for weight in weights.values()})
    if (config := partial / "config.json").is_file():
        _name_dtype(config, str(widest).removeprefix("torch."))


def _save_tokenizer(tokenizer: Any, folder: Path, checkpointer: Any) -> str:
    """Writes the run's tokenizer and chat template; returns which files are therefore not the checkpoint's."""
    try:
        others = tokenizer.write_files(folder, checkpoint_dir(checkpointer))
    except FileNotFoundError as failure:
        log.warning(f"tokenizer.path: {failure}; the export has the checkpoint's tokenizer files, not those of the run")
        return ""
    return f"; the run's tokenizer files, not the checkpoint's: {', '.join(others)}" if others else ""


def _name_dtype(path: Path, dtype: str) -> None:
    """Sets the dtype in a ``config.json``, under ``torch_dtype`` or ``dtype`` (transformers 5)."""
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config")):
        for key in ("torch_dtype", "dtype"):
            if isinstance(part, dict) and part.get(key) is not None:
                part[key] = dtype
    if not {"torch_dtype", "dtype"} & {key for key, value in config.items() if value is not None}:
        config["torch_dtype"] = dtype
    if config != json.loads(path.read_text()):
        _replace_text(path, json.dumps(config, indent=2) + "\n")


def _replace_text(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")  # a copied file keeps its original's mode, which may be read-only
    new.write_text(text, encoding="utf-8")
    new.replace(path)


@contextmanager
def _quiet(module: str) -> Iterator[None]:
    """Hides the progress lines of one torchtune module. All of torchtune shares one logger."""

    def is_other(record: logging.LogRecord) -> bool:
        return record.module != module or record.levelno > logging.INFO

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


def _to_disk(folder: Path) -> int:
    """Waits until the files are on disk, so that the old ones can be removed. Returns their size in bytes."""
    size = 0
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
                size += os.fstat(written.fileno()).st_size
    return size
