"""From the groups of a step to the passes of one rank."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from humanline.data import Group, OfflineSource, RowBudget, Rows, lay_out, pack, parts
from humanline.rollout import OnlineSource
from humanline.training._objectives import Objective


class Passes:
    """A rank's share of the groups, in passes that the row budget allows.

    Args:
        source (OfflineSource | OnlineSource): the groups.
        objective (Objective): says which groups need to stay whole, and what KL sequences there are.
        budget (RowBudget): what a pass may hold.
        device (torch.device): where the passes go.
    """

    def __init__(
        self,
        source: OfflineSource | OnlineSource,
        objective: Objective,
        budget: RowBudget,
        device: torch.device,
    ) -> None:
        self.source = source
        self.objective = objective
        self.budget = budget
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def share(self, microbatch: list[Group]) -> list[Group]:
        """This rank's groups of a global microbatch, cut to rows."""
        return self.cut(microbatch[self.first(microbatch) : self.first(microbatch, self.rank + 1)])

    def first(self, microbatch: list[Group], rank: int | None = None) -> int:
        """Where a rank's groups begin in a global microbatch, this rank's if none is named."""
        return len(microbatch) * (self.rank if rank is None else rank) // self.world_size

    def kl_share(self, microbatch: list[Group]) -> list[Group]:
        """This rank's KL sequences of a global microbatch; none for an objective without them."""
        return self.share(self.objective.kl_groups(microbatch, self.source.budget))

    def cut(self, groups: list[Group]) -> list[Group]:
        """The groups, cut into parts of a row where the objective does not need them whole."""
        if self.objective.whole_groups:
            return groups
        return [part for group in groups for part in parts(group, self.budget)]

    def over(self, groups: list[Group]) -> Iterator[tuple[Rows, int]]:
        """The passes of groups, with weight 1; all ranks make the same number, the missing ones with weight 0."""
        if not groups:  # on no rank
            return
        planned = pack(groups, self.budget)
        most = torch.tensor(len(planned))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        for index in range(int(most)):
            rows = lay_out(groups, planned[min(index, len(planned) - 1)], self.budget)
            yield rows.to(self.device), int(index < len(planned))

    def of_step(self, step: int) -> Iterator[Rows]:
        """All passes of a step for which the loop asks the reference."""
        for microbatch in self.source.batch(step):
            for groups in (self.kl_share(microbatch), self.share(microbatch)):
                yield from (rows for rows, _ in self.over(groups))
