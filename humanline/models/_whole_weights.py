from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from humanline.models._policy import LogProbDecoder


@contextmanager
def whole_weights(model: LogProbDecoder) -> Iterator[None]:
    """Within the block, each rank holds the whole model in its compute dtype, and may call it independently.

    Weights sharded by FSDP2 are gathered once; otherwise weights kept in another dtype are cast once.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if units:
        # The root must initialise itself before its layers are called without it.
        model._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with nullcontext() if units else cast_parameters(model, model.compute_dtype, of_layers=True):
            yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


@contextmanager
def cast_parameters(root: nn.Module, dtype: torch.dtype, of_layers: bool = False) -> Iterator[None]:
    """Within the block, replaces parameters of another dtype with casts.

    Args:
        root (nn.Module): the module.
        dtype (torch.dtype): dtype of the casts.
        of_layers (bool): False excludes the layers of a :class:`LogProbDecoder`.
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
