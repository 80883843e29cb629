from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from humanline.data import Group, GroupDataset, Rows
from humanline.models import LogProbDecoder, fixed_log_probs
from humanline.training._metrics import Metrics, MetricSums
from humanline.training._passes import Passes

CPU = torch.device("cpu")


class Measure(Protocol):
    """A recipe's ``loss_and_metrics``; KTO's has a further argument ``kl``."""

    def __call__(
        self, policy: Tensor, reference: Tensor, rows: Rows, draws: Tensor | None, /, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Metrics]: ...


KLBaseline = Callable[[Iterable[tuple[Rows, int, Tensor]]], Tensor]


class HeldOut:
    """Computes the objective's metrics on held-out groups, against the initial policy.

    A synced reference moves with the policy and would show no progress. So the initial log-probs are computed once, and
    kept on the host.

    Args:
        dataset (GroupDataset): the held-out groups.
        passes (Passes): lays them out for this rank.
        policy (LogProbDecoder): the policy, with its initial weights.
        measure (Measure): the recipe's ``loss_and_metrics``.
        kl_baseline (KLBaseline | None): the recipe's ``kl_baseline``, whose result ``measure`` receives as ``kl``; None
            if the objective has none.
    """

    def __init__(
        self,
        dataset: GroupDataset,
        passes: Passes,
        policy: LogProbDecoder,
        measure: Measure,
        kl_baseline: KLBaseline | None = None,
    ) -> None:
        self.loss = passes.objective.loss
        self.policy, self.measure, self.kl_baseline = policy, measure, kl_baseline
        self.device = passes.device
        groups = list(dataset)
        self.passes, self.kl_passes = (
            [
                (rows.to(CPU), weight, fixed_log_probs(policy, rows).cpu())
                for rows, weight in _shared_out(passes.cut(part), passes)
            ]
            for part in (groups, passes.objective.kl_groups(groups, dataset.budget))
        )

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Returns the means over all groups under the current policy. Collective."""
        sums = MetricSums(self.device)
        baseline = {} if self.kl_baseline is None else {"kl": self.kl_baseline(self._here(self.kl_passes))}
        for rows, weight, initial_logps in self._here(self.passes):
            loss, metrics = self.measure(fixed_log_probs(self.policy, rows), initial_logps, rows, None, **baseline)
            metrics |= {"loss": (loss, self.loss.num_terms(rows.lengths))}
            sums.add(metrics if weight else dict.fromkeys(metrics, (0, 0)))
        return sums.means()

    def _here(self, passes: list[tuple[Rows, int, Tensor]]) -> Iterator[tuple[Rows, int, Tensor]]:
        return ((rows.to(self.device), weight, logps.to(self.device)) for rows, weight, logps in passes)


def _shared_out(groups: list[Group], passes: Passes) -> Iterator[tuple[Rows, int]]:
    """Yields this rank's passes of the groups; a rank without groups repeats the first group with weight 0."""
    if groups:
        share = groups[passes.rank :: passes.world_size]
        for rows, weight in passes.over(share or groups[:1]):
            yield rows, weight if share else 0
