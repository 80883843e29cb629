"""Exchanges small values between ranks. Every function is a collective: all ranks of a group must call it together."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune.utils import get_logger

from humanline.errors import ConfigError, DataError, Stopped, TrainingError

T = TypeVar("T")

log = get_logger("INFO")


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns every rank's value, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def first_error(error: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """Returns the error of the first rank that has one, on all ranks."""
    return next((each for each in gathered(error, group) if each is not None), None)


def on_any_rank(*here: bool) -> list[bool]:
    """Returns for each flag whether any rank sets it."""
    flags = torch.tensor(here, dtype=torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def summed(values: Tensor) -> Tensor:
    """Returns the sum of every rank's tensor, without gradient."""
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def together(
    call: Callable[[], T], group: dist.ProcessGroup | None = None, *, task: str, on_rank_0: bool = False
) -> list[T]:
    """Returns the results of every rank's call, in rank order. If any rank fails, all ranks raise its error.

    Args:
        call (Callable[[], T]): this rank's call.
        group (dist.ProcessGroup | None): the ranks that take part; None for all.
        task (str): name of the task, for the message of an error that humanline did not raise.
        on_rank_0 (bool): only rank 0 calls, and the other ranks wait. Its result is the list's first element.

    Raises:
        Exception: :class:`Stopped`, ConfigError, DataError or TrainingError, the same on all ranks.
    """
    mine: T | None = None
    failure: tuple[type[Exception], str] | None = None  # not every error can be pickled
    try:
        mine = None if on_rank_0 and dist.get_rank(group) else call()
    except (ConfigError, DataError, TrainingError) as error:
        kinds = (Stopped, ConfigError, DataError, TrainingError)
        failure = next(kind for kind in kinds if isinstance(error, kind)), str(error)
    except OSError as error:
        failure = TrainingError, f"{task}: {error}"
    except Exception as error:  # a user's component can raise anything
        log.exception(f"rank {dist.get_rank()}: {task} failed")
        said = " ".join(repr(error).split())[:300]
        failure = TrainingError, f"rank {dist.get_rank()}: {task} failed ({said})"
    everyone = gathered((mine, failure), group)
    for _, each in everyone:
        if each is not None:
            kind, message = each
            raise kind(message)
    return [each for each, _ in everyone]


def check_same(values: Mapping[str, Any]) -> None:
    """Checks that values are the same on all ranks.

    Args:
        values (Mapping[str, Any]): this rank's values, by name.

    Raises:
        ConfigError: on all ranks, for the first value that differs from rank 0's.
    """
    first, *others = gathered(dict(values))
    for rank, theirs in enumerate(others, start=1):
        for name in dict.fromkeys((*first, *theirs)):
            if first.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{name}: expected the same on all ranks, got {first.get(name)} on rank 0 and {theirs.get(name)} "
                    f"on rank {rank}"
                )
