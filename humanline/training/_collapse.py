import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, variance


class CollapseWatch:
    """Watches for the collapse that syncing too often can bring: what training raises falls, while each step moves the
    policy further from the reference that follows it (https://arxiv.org/abs/2509.24207 saw it at ``sync_every: 1`` in
    maths).

    Over the last ``window`` values it compares the older half with the newer one. It warns when the signal's mean has
    fallen and that of the KL has grown, each by more than three standard errors of the difference. The errors are those
    of independent values: where neighbouring ones go together, false alarms come more often.

    Args:
        window (int): how many values, at least 8.
    """

    def __init__(self, window: int) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=window)

    def add(self, signal: float, kl: float) -> str | None:
        """Notes the values of a step; returns what to warn of, and begins a new window when there is something."""
        if math.isfinite(signal) and math.isfinite(kl):
            self._values.append((signal, kl))
        if len(self._values) < (self._values.maxlen or 0):
            return None
        signals, kls = zip(*self._values, strict=True)
        if _rise(signals) > -3 or _rise(kls) < 3:
            return None
        half = len(signals) // 2
        steps = len(signals)
        self._values.clear()
        return (
            f"over the last {steps} logged steps the signal fell from {fmean(signals[:half]):.4g} to "
            f"{fmean(signals[half:]):.4g} while the KL to the reference grew from {fmean(kls[:half]):.3g} to "
            f"{fmean(kls[half:]):.3g}: the policy may be collapsing; go on from an earlier checkpoint with a lower "
            "optimizer.lr or clip_grad_norm, or start anew with a larger reference.sync_every"
        )

    def state_dict(self) -> list[tuple[float, float]]:
        return list(self._values)

    def load_state_dict(self, state: list[tuple[float, float]]) -> None:
        self._values.extend((signal, kl) for signal, kl in state)


def _rise(values: Sequence[float]) -> float:
    """By how many standard errors the mean of the newer half is above that of the older one."""
    half = len(values) // 2
    older, newer = values[:half], values[half:]
    rise = fmean(newer) - fmean(older)
    error = math.sqrt(variance(older) / len(older) + variance(newer) / len(newer))
    return rise / error if error else math.copysign(math.inf, rise) if rise else 0.0
