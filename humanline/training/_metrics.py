import torch
import torch.distributed as dist
from torch import Tensor

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
"""What an objective measures on one pass: name -> (sum, count); logged is the quotient over passes and ranks."""


class MetricSums:
    """Sums of metrics over passes, reduced over ranks once, when their means are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (total, count) in metrics.items():
            pair = torch.stack([torch.as_tensor(x, device=self._device).detach().double() for x in (total, count)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self) -> dict[str, float]:
        """Means over everything added on all ranks since the last call; a metric without any count is left out."""
        names = list(self._sums)
        table = torch.stack([self._sums[name] for name in names])
        dist.all_reduce(table)
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, table.tolist(), strict=True) if count}
