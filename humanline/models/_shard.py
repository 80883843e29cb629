from torch import Tensor
from torch.distributed.tensor import DTensor


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a tensor, without a copy; an unsharded tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
