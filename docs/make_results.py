"""Writes the tables and figures of docs/results.md from docs/replication.json, which benchmarks/replicate.py fills.

    pip install -e '.[plots]'
    python docs/make_results.py

A comment in the page says where an experiment stands: `<!-- experiment: NAME -->`. Its table and its figure,
figures/results_NAME.svg, end with `<!-- end -->`.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from replicate import EXPERIMENTS, STEPS, Arm, key  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "docs" / "replication.json"
PROCESSOR = "AMD EPYC"  # of the runs whose costs are shown, and of the first ones, which do not name theirs
PLACE = re.compile(r"(<!-- experiment: (\w+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)

Result = dict[str, Any]


def results_of(arm: Arm, results: Iterable[Result]) -> list[Result]:
    """Returns the finished runs of an arm, by seed."""
    return sorted((each for each in results if key(each).rpartition("-")[0] == arm.name), key=lambda each: each["seed"])


def label(arm: Arm) -> str:
    if arm.data == "none":
        return "untrained"
    data = {"initial": "offline", "initial_x4": "offline, 4 x the data"}.get(arm.data, arm.data.replace("_", " "))
    clip = "no clip" if arm.clip is None else f"clip [{arm.clip[0]:g}, {arm.clip[1]:g}]"
    sync = "never synced" if arm.sync is None else f"synced every {arm.sync}"
    steps = "" if arm.steps == STEPS else f", {arm.steps} steps"
    lr = "" if arm.lr is None else f", learning rate {arm.lr:g}"
    return f"{arm.objective.upper()}, {data}: {clip}, {sync}{steps}{lr}"


def table(arms: Sequence[Arm], results: Sequence[Result]) -> str:
    """Returns a Markdown table: a line for each arm that has a finished run, and the number of those that have none."""
    lines = [
        "| | pass@1 of each seed, with its 95% interval | mean | right of finished | cut | clipped tokens | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        if not (runs := results_of(arm, results)):
            continue
        each = "<br>".join(map(_mean_and_interval, runs))
        # A resumed run's time lacks that of the attempt before.
        timed = [run for run in runs if "cpu_seconds" in run and not run["resumed"]]
        seconds = [run["cpu_seconds"] for run in timed if run.get("processor", PROCESSOR) == PROCESSOR]
        cells = [
            label(arm),
            each,
            f"{fmean(run['pass@1']['mean'] for run in runs):.1%}",
            f"{fmean(run['right_of_finished'] or 0 for run in runs):.1%}",
            f"{fmean(run['cut'] for run in runs):.1%}",
            "" if arm.clip is None else f"{fmean(run['clipped'] for run in runs):.2%}",
            f"{fmean(seconds):,.0f}" if seconds else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if missing := sum(not results_of(arm, results) for arm in arms):
        lines += ["", f"Not measured yet: {missing} of {len(arms)} rows."]
    return "\n".join(lines) + "\n"


def _mean_and_interval(run: Result) -> str:
    mean, low, high = (f"{run['pass@1'][end]:.1%}" for end in ("mean", "low", "high"))
    return f"{mean}&nbsp;[{low},&nbsp;{high}]"  # on one line


def curves(arms: Sequence[Arm], results: Sequence[Result]) -> str:
    """Returns a Markdown table of mean pass@1 in the course of runs that were measured several times."""
    lines: list[str] = []
    for arm in arms:
        runs = [run for run in results_of(arm, results) if "curve" in run]
        if not runs:
            continue
        steps = sorted(runs[0]["curve"], key=int)
        if not lines:
            header = " | ".join(f"{step} steps" for step in steps)
            lines = ["", f"| pass@1 after | {header} |", "|---" * (len(steps) + 1) + "|"]
        means = (fmean(run["curve"][step]["pass@1"]["mean"] for run in runs) for step in steps)
        lines.append(f"| {label(arm)} | " + " | ".join(f"{mean:.1%}" for mean in means) + " |")
    return "\n".join(lines) + "\n" if lines else ""


def block(name: str, results: Sequence[Result]) -> str:
    """Returns what stands in an experiment's place in the page."""
    arms = EXPERIMENTS[name]
    drawn = any(results_of(arm, results) for arm in arms)
    figure = f"\n![pass@1 of the arms, a dot for each seed](figures/results_{name}.svg)\n" if drawn else ""
    return table(arms, results) + curves(arms, results) + figure


def draw(name: str, arms: Sequence[Arm], results: Sequence[Result]) -> None:
    """Draws an experiment: a line for each arm, a dot for each seed with its 95% interval."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "humanline", "svg.fonttype": "none"}
    import matplotlib.pyplot as plt

    shown = [(arm, runs) for arm in arms if (runs := results_of(arm, results))]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(shown)), layout="constrained", facecolor="white")
    for place, (_, runs) in enumerate(shown):
        for run in runs:
            mean, low, high = (100 * run["pass@1"][end] for end in ("mean", "low", "high"))
            y = -place + 0.15 * (2 - run["seed"])
            axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color="#0072B2", markersize=4, lw=1)
    axes.set_yticks([-place for place in range(len(shown))], [label(arm) for arm, _ in shown])
    axes.set(xlabel="pass@1 on held-out sums, %, with 95% intervals", xlim=(0, 100))
    axes.grid(axis="x", color="#E5E5E5")
    axes.set_axisbelow(True)
    figure.savefig(ROOT / "docs" / "figures" / f"results_{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    results = json.loads(RESULTS.read_text())
    for name, arms in EXPERIMENTS.items():
        if any(results_of(arm, results) for arm in arms):
            draw(name, arms, results)
    page = PLACE.sub(lambda m: m[1] + block(m[2], results) + m[4], PAGE.read_text())
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
