"""Memory that a CPU process has freed, back to the system before backward needs more.

glibc keeps freed memory between pieces that are in use. The process then grows to the most that each size of pieces
ever needed, and not to the most that was needed at one moment. ``malloc_trim`` returns free pages within the heap.
"""

import ctypes
import functools
from collections.abc import Callable

from torch import Tensor


def trim_in_backward(tensor: Tensor) -> Tensor:
    """Returns the tensor. When its gradient is known, freed memory goes back to the system, on a CPU with glibc.

    Mapping pages again costs some 0.1 s a GB, so this is for the two places where the most is needed at once: the
    beginning of backward, and its end, where the gradient of the embeddings is as large as they are.
    """
    if tensor.device.type == "cpu" and tensor.requires_grad:
        tensor.register_hook(_trim)
    return tensor


def _trim(gradient: Tensor) -> None:
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
    return found
