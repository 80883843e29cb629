import torch
import torch.distributed as dist
from torch import Tensor

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
"""What an objective measures on one pass: name -> (sum, count); logged is the quotient over passes and ranks."""


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
