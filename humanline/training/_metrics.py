import math
from collections.abc import Sequence
from statistics import pstdev
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from humanline.data import Group, Rows, best_and_worst
from humanline.losses import PerceptualLoss, token_kl, token_log_ratio, unclamped
from humanline.training._log_ratios import LogRatios

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
"""The metrics of one pass: name -> (sum, count). The log has the quotient over passes and ranks."""


def perception_metrics(loss: PerceptualLoss, policy: Tensor, reference: Tensor, mask: Tensor) -> Metrics:
    """Returns the metrics of the log-ratios ``l_t``: ``kl``, ``unclamped``, ``clipped/below`` and ``clipped/above``.

    ``kl`` is the mean over tokens of ``exp(-l_t) + l_t - 1``. ``unclamped`` is the share of tokens with non-zero
    ``l_t`` that lie inside the loss's bounds, and the other two are the shares below and above them. They are absent if
    all ``l_t`` are zero.

    Args:
        loss (PerceptualLoss): the loss, for its bounds.
        policy (Tensor): token log-probs under the policy, nats, ``[B, S]``.
        reference (Tensor): the same under the reference, ``[B, S]``.
        mask (Tensor): True at response tokens, bool ``[B, S]``.
    """
    log_ratio = token_log_ratio(policy.detach(), reference, mask)
    inside, moved = unclamped(log_ratio, mask, *loss.bounds)
    low, high = loss.bounds
    return {
        "kl": (token_kl(log_ratio).sum(), mask.sum()),
        "unclamped": (inside, moved),
        "clipped/below": (0 if low is None else (log_ratio < low).sum(), moved),
        "clipped/above": (0 if high is None else (log_ratio > high).sum(), moved),
    }


def mismatch_metrics(policy_logps: Tensor, rows: Rows) -> Metrics:
    """Compares the policy's log-probs with those of the engine that sampled the responses.

    With ``d`` the policy's log-prob of a token less the engine's, ``mismatch/mean`` is the mean of ``|d|``,
    ``mismatch/large`` the share of tokens with ``|d|`` above 0.1 nats, and ``mismatch/kl`` the mean of
    ``exp(d) - d - 1``, an estimate of the KL of engine to policy. There is none if the rows have no log-probs of the
    engine, or the policy has changed since.

    Args:
        policy_logps (Tensor): log-probs of the pass's response tokens under the policy, nats, ``[N]``.
        rows (Rows): the pass.
    """
    if rows.sampler_logps is None:
        return {}
    difference = policy_logps.detach() - rows.sampler_logps
    count, size = len(difference), difference.abs()
    return {
        "mismatch/mean": (size.sum(), count),
        "mismatch/large": ((size > 0.1).sum(), count),
        "mismatch/kl": (token_kl(-difference).sum(), count),
    }


def group_metrics(batch: Sequence[Sequence[Group]]) -> Metrics:
    """Returns the metrics of a step's groups: ``responses/length`` and, with scores, ``rewards/std``.

    ``responses/length`` is the mean number of tokens in a response. ``rewards/std`` is the mean over groups of the
    population standard deviation of a group's scores. Nothing is read from the device.

    Args:
        batch (Sequence[Sequence[Group]]): the microbatches, with the whole groups of all ranks.
    """
    groups = [group for microbatch in batch for group in microbatch]
    lengths = [len(response) for group in groups for response in group.responses]
    spreads = [pstdev(group.scores) for group in groups if group.scores]
    return {"responses/length": (sum(lengths), len(lengths)), "rewards/std": (math.fsum(spreads), len(spreads))}


def likelier_best(log_probs: Tensor, values: Sequence[Sequence[float]]) -> tuple[Tensor, int]:
    """Counts groups whose best response is likelier than the worst, and groups with a best and a worst response.

    If a group was cut, each part counts as a group.

    Args:
        log_probs (Tensor): log-probs of all groups' responses, nats, ``[B]``.
        values (Sequence[Sequence[float]]): the labels or scores of each group's responses.
    """
    pairs, start = [], 0
    for group in values:
        if (found := best_and_worst(group)) is not None:
            pairs.append([start + place for place in found])
        start += len(group)
    # Not by lists of places: the host would wait for their copy to the device.
    places = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).to(log_probs.device, non_blocking=True)
    best, worst = log_probs[places].unbind(1)
    return (best > worst).sum(), len(pairs)


_LOG_RATIOS = "log_ratios"


class MetricSums:
    """Sums metrics over passes, in float64. They are reduced over ranks once, when the means are requested.

    Args:
        device (torch.device): the device of the metrics.

    Attributes:
        log_ratios (LogRatios): the distribution of token log-ratios, from which :meth:`means` takes quantiles.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self.log_ratios = LogRatios(device)

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            totals, counts = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (totals + _double(total), counts + _double(count))

    def merge(self, other: "MetricSums") -> None:
        """Adds the sums of ``other``."""
        self.add(other._sums)
        self.log_ratios.merge(other.log_ratios)

    def means(self) -> dict[str, float]:
        """Returns the means of all values added on all ranks since the last call, without metrics of count 0."""
        totals, log_ratios = self._totals()
        self._sums.clear()
        self.log_ratios = LogRatios(self._device)
        return {name: total / count for name, (total, count) in totals.items() if count} | log_ratios.quantiles()

    def state_dict(self) -> dict[str, Any]:
        """Returns sum and count of each metric over all ranks, and the counts of log-ratios. Collective."""
        totals, log_ratios = self._totals()
        return totals | ({_LOG_RATIOS: log_ratios.state_dict()} if totals else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the sums of all ranks; each rank keeps an equal share, and rank 0 the counts of log-ratios."""
        ranks = dist.get_world_size()
        self._sums = {name: (pair[0] / ranks, pair[1] / ranks) for name, pair in state.items() if name != _LOG_RATIOS}
        if dist.get_rank() == 0:
            self.log_ratios.load_state_dict(state.get(_LOG_RATIOS, {}))

    def _totals(self) -> tuple[dict[str, list[float]], LogRatios]:
        """Returns the sums and counts over all ranks. Collective."""
        if not self._sums:
            return {}, LogRatios(self._device)
        pairs = [torch.as_tensor(x, device=self._device).double() for pair in self._sums.values() for x in pair]
        table = torch.cat([torch.stack(pairs), self.log_ratios.counts.double()])
        dist.all_reduce(table)
        table = table.cpu()
        log_ratios = LogRatios(torch.device("cpu"))
        log_ratios.counts += table[len(pairs) :].long()
        return dict(zip(self._sums, table[: len(pairs)].view(-1, 2).tolist(), strict=True)), log_ratios


def _double(value: Tensor | float) -> Tensor | float:
    return value.double() if isinstance(value, Tensor) else value
