from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from humanline.models._policy import LogProbDecoder


@contextmanager
def whole_weights(model: LogProbDecoder) -> Iterator[None]:
    """For the length of the block each rank has the whole model in the dtype in which it computes: what FSDP2 sharded
    is gathered once, and what is kept in another dtype is cast once. The ranks may then call it as each of them likes.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if units:
        # The root has to set itself up before its layers are called without it.
        model._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with nullcontext() if units else cast_parameters(model, model.compute_dtype, of_layers=True):
            yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


@contextmanager
def cast_parameters(root: nn.Module, dtype: torch.dtype, of_layers: bool = False) -> Iterator[None]:
    """For the length of the block, replaces parameters of another dtype by casts of them.

    Args:
        root (nn.Module): the module.
        dtype (torch.dtype): what to cast to.
        of_layers (bool): whether those of a decoder's layers too.
    """
    skipped = set() if of_layers or not isinstance(root, LogProbDecoder) else set(root.layers.modules())
    replaced = []
    for module in root.modules():
        if module not in skipped:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype != dtype and parameter.is_floating_point():
                    replaced.append((module, name, parameter))
    for module, name, parameter in replaced:
        module._parameters[name] = parameter.to(dtype)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
