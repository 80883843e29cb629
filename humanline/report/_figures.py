"""The figures of a report, as data: what each shows, and how runs are laid over one another."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
import torch

from humanline.perception import capacity
from humanline.report._run_log import RunLog

# Okabe and Ito's colours, which people with any colour vision tell apart, without black and yellow.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Plot:
    """A figure of metrics over steps.

    Attributes:
        title (str): its heading.
        unit (str): label of the vertical axis.
        metrics (tuple[str, ...]): what it shows, each also as ``val/NAME`` where a run has that.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]


SECTIONS: dict[str, tuple[Plot, ...]] = {
    "Training": (
        Plot("Loss", "loss", ("loss",)),
        Plot("Margins and gains", "", ("rewards/margins", "rewards/gain", "advantages/gain")),
        Plot(
            "Rewards by label",
            "",
            ("rewards/chosen", "rewards/rejected", "rewards/desirable", "rewards/undesirable", "kl_baseline"),
        ),
        Plot("Accuracy", "share", ("rewards/accuracies", "log_probs/accuracies")),
        Plot(
            "Log-probs",
            "nats a response",
            ("log_probs/chosen", "log_probs/rejected", "log_probs/desirable", "log_probs/undesirable"),
        ),
        Plot("Reward", "score", ("rounds/reward", "rewards/mean")),
        Plot("Spread of scores within a group", "score", ("rounds/reward_std", "rewards/std", "advantages/abs")),
        Plot("Entropy", "nats a token", ("entropy",)),
        Plot("Length of responses", "tokens", ("responses/length", "rounds/response_tokens")),
        Plot("Gradient norm", "norm", ("grad_norm",)),
        Plot("Learning rate", "rate", ("lr",)),
    ),
    "Perception": (
        Plot("KL to the reference", "nats a token", ("kl",)),
        Plot("Tokens outside of the bounds", "share", ("clipped/below", "clipped/above", "clipped/ppo")),
    ),
    "Rounds": (
        Plot("Prompts and groups left out", "count", ("rounds/dropped", "rounds/unused", "dropped_rows")),
        Plot("Empty rounds", "count", ("rounds/empty", "empty_rounds")),
        Plot("Cut and repeated responses", "share", ("rounds/truncated", "rounds/repeated", "val/repeated")),
        Plot("Staleness", "steps", ("staleness",)),
        Plot("Time of a round", "s", ("rounds/seconds", "rounds/waited")),
        Plot("Sampled tokens of a round", "tokens", ("rounds/tokens",)),
        Plot("Sampler and trainer", "nats a token", ("mismatch/mean", "mismatch/kl")),
        Plot("Sampler and trainer: tokens above 0.1 nats", "share", ("mismatch/large",)),
    ),
    "Speed and memory": (
        Plot("Throughput", "tokens/s", ("tokens_per_second",)),
        Plot("Peak memory", "GiB", ("peak_memory_active", "peak_memory_alloc", "peak_memory_reserved")),
        Plot("Skipped steps", "count", ("skipped_steps",)),
    ),
}
_ELSEWHERE = {"steps_since_sync", "unclamped"}  # the marks of syncs; the rest of the tokens outside of the bounds
_LOG_RATIOS = ("log_ratio/p99", "log_ratio/p50", "log_ratio/p01")


def figures(runs: Sequence[RunLog]) -> dict[str, list[go.Figure]]:
    """Returns the figures of each section that have data."""
    known = {metric for plots in SECTIONS.values() for plot in plots for metric in plot.metrics}
    known |= _ELSEWHERE | set(_LOG_RATIOS)
    logged = {metric.removeprefix("val/") for run in runs for metric in run.metrics}
    others = tuple(Plot(metric, "", (metric,)) for metric in sorted(logged - known - {"repeated"}))
    found: dict[str, list[go.Figure]] = {}
    for section, plots in {**SECTIONS, "Other metrics": others}.items():
        drawn = [over_steps(plot, runs) for plot in plots if any(True for _ in _series(plot, runs))]
        if section == "Perception" and any(run.metrics.keys() & set(_LOG_RATIOS) for run in runs):
            drawn = [log_ratios(runs), capacity_curve(), *drawn]
        if drawn:
            found[section] = drawn
    return found


def over_steps(plot: Plot, runs: Sequence[RunLog]) -> go.Figure:
    """Draws metrics over steps. Several runs differ by colour and their metrics by dash; those of one run by colour."""
    several = len(runs) > 1
    figure = _empty(plot.title, plot.unit)
    for place, index, metric, run in _series(plot, runs):
        values, dash = run.metrics[metric], _DASHES[place % len(_DASHES)] if several else "solid"
        figure.add_scatter(
            x=[*values],
            y=[*map(_finite, values.values())],
            name=f"{run.name}: {metric}" if several else metric,
            mode="lines+markers" if metric.startswith("val/") or len(values) < 3 else "lines",
            line={"color": _color(index if several else place), "dash": dash},
            showlegend=not several,
        )
    for place, metric in (
        dict.fromkeys((place, metric) for place, _, metric, _ in _series(plot, runs)) if several else ()
    ):
        line = {"color": "#888888", "dash": _DASHES[place % len(_DASHES)]}
        figure.add_scatter(x=[None], y=[None], name=metric, mode="lines", line=line)
    _fit_axis(figure, plot, [[*run.metrics[metric].values()] for _, _, metric, run in _series(plot, runs)])
    return figure


def log_ratios(runs: Sequence[RunLog]) -> go.Figure:
    """Draws the median and the outer percentiles of token log-ratios, the clip's bounds, and the syncs."""
    several = len(runs) > 1
    figure = _empty("Token log-ratios, 1st to 99th percentile", "nats")
    figure.update_layout(showlegend=not several)
    for index, run in enumerate(runs):
        values = [run.metrics.get(metric, {}) for metric in _LOG_RATIOS]
        if not all(values):
            continue
        color, name = _color(index), f"{run.name}: " if several else ""
        high, middle, low = ({"x": [*each], "y": [*map(_finite, each.values())]} for each in values)
        edge = {"mode": "lines", "line": {"width": 0}, "showlegend": False}
        figure.add_scatter(**high, **edge, name=f"{name}99th percentile")
        figure.add_scatter(**low, **edge, name=f"{name}1st percentile", fill="tonexty", fillcolor=_faint(color))
        figure.add_scatter(**middle, mode="lines", line={"color": color}, name=f"{name}median")
        steps = [min(values[1]), max(values[1])]
        for bound, label in zip(run.bounds, ("log_eps_P", "log_eps_R"), strict=True):
            if bound is not None:
                figure.add_scatter(
                    x=steps,
                    y=[bound, bound],
                    mode="lines",
                    line={"color": color, "dash": "dash"},
                    name=f"{name}{label} {bound:g}",
                )
        if shown := [step for step in run.syncs if step >= steps[0]]:
            marker = {"symbol": "line-ns-open", "size": 9, "color": color}
            figure.add_scatter(x=shown, y=[0] * len(shown), mode="markers", marker=marker, name=f"{name}syncs")
    return figure


def capacity_curve() -> go.Figure:
    """Draws how likely a probability feels: the curve that the clip stands for."""
    figure = _empty("Capacity: how likely a probability feels", "perceived", x="probability")
    a = torch.linspace(0, 1, 101, dtype=torch.float64)
    figure.add_scatter(x=a.tolist(), y=capacity(a, 0.61).tolist(), name="gamma 0.61", line={"color": COLORS[0]})
    figure.add_scatter(x=[0, 1], y=[0, 1], name="unperceived", line={"color": "#888888", "dash": "dash"})
    return figure


def _series(plot: Plot, runs: Sequence[RunLog]) -> Iterator[tuple[int, int, str, RunLog]]:
    """Yields each curve of a figure: the metric's place and the run's, the metric, and the run.

    Counts that are all 0 have none.
    """
    names = [name for metric in plot.metrics for name in (metric, f"val/{metric}")]
    shown = [name for name in dict.fromkeys(names) if any(run.metrics.get(name) for run in runs)]
    if plot.unit == "count" and not any(any(run.metrics.get(name, {}).values()) for name in shown for run in runs):
        return
    for place, name in enumerate(shown):
        for index, run in enumerate(runs):
            if run.metrics.get(name):
                yield place, index, name, run


def _empty(title: str, unit: str, x: str = "optimizer step") -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        height=320,
        margin={"l": 55, "r": 15, "t": 45, "b": 45},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.25, "yanchor": "top", "font": {"size": 11}},
        showlegend=True,
        hovermode="x unified",
    )
    figure.update_xaxes(title={"text": x, "standoff": 6}, automargin=True)
    figure.update_yaxes(title={"text": unit}, automargin=True, exponentformat="e")  # 2e-5, not 20µ
    return figure


def _fit_axis(figure: go.Figure, plot: Plot, curves: Sequence[Sequence[float]]) -> None:
    """Chooses the vertical axis so that neither decades, nor a few outliers, nor a constant flatten the curves.

    A curve's outliers are left out only if no other curve reaches so far; the title then counts them.
    """
    curves = [sorted(filter(math.isfinite, curve)) for curve in curves]
    values = sorted(value for curve in curves for value in curve)
    if len(values) < 3:
        return
    if plot.unit in ("nats a token", "norm") and values[-1] > 1000 * values[len(values) // 2] > 0:
        figure.update_yaxes(type="log", exponentformat="power")
    elif values[0] == values[-1]:  # plotly would show 2e-5 at 0 of an axis from -1 to 1
        if values[0]:
            figure.update_yaxes(range=sorted((0, 1.25 * values[0])))
    else:
        bottoms, tops = zip(*(_without_outliers(curve) for curve in curves if curve), strict=True)
        outside = sum(not min(bottoms) <= value <= max(tops) for value in values)
        if outside:
            figure.update_yaxes(range=(min(bottoms), max(tops)))
            figure.update_layout(title_text=f"{plot.title} ({outside} of {len(values)} values lie outside)")


def _without_outliers(curve: Sequence[float]) -> tuple[float, float]:
    """Returns the range of sorted values, without extremes that lie ten times as far out as 90% of them are wide."""
    low, high = (curve[round(share * (len(curve) - 1))] for share in (0.05, 0.95))
    spread = high - low
    is_far = max(curve[-1] - high, low - curve[0]) > 10 * spread > 1e-5 * max(abs(low), abs(high))
    return (low - spread, high + spread) if len(curve) >= 20 and is_far else (curve[0], curve[-1])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"
