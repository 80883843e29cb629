"""The page of a report: one HTML file with its figures, tables, style and scripts, which needs no network."""

import html
import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from plotly.io import write_images as write_images_of
from plotly.offline import get_plotlyjs

from humanline.report._figures import COLORS, figures
from humanline.report._run_log import RunLog

_PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
# The figures of the first table, where a run has them, each with whether its first value is told too.
_SUMMARY = {
    "loss": "loss",
    "val/loss": "held-out loss",
    "rewards/margins": "margin",
    "val/rewards/margins": "held-out margin",
    "rewards/gain": "gain",
    "advantages/gain": "gain",
    "rewards/accuracies": "accuracy",
    "val/rewards/accuracies": "held-out accuracy",
    "rounds/reward": "reward of a round",
    "kl": "KL to the reference, nats a token",
    "entropy": "entropy, nats a token",
    "responses/length": "tokens a response",
}


def page(runs: Sequence[RunLog], *, refresh: float | None = None) -> str:
    """Returns the HTML of a report.

    Args:
        runs (Sequence[RunLog]): the runs, at least one.
        refresh (float | None): seconds after which a browser reads the page again; None never.
    """
    drawn = figures(runs)
    places = [(section, index) for section, each in drawn.items() for index in range(len(each))]
    specs = [json.loads(drawn[section][index].to_json()) for section, index in places]
    sections = {
        section: "".join(f'<div class="plot" data-plot="{places.index((section, i))}"></div>' for i in range(len(each)))
        for section, each in drawn.items()
    }
    plots = "".join(
        f'<section><h2>{html.escape(name)}</h2><div class="plots">{divs}</div></section>'
        for name, divs in sections.items()
    )
    rows = [{"run": run.name, **row} for run in runs for row in run.completions]
    left_out = sum(run.left_out for run in runs)
    return _PAGE.substitute(
        title=html.escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        written=datetime.now().astimezone().isoformat(" ", "seconds"),
        refresh=f'<meta http-equiv="refresh" content="{refresh:g}">' if refresh else "",
        key=_key(runs),
        differences=_differences(runs),
        summary=_summary(runs),
        plots=plots,
        config=_config(runs),
        more=f"{left_out:,} more completions are in the runs' folders." if left_out else "",
        hidden="" if rows else "hidden",
        plotly=get_plotlyjs(),
        data=_script_json({"plots": specs, "completions": rows, "runs": [run.name for run in runs]}),
    )


def write_images(runs: Sequence[RunLog], folder: Path) -> list[Path]:
    """Writes each figure as a PNG image, and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [figure for each in figures(runs).values() for figure in each]
    names = ["".join(c if c.isalnum() else "_" for c in figure.layout.title.text.lower()) for figure in drawn]
    files = [folder / f"{name}.png" for name in names]
    for figure in drawn:
        figure.update_layout(paper_bgcolor="white")
    write_images_of(drawn, files, width=800, height=480, scale=2)
    return files


def _script_json(value: Any) -> str:
    """Returns JSON that no text in it, such as a model's ``</script>``, can end."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _finite(value: Any) -> Any:
    """Returns a value whose numbers JSON has: those that are not finite become text."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="table"><table><thead>{line(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def _key(runs: Sequence[RunLog]) -> str:
    """Returns which colour is which run's; "" for a single run, whose metrics have the colours."""
    if len(runs) < 2:
        return ""
    marks = (
        f'<span><i style="background:{COLORS[index % len(COLORS)]}"></i>{html.escape(run.name)}</span>'
        for index, run in enumerate(runs)
    )
    return f'<div class="key">{"".join(marks)}</div>'


def _differences(runs: Sequence[RunLog]) -> str:
    if len(runs) < 2:
        return ""
    keys = sorted({key for run in runs for key in run.config})
    differing = [key for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1 and key != "output_dir"]
    rows = [[key, *(_setting(run.config, key) for run in runs)] for key in differing]
    if not rows:
        return "<h2>What differs</h2><p>The configs are the same.</p>"
    return "<h2>What differs</h2>" + _table(["setting", *(run.name for run in runs)], rows)


def _summary(runs: Sequence[RunLog]) -> str:
    rows: list[list[object]] = [["last step", *(run.last_step for run in runs)]]
    for metric, label in _SUMMARY.items():
        if any(metric in run.metrics for run in runs):
            rows.append([label, *(_first_and_last(run.metrics.get(metric, {})) for run in runs)])
    rows.append(["tokens/s, median", *(_median([*run.metrics.get("tokens_per_second", {}).values()]) for run in runs)])
    rows.append(["syncs", *(f"{len(run.syncs)}, last at {run.syncs[-1]}" if run.syncs else "none" for run in runs)])
    rows.append(["restarts after step", *(", ".join(map(str, run.restarts)) or "none" for run in runs)])
    rows.append(["skipped steps", *(f"{max(run.metrics.get('skipped_steps', {0: 0}).values()):g}" for run in runs)])
    rows.append(["weights and checkpoints", *(", ".join(_saved(run)) or "none" for run in runs)])
    if any(run.unread for run in runs):
        rows.append(["lines of the log that could not be read", *(run.unread for run in runs)])
    return "<h2>Summary</h2><p>The first value, and the last</p>" + _table(["", *(run.name for run in runs)], rows)


def _first_and_last(values: dict[int, float]) -> str:
    each = [f"{value:.4g}" for value in values.values()]
    return " → ".join([each[0], each[-1]] if len(each) > 1 else each)


def _median(values: list[float]) -> str:
    return f"{median(values):,.0f}" if values else ""


def _saved(run: RunLog) -> list[str]:
    """Returns the folders of weights and of checkpoints that there are, in the order of epochs and steps."""
    found = [*run.folder.glob("epoch_*[0-9]"), *(run.folder / "checkpoints").glob("step_*[0-9]")]
    found.sort(key=lambda each: (each.parent != run.folder, int(each.name.rpartition("_")[2])))
    return [str(each.relative_to(run.folder)) for each in found]


def _config(runs: Sequence[RunLog]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if not keys:
        return ""
    rows = [[key, *(_setting(run.config, key) for run in runs)] for key in keys]
    table = _table(["setting", *(run.name for run in runs)], rows)
    return f"<details><summary>All settings</summary>{table}</details>"


def _setting(config: dict[str, Any], key: str) -> str:
    if key not in config:
        return "—"
    return "null" if config[key] is None else str(config[key])
