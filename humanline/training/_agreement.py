"""What all ranks have to know alike."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from humanline.errors import ConfigError


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


def check_same(values: Mapping[str, Any]) -> None:
    """Compares what has to be the same on all ranks; a collective.

    Args:
        values (Mapping[str, Any]): this rank's values, by what they are.

    Raises:
        ConfigError: on all ranks, with the first value that differs from that of rank 0.
    """
    first, *others = gathered(dict(values))
    for rank, theirs in enumerate(others, start=1):
        for name in dict.fromkeys((*first, *theirs)):
            if first.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{name}: is {first.get(name)} on rank 0 and {theirs.get(name)} on rank {rank}; all ranks need the "
                    "same"
                )
