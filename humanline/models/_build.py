"""Builds models that return log-probs, sharded over ranks or whole on one device, from a builder and a state dict."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune import modules, training
from torchtune.modules import TransformerDecoder
from torchtune.modules.common_utils import NF4Tensor  # its place in torchao depends on the version

from humanline.errors import ConfigError
from humanline.models._adapter import adapter_modules, freeze_base, quantized_like
from humanline.models._cpu_products import speed_up_bf16_products
from humanline.models._eager_modules import use_eager_modules
from humanline.models._load import fill_rotary_tables
from humanline.models._policy import LogProbDecoder
from humanline.models._shard import local_shard
from humanline.models._whole_weights import cast_parameters


def mesh_of(device: torch.device, replicas: int) -> DeviceMesh:
    """Returns a mesh of all ranks, in ``replicas`` groups of neighbouring ranks that each hold and shard the model.

    Raises:
        ConfigError: if the ranks do not divide into ``replicas`` groups.
    """
    ranks = dist.get_world_size()
    if ranks % replicas:
        raise ConfigError(
            f"data_parallel_replicate_dim: {ranks} ranks do not divide into {replicas} groups; use a divisor of {ranks}"
        )
    if replicas == 1:
        return init_device_mesh(device.type, (ranks,))
    return init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


def build_model(
    build: Callable[[], TransformerDecoder],
    state_dict: dict[str, Tensor] | None,
    *,
    mesh: DeviceMesh | None,
    device: torch.device,
    param_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    activation_checkpointing: bool = False,
    compile: bool = False,
) -> LogProbDecoder:
    """Builds a model on the meta device, places it, and loads the weights.

    Trainable parameters are kept in ``param_dtype`` and compute in ``compute_dtype``. The frozen base of an adapter is
    kept in ``compute_dtype``, or in NF4 if its builder uses NF4.

    Args:
        build (Callable[[], TransformerDecoder]): the builder.
        state_dict (dict[str, Tensor] | None): the full weights in torchtune's names, with the adapter's, on every rank;
            None leaves the parameters uninitialised, for a model that will copy another one's weights.
        mesh (DeviceMesh | None): ranks to shard over with FSDP2, from :func:`mesh_of`; gradients are reduced in
            float32. None keeps the model whole, in plain tensors.
        device (torch.device): this rank's device.
        param_dtype (torch.dtype): dtype of trainable parameters.
        compute_dtype (torch.dtype): dtype of the forward and backward pass.
        activation_checkpointing (bool): recompute each layer in backward.
        compile (bool): compile each layer.

    Returns:
        LogProbDecoder: the model.
    """
    model = design_model(
        build,
        mesh=mesh,
        device=device,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        activation_checkpointing=activation_checkpointing,
        compile=compile,
    )
    quantized = any(isinstance(local_shard(parameter), NF4Tensor) for parameter in model.parameters())
    if state_dict is None or (mesh is not None and not quantized):
        model.to_empty(device=device)
    with training.set_default_dtype(compute_dtype):
        fill_rotary_tables(model, device)
    if state_dict is not None and mesh is not None and quantized:
        # A copy of the dict, since torchtune's main branch empties its argument.
        training.load_from_full_model_state_dict(model, dict(state_dict), device, strict=True)
    elif state_dict is not None and mesh is not None:
        _load_shards(model, state_dict, device)
    elif state_dict is not None:
        _load(model, state_dict, device)
    training.validate_no_params_on_meta_device(model)
    return model


def design_model(
    build: Callable[[], TransformerDecoder],
    *,
    mesh: DeviceMesh | None,
    device: torch.device,
    param_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    activation_checkpointing: bool = False,
    compile: bool = False,
) -> LogProbDecoder:
    """Builds the model of :func:`build_model` on the meta device, without memory, to be placed on ``device``."""
    with training.set_default_dtype(compute_dtype), torch.device("meta"):
        model = LogProbDecoder(build())
    if not compile:  # a compiled layer fuses torchtune's operations
        use_eager_modules(model, device)
    if device.type == "cpu" and compute_dtype == torch.bfloat16:
        speed_up_bf16_products()
    model.compute_dtype = compute_dtype
    if adapter_modules(model):
        freeze_base(model, param_dtype)
    else:
        model.to(param_dtype)
        training.disable_dropout(model)
    if mesh is None and param_dtype != compute_dtype:
        _compute_in(model, compute_dtype)
    if compile:
        training.compile_model(model, verbose=False)
    if activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    if mesh is not None:
        _shard(model, mesh, compute_dtype)
    return model


def _shard(model: LogProbDecoder, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for name, module in reversed(list(model.named_modules())):
        if training.get_shard_conditions(name, module):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    # The root (embeddings and head) stays gathered until backward, which begins with it. `log_probs` reshards it after
    # a forward without backward, since an optimizer step or sync would change only the shards.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    if mesh.device_type == "cpu":
        # torch 2.8's gloo returns the sum of gradients when asked for their mean. So FSDP sums, then divides.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def _load_shards(model: nn.Module, state_dict: dict[str, Tensor], device: torch.device) -> None:
    """Copies this rank's shard of each weight and casts it; no communication, since each rank has all weights."""
    for name, sharded in model.state_dict().items():
        weight = state_dict[name].to(device)
        weight = distribute_tensor(weight, sharded.device_mesh, sharded.placements, src_data_rank=None)
        local_shard(sharded).copy_(local_shard(weight))


def _load(model: nn.Module, state_dict: dict[str, Tensor], device: torch.device) -> None:
    """Replaces parameters on the meta device with their weights, one at a time."""
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{leaf}".lstrip(".").replace("_checkpoint_wrapped_module.", "")
            # Trainable weights are copied; frozen ones may be shared with another model of the same checkpoint.
            weight = state_dict[name].to(device, parameter.dtype, copy=parameter.requires_grad)
            stored = quantized_like(weight, parameter) if isinstance(parameter, NF4Tensor) else weight
            setattr(module, leaf, nn.Parameter(stored, requires_grad=parameter.requires_grad))


def _compute_in(model: LogProbDecoder, dtype: torch.dtype) -> None:
    """Makes the layers, and then the rest, compute in ``dtype`` with parameters that are kept in another dtype.

    During a forward pass each such parameter is replaced with a cast of it. A layer that is recomputed in backward
    casts again; other layers keep their casts until backward.
    """
    for module in (*model.layers, model):
        module.forward = _withcast_parameters(module, module.forward, dtype)


def _withcast_parameters(root: nn.Module, forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    @functools.wraps(forward)
    def cast_forward(*args: Any, **kwargs: Any) -> Any:
        with cast_parameters(root, dtype):
            return forward(*args, **kwargs)

    return cast_forward


def full_state_dict(model: nn.Module, *, rank: int, dtypes: Mapping[str, torch.dtype | None]) -> dict[str, Any]:
    """Gathers the weights named in ``dtypes`` to the host of rank 0 (empty elsewhere), each in the given dtype.

    None keeps a weight's own dtype. NF4 weights are dequantised.
    """
    full = {}
    weights = model.state_dict()
    for name, dtype in dtypes.items():
        tensor = weights[name]
        if isinstance(local_shard(tensor), NF4Tensor):
            tensor = _dequantized(tensor)
        tensor = tensor if dtype is None else tensor.to(dtype)
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank == 0:
            full[name] = tensor.cpu()
    return full


def _dequantized(tensor: Tensor) -> Tensor:
    weight: Tensor = local_shard(tensor).get_original_weight()  # type: ignore[attr-defined]
    return DTensor.from_local(weight, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else weight
