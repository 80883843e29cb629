import functools
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention


@functools.cache
def flex() -> Any:
    """Returns FlexAttention, compiled if there are kernels for it."""
    return torch.compile(flex_attention, dynamic=False) if torch.cuda.is_available() else flex_attention
