"""What all ranks have to know alike."""

from typing import Any

import torch
import torch.distributed as dist


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def first_error(error: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The error of the first rank that has one, on all ranks."""
    return next((each for each in gathered(error, group) if each is not None), None)


def on_any_rank(*here: bool) -> list[bool]:
    """For each flag, whether any rank raises it."""
    flags = torch.tensor(here, dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()
