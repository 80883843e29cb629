from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from humanline.data import best_and_worst
from humanline.losses import PerceptualLoss, token_kl, token_log_ratio, unclamped

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
"""What an objective measures on one pass: name -> (sum, count); logged is the quotient over passes and ranks."""


def perception_metrics(loss: PerceptualLoss, policy: Tensor, reference: Tensor, mask: Tensor) -> Metrics:
    """``kl``, the mean over tokens of ``exp(-l_t) + l_t - 1``, and ``unclamped``, the share of the tokens with non-zero
    ``l_t`` that lie inside the loss's bounds (absent when no token moved).

    Args:
        loss (PerceptualLoss): has the bounds.
        policy (Tensor): token log-probs under the policy, nats, ``[B, S]``.
        reference (Tensor): the same under the reference, ``[B, S]``.
        mask (Tensor): True at response tokens, bool ``[B, S]``.
    """
    log_ratio = token_log_ratio(policy.detach(), reference, mask)
    return {"kl": (token_kl(log_ratio).sum(), mask.sum()), "unclamped": unclamped(log_ratio, mask, *loss.bounds)}


def likelier_best(log_probs: Tensor, values: Sequence[Sequence[float]]) -> tuple[Tensor, int]:
    """In how many groups the best response is likelier than the worst, and in how many there is a best and a worst.

    The parts of a group that was cut count as groups.

    Args:
        log_probs (Tensor): of all the groups' responses, nats, ``[B]``.
        values (Sequence[Sequence[float]]): what each group's responses are worth.
    """
    best, worst, start = [], [], 0
    for group in values:
        if (found := best_and_worst(group)) is not None:
            best.append(start + found[0])
            worst.append(start + found[1])
        start += len(group)
    return (log_probs[best] > log_probs[worst]).sum(), len(best)


class MetricSums:
    """Sums of metrics over passes, in float64, reduced over ranks once, when their means are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            totals, counts = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (totals + _double(total), counts + _double(count))

    def merge(self, other: "MetricSums") -> None:
        """Adds what another has added up."""
        self.add(other._sums)

    def means(self) -> dict[str, float]:
        """Means over everything added on all ranks since the last call; a metric without any count is left out."""
        totals = self.state_dict()
        self._sums.clear()
        return {name: total / count for name, (total, count) in totals.items() if count}

    def state_dict(self) -> dict[str, list[float]]:
        """Sum and count of each metric over all ranks; a collective."""
        if not self._sums:
            return {}
        pairs = [torch.as_tensor(x, device=self._device).double() for pair in self._sums.values() for x in pair]
        table = torch.stack(pairs).view(-1, 2)
        dist.all_reduce(table)
        return dict(zip(self._sums, table.tolist(), strict=True))

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Goes on from the sums of all ranks, of which each takes its part."""
        ranks = dist.get_world_size()
        self._sums = {name: (total / ranks, count / ranks) for name, (total, count) in state.items()}


def _double(value: Tensor | float) -> Tensor | float:
    return value.double() if isinstance(value, Tensor) else value
