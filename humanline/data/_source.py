"""Sources of groups: they decide which groups each optimizer step trains on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from humanline._seeds import stream_seed
from humanline.data._dataset import GroupDataset
from humanline.data._group import Group
from humanline.errors import ConfigError


@dataclass(frozen=True)
class End:
    """The reason why a source has nothing left to train on.

    Attributes:
        why (str): the reason in words, with the setting that decides it.
        success (bool): True if training ends because the policy has nothing left to learn.
    """

    why: str
    success: bool


class Source(ABC):
    """Groups by optimizer step.

    Methods that are not abstract have defaults; a source overrides only those that it needs.

    Attributes:
        groups_per_step (int): groups in an optimizer step, summed over all ranks.
        steps_per_epoch (int): optimizer steps in an epoch.
        score (str | None): name of the metric that measures the policy; None if the source measures none.
    """

    groups_per_step: int
    steps_per_epoch: int
    score: str | None = None

    @abstractmethod
    def batch(self, step: int) -> list[list[Group]]:
        """Returns the microbatches of optimizer step ``step`` (1-based), with the groups of all ranks.

        The list is empty if the step's groups teach nothing.
        """

    @abstractmethod
    def position(self) -> dict[str, Any]:
        """Identifies what a step number means for this source; a checkpoint with another position cannot be resumed."""

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics to log for the groups of ``step``."""
        return {}

    def ended_round(self, step: int) -> tuple[int, list[Group]] | None:
        """Returns number and scored groups of the round that ends with ``step``; None if none ends, or has groups."""
        return None

    def end(self, step: int, most_empty: int) -> End | None:
        """Returns why training should end after ``step``, or None to continue; called after each step.

        Args:
            step (int): the step that has just ended.
            most_empty (int): the source ends after this many empty rounds in a row.
        """
        return None

    def resume(self, step: int) -> None:
        """Prepares for a run that continues after ``step``; called before the first batch.

        Data kept from later steps belongs to another run.
        """

    def stop(self) -> None:
        """Interrupts work in progress; called from another thread when the run must end."""

    def wait(self) -> None:
        """Waits for background work to end, because it may communicate with ranks that must still be running."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs besides the step; JSON-serializable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from :meth:`state_dict`."""


class OfflineSource(Source):
    """Groups of a dataset, in a shuffled order that depends only on seed and epoch.

    An optimizer step consumes ``accumulation`` microbatches of ``world_size * batch_size`` groups each. Every rank
    gets the groups of all ranks, so objectives need no communication to know them, and trains on its share. Any
    number of ranks sees the same microbatches as one rank with ``world_size * batch_size`` groups.

    The position is the step number alone, so resuming needs no iterator state. Groups that do not fill a last step
    are left out of that epoch.

    Args:
        dataset (GroupDataset): the groups; the same on every rank.
        batch_size (int): groups per microbatch and rank.
        accumulation (int): microbatches per optimizer step.
        world_size (int): number of ranks.
        seed (int): seed of the order.
        shuffle (bool): False keeps the dataset's order in every epoch.
        max_steps_per_epoch (int | None): most steps per epoch; the epoch's other groups are left out. None sets no
            limit.

    Raises:
        ConfigError: if the dataset has too few groups for one step.
    """

    def __init__(
        self,
        dataset: GroupDataset,
        *,
        batch_size: int,
        accumulation: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        max_steps_per_epoch: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.budget = dataset.budget
        self.accumulation = accumulation
        self.seed = seed
        self.shuffle = shuffle
        self.groups_per_step = batch_size * accumulation * world_size
        self.steps_per_epoch = len(dataset) // self.groups_per_step
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"batch_size: a step needs {batch_size} x {accumulation} accumulated x {world_size} ranks = "
                f"{self.groups_per_step} groups, but the dataset has {len(dataset)}; lower batch_size or "
                "gradient_accumulation_steps"
            )
        self.steps_per_epoch = min(self.steps_per_epoch, max_steps_per_epoch or self.steps_per_epoch)

    def left_out(self) -> list[str]:
        """Returns a line to log about groups that no step of an epoch uses; an empty list if there are none."""
        used = self.steps_per_epoch * self.groups_per_step
        if used == len(self.dataset):
            return []
        which = "a different choice in each" if self.shuffle else "the last ones"
        return [
            f"dataset: {len(self.dataset) - used:,} of {len(self.dataset):,} groups are left out of every epoch "
            f"({which}): its {self.steps_per_epoch:,} steps use {self.groups_per_step} each"
        ]

    def digest(self) -> str:
        """Identifies the dataset: its number of groups and their digest."""
        return f"{len(self.dataset)} groups {self.dataset.digest()}"

    def batch(self, step: int) -> list[list[Group]]:
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        order = self._order(epoch)[index * self.groups_per_step : (index + 1) * self.groups_per_step]
        return [[self.dataset[i] for i in microbatch] for microbatch in order.view(self.accumulation, -1).tolist()]

    def position(self) -> dict[str, Any]:
        return {"shuffle": self.shuffle, "groups": self.digest()}

    def metrics(self, step: int) -> dict[str, float]:
        return {"dropped_rows": self.dataset.dropped}

    def _order(self, epoch: int) -> torch.Tensor:
        count = len(self.dataset)
        if not self.shuffle:
            return torch.arange(count)
        seed = stream_seed("groups of an epoch", self.seed, epoch)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
