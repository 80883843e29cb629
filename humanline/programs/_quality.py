"""How good preference data is for a model: figures about groups whose responses have mean log-probs, and a filter."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from torchtune import utils

from humanline.data import Group, best_and_worst
from humanline.errors import ConfigError

log = utils.get_logger("INFO")

PAPERS_QUARTILE = (-1.03, -0.36)
"""Nats; the range of the bottom quartile of mean token log-probs in the paper's data, which trained worse."""


@dataclass(frozen=True)
class Measured:
    """A group with what was measured of its responses.

    Attributes:
        group (Group): the group, with at least one response.
        log_probs (Sequence[float]): of each response the mean log-prob of its tokens, nats.
        stop_tokens (Collection[int]): the tokens that end a turn; empty if they are not known.
    """

    group: Group
    log_probs: Sequence[float]
    stop_tokens: Collection[int]

    @property
    def cut(self) -> list[bool] | None:
        """Whether each response lacks its end; None if the tokens that end a turn are not known."""
        ends = self.stop_tokens
        return [response[-1] not in ends for response in self.group.responses] if ends else None

    @property
    def sides(self) -> tuple[Sequence[int], Sequence[int]]:
        """The indices of the better and the worse responses: chosen and rejected, best and worst, or by label."""
        group = self.group
        if group.labels is not None:
            return tuple([i for i, label in enumerate(group.labels) if label is kind] for kind in (True, False))  # type: ignore[return-value]
        pair = (0, 1) if group.is_pair else best_and_worst(group.scores or (0.0,))
        return ((), ()) if pair is None else ((pair[0],), (pair[1],))


@dataclass(frozen=True)
class Filter:
    """Which responses stay.

    Args:
        min_log_prob (float | str | None): the lowest mean log-prob, nats; ``bottom_quartile`` for that of the data's
            own first quartile; None for no limit.
        cut (bool): whether responses without their end stay.
        duplicates (bool): whether responses that repeat another one to the same prompt stay.

    Raises:
        ConfigError: if a value is invalid, or nothing would be left out.
    """

    min_log_prob: float | str | None = None
    cut: bool = True
    duplicates: bool = True

    def __post_init__(self) -> None:
        least = self.min_log_prob
        number = isinstance(least, int | float) and not isinstance(least, bool) and math.isfinite(least)
        if not (least is None or least == "bottom_quartile" or number):
            raise ConfigError(f"filter.min_log_prob: expected nats, bottom_quartile or null, got {least!r}")
        for name in ("cut", "duplicates"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"filter.{name}: expected true or false, got {getattr(self, name)!r}")
        if least is None and self.cut and self.duplicates:
            raise ConfigError("filter: it leaves out nothing; set min_log_prob, cut: False or duplicates: False")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Filter":
        """Returns the filter of a config.

        Raises:
            ConfigError: if it has an unknown key or an invalid value.
        """
        if unknown := set(settings) - {"min_log_prob", "cut", "duplicates"}:
            raise ConfigError(f"filter.{min(unknown)}: unknown; expected min_log_prob, cut or duplicates")
        return cls(**settings)

    def apply(self, data: Sequence[Measured]) -> Iterator[tuple[Group | None, list[str]]]:
        """Yields for each group what is left of it, and why responses, or all of it, were left out.

        A pair stays whole or goes. Of a scored group single responses may go, as long as two of different scores stay.
        """
        least = -math.inf
        if self.min_log_prob is not None:
            least = _quartiles(data)[0] if self.min_log_prob == "bottom_quartile" else float(self.min_log_prob)
        for measured in data:
            group, seen, kept, reasons = measured.group, set(), [], []
            for i, (response, log_prob) in enumerate(zip(group.responses, measured.log_probs, strict=True)):
                tokens = tuple(response)
                if log_prob < least:
                    reasons.append(f"response {i}: mean log-prob {log_prob:.4g} below {least:.4g}")
                elif not self.cut and measured.cut is not None and measured.cut[i]:
                    reasons.append(f"response {i}: cut")
                elif not self.duplicates and tokens in seen:
                    reasons.append(f"response {i}: repeats another one")
                else:
                    kept.append(i)
                seen.add(tokens)
            yield self._rest(group, kept, reasons), reasons

    @staticmethod
    def _rest(group: Group, kept: list[int], reasons: list[str]) -> Group | None:
        if len(kept) == len(group.responses):
            return group
        if group.is_pair or not kept:
            return None
        rest = group.part(kept)
        if rest.labels is None and best_and_worst(rest.scores or (0.0,)) is None:
            reasons.append("no two responses with different scores are left")
            return None
        return rest


def summary(data: Sequence[Measured]) -> dict[str, Any]:
    """Returns the figures of a dataset, each under its name, as JSON values. Shares are from 0 to 1."""
    log_probs = _flat(data)
    lengths = [len(response) for each in data for response in each.group.responses]
    cut = [flag for each in data for flag in each.cut or ()]
    prompts = Counter(tuple(each.group.prompt) for each in data)
    repeated = sum(len(each.group.responses) - len(set(map(tuple, each.group.responses))) for each in data)
    overlaps = [
        _overlap(each.group.responses[better], each.group.responses[worse])
        for each in data
        for better, worse in zip(*each.sides, strict=False)
    ]
    sides = [[each.log_probs[i] for each in data for i in each.sides[side]] for side in (0, 1)]
    first, middle, third = _quartiles(data)
    return {
        "groups": len(data),
        "responses": len(log_probs),
        "mean_log_prob": {
            "mean": fmean(log_probs),
            "min": min(log_probs),
            "first_quartile": first,
            "median": middle,
            "third_quartile": third,
            "max": max(log_probs),
            "better": fmean(sides[0]) if sides[0] else None,
            "worse": fmean(sides[1]) if sides[1] else None,
        },
        "below_papers_quartile": _share(value < PAPERS_QUARTILE[0] for value in log_probs),
        "in_papers_quartile": _share(PAPERS_QUARTILE[0] <= value <= PAPERS_QUARTILE[1] for value in log_probs),
        "tokens": {"mean": fmean(lengths), "median": median(lengths), "max": max(lengths)},
        "cut": _share(cut) if cut else None,
        "repeated_responses": repeated / len(log_probs),
        "repeated_prompts": 1 - len(prompts) / len(data),
        "overlap": fmean(overlaps) if overlaps else None,
    }


def table(figures: Mapping[str, Any]) -> str:
    """Returns the figures of :func:`summary` as lines to print."""
    log_prob, tokens = figures["mean_log_prob"], figures["tokens"]
    low, high = PAPERS_QUARTILE
    order = ("min", "first_quartile", "median", "third_quartile", "max")
    lines = [
        ("groups, responses", f"{figures['groups']:,}, {figures['responses']:,}"),
        ("mean log-prob of a response's tokens, nats", f"{log_prob['mean']:.3f}"),
        ("  min, quartiles, max", ", ".join(f"{log_prob[key]:.3f}" for key in order)),
    ]
    if log_prob["better"] is not None and log_prob["worse"] is not None:
        lines.append(("  better and worse responses", f"{log_prob['better']:.3f} and {log_prob['worse']:.3f}"))
    lines += [
        (f"  below the paper's worst quartile (< {low})", f"{figures['below_papers_quartile']:.1%}"),
        (f"  within it ({low} to {high})", f"{figures['in_papers_quartile']:.1%}"),
        ("tokens of a response: mean, median, max", f"{tokens['mean']:.0f}, {tokens['median']:.0f}, {tokens['max']}"),
        ("responses without their end (cut)", "unknown" if figures["cut"] is None else f"{figures['cut']:.1%}"),
        ("responses that repeat another one to the prompt", f"{figures['repeated_responses']:.1%}"),
        ("prompts that repeat another one", f"{figures['repeated_prompts']:.1%}"),
    ]
    if figures["overlap"] is not None:
        lines.append(("overlap of better and worse (F1 of tokens)", f"{figures['overlap']:.1%}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def histogram(log_probs: Sequence[float], bins: int = 20, width: int = 50) -> str:
    """Returns a histogram to print: a line for each bin between the 1% and the 99% quantile.

    The first and the last bin have the values beyond these too.
    """
    ordered = sorted(log_probs)
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]
    size = (high - low) / bins or 1.0
    counts = Counter(max(0, min(bins - 1, int((value - low) / size))) for value in log_probs)
    most = max(counts.values())
    return "\n".join(
        f"{low + i * size:8.3f}  {'#' * math.ceil(width * counts[i] / most):{width}} {counts[i]:,}"
        for i in range(bins if high > low else 1)
    )


def as_line(group: Group) -> dict[str, Any]:
    """Returns a group as a line that ``humanline.data.encoded_groups`` reads."""
    line = {"prompt": list(group.prompt), "responses": [list(response) for response in group.responses]}
    of_responses = {"scores": group.scores, "labels": group.labels}
    return line | {name: values for name, values in of_responses.items() if values is not None} | {"id": group.id}


def draw_histogram(log_probs: Sequence[float], figures: Mapping[str, Any], file: Path) -> None:
    """Draws the histogram of the responses' mean log-probs, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no picture: matplotlib is not installed (pip install -e '.[plots]')")
        return
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(log_probs, bins=50, color="#0072B2")
    for name in ("first_quartile", "median", "third_quartile"):
        axes.axvline(figures["mean_log_prob"][name], color="#595959", linestyle="--", linewidth=1)
    axes.set(xlabel="mean log-prob of a response's tokens, nats (dashed: quartiles)", ylabel="responses")
    figure.savefig(file, dpi=150)


def _flat(data: Sequence[Measured]) -> list[float]:
    return [value for each in data for value in each.log_probs]


def _quartiles(data: Sequence[Measured]) -> tuple[float, float, float]:
    values = _flat(data)
    first, middle, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return first, middle, third


def _share(flags: Any) -> float:
    found = list(flags)
    return sum(found) / len(found)


def _overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """Returns twice the tokens in common, counted with repetitions, divided by all tokens."""
    return 2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other))
