"""From a builder and a state dict to a sharded model that returns log-probs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtune import modules, training
from torchtune.modules import TransformerDecoder

from humanline.models import LogProbDecoder


def sharded_model(
    build: Callable[[], TransformerDecoder],
    state_dict: dict[str, Tensor] | None,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    param_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    activation_checkpointing: bool = False,
    compile: bool = False,
) -> LogProbDecoder:
    """Builds a model on the meta device, shards it with FSDP2, and loads each rank's part of the weights.

    Parameters are kept in ``param_dtype`` and gathered in ``compute_dtype``; gradients are reduced in float32.

    Args:
        build (Callable[[], TransformerDecoder]): the builder.
        state_dict (dict[str, Tensor] | None): the full weights in torchtune's names, on every rank; None leaves the
            shards uninitialised, for a model that is about to become a copy of another.
        mesh (DeviceMesh): ranks to shard over.
        device (torch.device): this rank's device.
        param_dtype (torch.dtype): dtype of the shards.
        compute_dtype (torch.dtype): dtype of the forward and backward pass.
        activation_checkpointing (bool): recompute each layer in backward.
        compile (bool): compile each layer.

    Returns:
        LogProbDecoder: the sharded model.
    """
    with training.set_default_dtype(param_dtype), torch.device("meta"):
        model = LogProbDecoder(build())
    if compile:
        training.compile_model(model, verbose=False)
    if activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for name, module in reversed(list(model.named_modules())):
        if training.get_shard_conditions(name, module):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    # The root too is resharded after forward: a forward without backward must not leave gathered weights behind, which
    # would outlive the optimizer step or sync that changes their shards.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
    if state_dict is None:
        model.to_empty(device=device)
    with training.set_default_dtype(param_dtype), device:
        for module in model.modules():
            if hasattr(module, "rope_init"):  # its table is in no state dict
                module.rope_init()  # type: ignore[operator]
    if state_dict is not None:
        # A copy of the dict, since torchtune's main branch empties the one it is given.
        training.load_from_full_model_state_dict(model, dict(state_dict), device, strict=True)
    training.validate_no_params_on_meta_device(model)
    training.disable_dropout(model)
    return model


def full_state_dict(model: nn.Module, *, rank: int, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """Gathers the weights on the host of rank 0 (empty elsewhere), each in the dtype that it had in the checkpoint."""
    full = {}
    for name, parameter in model.state_dict().items():
        tensor = parameter.to(dtypes[name])
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if rank == 0:
            full[name] = tensor.cpu()
    return full
