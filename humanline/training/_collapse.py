"""The watch for a collapse of the policy, by the metrics that the log has."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, variance
from typing import Any


class CollapseWatch:
    """Watches for the ways in which a policy collapses.

    **Signal.** In the collapse that syncing too often can cause, the signal that training should raise falls, while
    each step moves the policy further from the reference (seen in maths at ``sync_every: 1``,
    https://arxiv.org/abs/2509.24207). The older half of the last ``window`` values is compared with the newer half. The
    signal's mean must have fallen and the KL's mean have grown.

    **Entropy, length, repetition.** The first half window of values is compared with the newest half window, so slow
    changes are found too. There is a warning if ``entropy`` is below a tenth of its first mean, if
    ``rounds/response_tokens`` is below a fifth or above five times its first mean, or if ``rounds/repeated`` is at
    least one half and twice its first mean. A run that starts in this state is not warned of it.

    Each difference must be more than three standard errors. The errors assume independent values: correlated neighbours
    cause more false alarms. After a warning, its values start again, so it comes at most once per window.

    Args:
        signal (str): the metric that training should raise.
        window (int): the number of values to compare, at least 8.
    """

    def __init__(self, signal: str, window: int) -> None:
        self._signal = signal
        self._values: deque[tuple[float, float]] = deque(maxlen=window)
        self._changes = {name: _Change(2 if name.startswith("val/") else window // 2) for name in _WARNINGS}

    def add(self, metrics: Mapping[str, float]) -> list[str]:
        """Adds the metrics of a log entry, and returns a warning for each sign of a collapse.

        Args:
            metrics (Mapping[str, float]): the entry. A metric that is absent or not finite is left out.
        """
        found = [self._fall(metrics.get(self._signal, math.nan), metrics.get("kl", math.nan))]
        for name, change in self._changes.items():
            value = metrics.get(name, math.nan)
            means = change.add(value) if math.isfinite(value) else None
            if means is not None and (warning := _WARNINGS[name](*means)) is not None:
                change.restart()
                found.append(f"{name}: {warning}")
        return [warning for warning in found if warning is not None]

    def _fall(self, signal: float, kl: float) -> str | None:
        """Adds a pair of values. Returns a warning, and starts again, if the signal falls while the KL grows."""
        if not (math.isfinite(signal) and math.isfinite(kl)):
            return None
        self._values.append((signal, kl))
        if len(self._values) < (self._values.maxlen or 0):
            return None
        signals, kls = zip(*self._values, strict=True)
        if _rise(*_halves(signals)) > -3 or _rise(*_halves(kls)) < 3:
            return None
        self._values.clear()
        (before, after), (kl_before, kl_after) = (map(fmean, _halves(values)) for values in (signals, kls))
        return (
            f"{self._signal}: over the last {len(signals)} logged steps the signal fell from {before:.4g} to "
            f"{after:.4g} while the KL to the reference grew from {kl_before:.3g} to {kl_after:.3g}: the policy may be "
            "collapsing; resume from an earlier checkpoint with a lower optimizer.lr or clip_grad_norm, or start a new "
            "run with a larger reference.sync_every"
        )

    def state_dict(self) -> dict[str, Any]:
        changes = {name: change.state_dict() for name, change in self._changes.items()}
        return {"signal": list(self._values), "changes": changes}

    def load_state_dict(self, state: dict[str, Any] | list[tuple[float, float]]) -> None:
        """Restores the state. A list is the state of earlier versions, which watched the signal only."""
        if isinstance(state, list):
            state = {"signal": state, "changes": {}}
        self._values.extend((signal, kl) for signal, kl in state["signal"])
        for name, values in state["changes"].items():
            self._changes[name].load_state_dict(values)


class _Change:
    """The first and the newest values of a metric.

    Args:
        half (int): how many there are of each.
    """

    def __init__(self, half: int) -> None:
        self._first: list[float] = []
        self._newest: deque[float] = deque(maxlen=half)
        self._half = half

    def add(self, value: float) -> tuple[float, float] | None:
        """Adds a value. Returns the means of the first and the newest values if they differ by more than noise."""
        if len(self._first) < self._half:
            self._first.append(value)
            return None
        self._newest.append(value)
        if len(self._newest) < self._half or abs(_rise(self._first, list(self._newest))) < 3:
            return None
        return fmean(self._first), fmean(self._newest)

    def restart(self) -> None:
        self._first.clear()
        self._newest.clear()

    def state_dict(self) -> list[list[float]]:
        return [list(self._first), list(self._newest)]

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Restores the values. Of a run with another window, those that fit."""
        first, newest = state
        self._first.extend(first[: self._half])
        self._newest.extend(newest)


def _entropy(before: float, after: float) -> str | None:
    if after >= before / 10:
        return None
    return (
        f"the policy's entropy fell from {before:.3g} to {after:.3g} nats a token: its responses may soon be all "
        "alike; resume from an earlier checkpoint with a lower optimizer.lr, or start a new run with a higher "
        "source.temperature or a larger reference.sync_every"
    )


def _length(before: float, after: float) -> str | None:
    if before / 5 <= after <= 5 * before:
        return None
    way, kind = ("grew", "long") if after > before else ("shrank", "short")
    return (
        f"responses {way} from {before:.4g} to {after:.4g} tokens in the mean: read output_dir/completions; if the "
        f"reward prefers {kind} responses, correct it, else resume from an earlier checkpoint with a lower optimizer.lr"
    )


def _repeated(before: float, after: float, least: float = 0.5) -> str | None:
    if after < max(least, 2 * before):
        return None
    return (
        f"the share of prompts with the same most frequent response grew from {before:.0%} to {after:.0%}: the policy "
        "ignores its prompts; read output_dir/completions, correct a reward that this response earns, and resume from "
        "an earlier checkpoint with a lower optimizer.lr"
    )


_WARNINGS: dict[str, Callable[[float, float], str | None]] = {
    "entropy": _entropy,
    "rounds/response_tokens": _length,
    "rounds/repeated": _repeated,
    "val/repeated": partial(_repeated, least=0.9),
}
"""By metric: the warning if its mean changed from one value to another, or None."""


def _halves(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    half = len(values) // 2
    return values[:half], values[half:]


def _rise(older: Sequence[float], newer: Sequence[float]) -> float:
    """Returns how many standard errors the newer values' mean is above the older values' mean."""
    rise = fmean(newer) - fmean(older)
    error = math.sqrt(variance(older) / len(older) + variance(newer) / len(newer))
    return rise / error if error else math.copysign(math.inf, rise) if rise else 0.0
