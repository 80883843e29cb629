"""Sources of groups: which groups are trained on at which optimizer step."""

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
    """Why a source has nothing left to train on.

    Attributes:
        why (str): in words, with the setting that decides it.
        success (bool): whether that is because the policy has learned all there is.
    """

    why: str
    success: bool


class Source(ABC):
    """Groups by optimizer step. What a source does not have, such as anything to stop or to log, it leaves out.

    Attributes:
        groups_per_step (int): groups of an optimizer step, of all ranks.
        steps_per_epoch (int): optimizer steps of an epoch.
        score (str | None): the metric that says how well the policy does, if the source measures it.
    """

    groups_per_step: int
    steps_per_epoch: int
    score: str | None = None

    @abstractmethod
    def batch(self, step: int) -> list[list[Group]]:
        """The microbatches of optimizer step ``step`` (1-based), of all ranks' groups; none if they teach nothing."""

    @abstractmethod
    def position(self) -> dict[str, Any]:
        """What a step number means for this source; a checkpoint of another position is refused."""

    def metrics(self, step: int) -> dict[str, float]:
        """What to log of a step's groups."""
        return {}

    def end(self, step: int, most_empty: int) -> End | None:
        """Why no further step would teach anything, if so; asked after each step."""
        return None

    def resume(self, step: int) -> None:
        """Called before the first batch of a run: everything of later steps is of another run."""

    def stop(self) -> None:
        """Ends what is under way; called from another thread when the run has been asked to end."""

    def wait(self) -> None:
        """Waits until what was begun ahead has ended: it may meet other ranks, which must not be gone before."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the step: what JSON can hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores it."""


class OfflineSource(Source):
    """Groups of a dataset, in a shuffled order that depends on seed and epoch alone.

    An optimizer step takes ``accumulation`` microbatches of ``world_size * batch_size`` groups each. The source gives
    every rank the whole of them, so that what an objective needs to know of all ranks' groups is known without
    communication; each rank then trains on its share. Any number of ranks sees the same microbatches as one rank
    with ``world_size * batch_size`` groups.

    The position is the step number and nothing else: resuming needs no iterator state. The groups that do not fill a
    last step are left out of that epoch.

    Args:
        dataset (GroupDataset): the groups; the same on every rank.
        batch_size (int): groups a microbatch and rank.
        accumulation (int): microbatches an optimizer step.
        world_size (int): number of ranks.
        seed (int): seed of the order.
        shuffle (bool): False keeps the dataset's order in every epoch.
        max_steps_per_epoch (int | None): steps after which an epoch ends early, and leaves out the rest of its groups.

    Raises:
        ConfigError: if the dataset does not fill one step.
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
                f"batch_size: a step takes {batch_size} x {accumulation} accumulated x {world_size} ranks = "
                f"{self.groups_per_step} groups, the dataset has {len(dataset)}; lower batch_size or "
                "gradient_accumulation_steps"
            )
        self.steps_per_epoch = min(self.steps_per_epoch, max_steps_per_epoch or self.steps_per_epoch)

    def left_out(self) -> list[str]:
        """What to say of the groups that no step of an epoch takes: a line, or nothing where there are none."""
        used = self.steps_per_epoch * self.groups_per_step
        if used == len(self.dataset):
            return []
        which = "a different choice in each" if self.shuffle else "the last ones"
        return [
            f"dataset: {len(self.dataset) - used:,} of {len(self.dataset):,} groups are left out of every epoch "
            f"({which}): its {self.steps_per_epoch:,} steps take {self.groups_per_step} each"
        ]

    def digest(self) -> str:
        """What the groups are."""
        return f"{len(self.dataset)} groups {self.dataset.digest()}"

    def batch(self, step: int) -> list[list[Group]]:
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        order = self._order(epoch)[index * self.groups_per_step : (index + 1) * self.groups_per_step]
        return [[self.dataset[i] for i in microbatch] for microbatch in order.view(self.accumulation, -1).tolist()]

    def position(self) -> dict[str, Any]:
        return {"shuffle": self.shuffle, "groups": self.digest()}

    def _order(self, epoch: int) -> torch.Tensor:
        count = len(self.dataset)
        if not self.shuffle:
            return torch.arange(count)
        seed = stream_seed("groups of an epoch", self.seed, epoch)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
