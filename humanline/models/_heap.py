"""Memory that a CPU process has freed goes back to the system.

glibc keeps freed memory between pieces that are in use, and the tensors of the next layer do not fit into many of the
gaps that gradients and kept hidden states leave. ``malloc_trim`` returns free pages within the heap.
"""

import ctypes
import functools
from collections.abc import Callable

from torch import Tensor


def return_freed_memory(tensor: Tensor) -> Tensor:
    """Returns the tensor. On a CPU with glibc, freed memory goes back to the system now and when its gradient is known.

    Mapping pages again takes some 0.1 s a GB, so this is for a few places of a pass.
    """
    if tensor.device.type == "cpu":
        _trim()
        if tensor.requires_grad:
            tensor.register_hook(lambda _: _trim())
    return tensor


def _trim() -> None:
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
    return found
