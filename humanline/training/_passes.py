"""From the groups of a step to the passes of one rank."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from humanline.data import Group, RowBudget, Rows, Source, TokenBudget, lay_out, pack, parts
from humanline.training._draws import uniform_draws
from humanline.training._objectives import Objective


class Passes:
    """A rank's share of the groups, in passes that the row budget allows.

    Args:
        objective (Objective): says which groups need to stay whole, and what KL sequences there are.
        budget (RowBudget): what a pass may hold.
        limits (TokenBudget): what sequences are cut to.
        device (torch.device): where the passes go.
        seed (int): the run's seed, of humanline sampling's draws.
    """

    def __init__(
        self, objective: Objective, budget: RowBudget, limits: TokenBudget, device: torch.device, seed: int
    ) -> None:
        self.objective, self.budget, self.limits, self.device, self.seed = objective, budget, limits, device, seed
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def of(self, microbatch: list[Group], step: int, index: int) -> Iterator[tuple[Rows, int, Tensor | None]]:
        """This rank's passes of a global microbatch.

        Args:
            microbatch (list[Group]): the groups of all ranks.
            step (int): optimizer step, 1-based.
            index (int): which microbatch of the step it is.

        Returns:
            Iterator[tuple[Rows, int, Tensor | None]]: the rows of each pass; its weight, 0 for one that only keeps the
            other ranks company; and humanline sampling's uniforms ``[2, B, S]``, None without it.
        """
        samples = self.objective.loss.perception == "sample"
        places = self.places(microbatch) if samples else []
        for rows, weight in self.over(self.share(microbatch)):
            draws = uniform_draws(rows, self.seed, step, index, places).to(self.device) if samples else None
            yield rows, weight, None if draws is None else rows.per_response(draws)

    def of_kl(self, microbatch: list[Group]) -> Iterator[tuple[Rows, int]]:
        """This rank's passes of the KL sequences of a global microbatch, with their weights; none without any."""
        return self.over(self.share(self.objective.kl_groups(microbatch, self.limits)))

    def share(self, microbatch: list[Group]) -> list[Group]:
        """This rank's groups of a global microbatch, cut to rows."""
        return self.cut([microbatch[i] for i in self._mine(microbatch)])

    def places(self, microbatch: list[Group]) -> list[int]:
        """For each group of :meth:`share`, the place of its first response among those of the global microbatch."""
        firsts = list(accumulate((len(group.responses) for group in microbatch), initial=0))
        places = []
        for i in self._mine(microbatch):
            sizes = (len(part.responses) for part in self.cut([microbatch[i]]))
            places += list(accumulate(sizes, initial=firsts[i]))[:-1]
        return places

    def _mine(self, microbatch: list[Group]) -> list[int]:
        sizes = [len(group.prompt) + sum(len(response) - 1 for response in group.responses) for group in microbatch]
        return deal(sizes, self.world_size)[self.rank]

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

    def of_step(self, source: Source, step: int) -> Iterator[Rows]:
        """All passes of a step for which the loop asks the reference."""
        for microbatch in source.batch(step):
            yield from (rows for rows, _ in self.of_kl(microbatch))
            yield from (rows for rows, _ in self.over(self.share(microbatch)))


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of some groups each rank takes: the largest first, each to the rank with the fewest tokens so far.

    Ranks wait for the one that makes the most passes. No two of them differ by more than the largest group.

    Args:
        sizes (Sequence[int]): the tokens of each group, at least 1.
        ranks (int): how many ranks there are.

    Returns:
        list[list[int]]: for each rank the indices of its groups, in order.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = tokens.index(min(tokens))
        hands[rank].append(index)
        tokens[rank] += sizes[index]
    return [sorted(hand) for hand in hands]
