import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, variance


class CollapseWatch:
    """Watches for the collapse that syncing too often can cause.

    In a collapse the signal that training should raise falls, while each step moves the policy further from the
    reference (seen in maths at ``sync_every: 1``, https://arxiv.org/abs/2509.24207).

    The watch compares the older half of the last ``window`` values with the newer half. It warns when the signal's mean
    has fallen and the KL's mean has grown, each by more than three standard errors of the difference. The errors assume
    independent values: correlated neighbours cause more false alarms.

    Args:
        window (int): the number of values to compare, at least 8.
    """

    def __init__(self, window: int) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=window)

    def add(self, signal: float, kl: float) -> str | None:
        """Adds the values of a step. If they suggest a collapse, returns a warning and starts a new window."""
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
            f"{fmean(kls[half:]):.3g}: the policy may be collapsing; resume from an earlier checkpoint with a lower "
            "optimizer.lr or clip_grad_norm, or start a new run with a larger reference.sync_every"
        )

    def state_dict(self) -> list[tuple[float, float]]:
        return list(self._values)

    def load_state_dict(self, state: list[tuple[float, float]]) -> None:
        self._values.extend((signal, kl) for signal, kl in state)


def _rise(values: Sequence[float]) -> float:
    """Returns how many standard errors the newer half's mean is above the older half's mean."""
    half = len(values) // 2
    older, newer = values[:half], values[half:]
    rise = fmean(newer) - fmean(older)
    error = math.sqrt(variance(older) / len(older) + variance(newer) / len(newer))
    return rise / error if error else math.copysign(math.inf, rise) if rise else 0.0
