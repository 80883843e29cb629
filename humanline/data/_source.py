"""Sources of groups: which groups are trained on at which optimizer step."""

import torch

from humanline._seeds import stream_seed
from humanline.data._dataset import GroupDataset
from humanline.data._group import Group
from humanline.errors import ConfigError


class OfflineSource:
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
        """The microbatches of optimizer step ``step`` (1-based), of all ranks' groups."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        order = self._order(epoch)[index * self.groups_per_step : (index + 1) * self.groups_per_step]
        return [[self.dataset[i] for i in microbatch] for microbatch in order.view(self.accumulation, -1).tolist()]

    def metrics(self, step: int) -> dict[str, float]:
        """What to log of a step's groups: nothing, they are what they are."""
        return {}

    def _order(self, epoch: int) -> torch.Tensor:
        count = len(self.dataset)
        if not self.shuffle:
            return torch.arange(count)
        seed = stream_seed("groups of an epoch", self.seed, epoch)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
