"""The distribution of token log-ratios over passes, steps and ranks, as counts of bins."""

import math
from typing import Any

import torch
from torch import Tensor

SMALLEST, LARGEST, BINS = 1e-6, 100.0, 922
"""Nats and bins on each side of 0. A bin is 2% wide; smaller log-ratios count as 0, larger ones as the last bin."""
_WIDTH = math.log(LARGEST / SMALLEST) / BINS
QUANTILES = {"log_ratio/p01": 0.01, "log_ratio/p50": 0.5, "log_ratio/p99": 0.99}


class LogRatios:
    """Counts token log-ratios in bins. Adding them needs no answer from the device.

    Args:
        device (torch.device): the device of the log-ratios.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2 * BINS + 1, dtype=torch.int64, device=device)

    def add(self, log_ratio: Tensor) -> None:
        """Adds log-ratios, nats, any shape; NaN is not counted."""
        values = log_ratio.detach().flatten()
        bins = ((values.abs() / SMALLEST).log() / _WIDTH).floor().nan_to_num(-1.0, BINS, -1.0).clamp(-1, BINS - 1) + 1
        places = BINS + (bins * values.sign().nan_to_num(0.0)).long()
        self.counts.index_add_(0, places, (~values.isnan()).long())

    def merge(self, other: "LogRatios") -> None:
        self.counts += other.counts

    def quantiles(self) -> dict[str, float]:
        """Returns the quantiles, nats, within 1.1% of the value; empty without counts.

        A quantile is the smallest value that the share of log-ratios reaches.
        """
        cumulative = self.counts.cumsum(0)
        total = int(cumulative[-1])
        if total == 0:
            return {}
        ranks = torch.tensor([max(1, math.ceil(share * total)) for share in QUANTILES.values()])
        places = torch.searchsorted(cumulative.cpu(), ranks).tolist()
        return dict(zip(QUANTILES, map(_value, places), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts that are not zero, by bin."""
        return {str(place): count for place, count in enumerate(self.counts.tolist()) if count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for place, count in state.items():
            self.counts[int(place)] = count


def _value(place: int) -> float:
    """Returns the middle of a bin, nats."""
    bin = abs(place - BINS)
    size = SMALLEST * math.exp((bin - 0.5) * _WIDTH) if bin else 0.0
    return math.copysign(size, place - BINS)
