import torch
from torch import Tensor

from humanline.data import Group, Rows
from humanline.distributed import gathered


class NonFinite:
    """Counts steps whose loss or gradient is not finite, and finds the groups that caused it.

    Attributes:
        total (int): such steps in the whole run.
        in_a_row (int): consecutive such steps up to the last one.
    """

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0
        self._passes: list[tuple[tuple[Group, ...], Tensor, Tensor]] = []

    def watch(self, rows: Rows, log_ratio: Tensor, loss: Tensor) -> None:
        """Records a pass of this step: the log-ratio of its response tokens ``[N]``, and its loss (scalar)."""
        broken = rows.per_response((~log_ratio.detach().isfinite()).float()).any(1)
        self._passes.append((rows.groups, broken, loss.detach()))

    def loss_is_finite(self) -> bool:
        """Returns whether this rank's losses of this step are finite."""
        return bool(torch.stack([loss for _, _, loss in self._passes]).isfinite().all())

    def count(self, finite: bool) -> None:
        """Counts this step, and clears its passes."""
        self.total += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self._passes.clear()

    def culprits(self) -> list[str]:
        """Returns the ids of the groups at fault on all ranks. Collective.

        These are the groups with a log-prob that is not finite. If there are none: the groups of passes whose loss is
        not finite, else all groups of the step.
        """
        mine: tuple[list[str], list[str], list[str]] = ([], [], [])
        for groups, broken, loss in self._passes:
            responses = iter(broken.tolist())
            for group in groups:
                if any([next(responses) for _ in group.responses]):  # noqa: C419, consumes all of the group's
                    mine[0].append(group.id)
                if not loss.isfinite():
                    mine[1].append(group.id)
                mine[2].append(group.id)
        ranks = gathered(mine)
        return next(
            (ids for kind in zip(*ranks, strict=True) if (ids := sorted({i for each in kind for i in each}))), []
        )

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
