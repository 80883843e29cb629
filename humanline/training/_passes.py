"""Divides the groups of a step into the passes of one rank."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from humanline.data import Group, RowBudget, Rows, Source, TokenBudget, lay_out, pack, parts
from humanline.training._draws import uniform_draws
from humanline.training._objectives import Objective


class Passes:
    """Lays out a rank's share of the groups in passes within the row budget.

    Args:
        objective (Objective): decides whether groups must stay whole, and makes the KL sequences.
        budget (RowBudget): the maximum size of a pass.
        limits (TokenBudget): the maximum length of KL sequences.
        device (torch.device): the device of the passes.
        seed (int): the run's seed, for the draws of humanline sampling.
    """

    def __init__(
        self, objective: Objective, budget: RowBudget, limits: TokenBudget, device: torch.device, seed: int
    ) -> None:
        self.objective, self.budget, self.limits, self.device, self.seed = objective, budget, limits, device, seed
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def of(self, microbatch: list[Group], step: int, index: int) -> Iterator[tuple[Rows, int, Tensor | None]]:
        """Yields this rank's passes of a global microbatch.

        Args:
            microbatch (list[Group]): the groups of all ranks.
            step (int): optimizer step, 1-based.
            index (int): the index of the microbatch in the step.

        Returns:
            Iterator[tuple[Rows, int, Tensor | None]]: the rows of each pass; its weight, 0 if the pass only matches
            another rank's pass; and the uniforms of humanline sampling ``[2, B, S]``, None without it.
        """
        samples = self.objective.loss.perception == "sample"
        places = self.places(microbatch) if samples else []
        for rows, weight in self.over(self.share(microbatch)):
            draws = None
            if samples:
                uniforms = uniform_draws(rows, self.seed, step, index, places)
                draws = rows.per_response(uniforms.to(self.device, non_blocking=True))
            yield rows, weight, draws

    def of_kl(self, microbatch: list[Group]) -> Iterator[tuple[Rows, int]]:
        """Returns this rank's passes of a global microbatch's KL sequences, with their weights."""
        return self.over(self.share(self.objective.kl_groups(microbatch, self.limits)))

    def share(self, microbatch: list[Group]) -> list[Group]:
        """Returns this rank's groups of a global microbatch, cut to rows."""
        return self.cut([microbatch[i] for i in self._mine(microbatch)])

    def places(self, microbatch: list[Group]) -> list[int]:
        """Returns for each group of :meth:`share` the index of its first response in the global microbatch."""
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
        """Cuts groups into parts that fit in a row, unless the objective needs whole groups."""
        if self.objective.whole_groups:
            return groups
        return [part for group in groups for part in parts(group, self.budget)]

    def over(self, groups: list[Group]) -> Iterator[tuple[Rows, int]]:
        """Yields the passes of groups, with weight 1. Ranks with fewer passes than others add passes of weight 0."""
        if not groups:  # on no rank
            return
        planned = pack(groups, self.budget)
        most = torch.tensor(len(planned))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        for index in range(int(most)):
            rows = lay_out(groups, planned[min(index, len(planned) - 1)], self.budget)
            yield rows.to(self.device), int(index < len(planned))

    def of_step(self, source: Source, step: int) -> Iterator[Rows]:
        """Yields all passes of a step for which the loop needs reference log-probs."""
        for microbatch in source.batch(step):
            yield from (rows for rows, _ in self.of_kl(microbatch))
            yield from (rows for rows, _ in self.over(self.share(microbatch)))


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Assigns groups to ranks: the largest first, each to the rank with the fewest tokens so far.

    This balances the ranks, which wait for the one with the most passes. The tokens of two ranks differ by at most the
    largest group.

    Args:
        sizes (Sequence[int]): the tokens of each group, at least 1.
        ranks (int): number of ranks.

    Returns:
        list[list[int]]: for each rank the indices of its groups, in ascending order.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = tokens.index(min(tokens))
        hands[rank].append(index)
        tokens[rank] += sizes[index]
    return [sorted(hand) for hand in hands]
