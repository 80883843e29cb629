import torch
import torch.distributed as dist
from torch import Tensor

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
"""What an objective measures on one pass: name -> (sum, count); logged is the quotient over passes and ranks."""


class MetricSums:
    """Sums of metrics over passes, reduced over ranks once, when their means are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            totals, counts = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (totals + total, counts + count)

    def means(self) -> dict[str, float]:
        """Means over everything added on all ranks since the last call; a metric without any count is left out."""
        pairs = [torch.as_tensor(x, device=self._device).double() for pair in self._sums.values() for x in pair]
        table = torch.stack(pairs).view(-1, 2)
        dist.all_reduce(table)
        names = list(self._sums)
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, table.tolist(), strict=True) if count}
