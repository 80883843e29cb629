import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """Scales the gradients down to a norm of at most ``limit`` over all ranks. None leaves them unchanged.

    Returns:
        Tensor: the norm before scaling, scalar.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf") if limit is None else float(limit))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
