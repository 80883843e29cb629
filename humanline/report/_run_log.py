"""What a run has written: its config, its metrics and its completions."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from humanline.errors import ConfigError, DataError

CONFIG = "torchtune_config.yaml"
_STEP = re.compile(r"Step (\d+) \| (.*)")
_STAGES, _ROWS = 40, 640  # the most of a run's completions that a report has


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """A run, as far as it has got.

    Attributes:
        name (str): the folder's name, with as many of its parents as tell it from the other runs.
        folder (Path): the run's ``output_dir``.
        config (dict[str, Any]): each value of the config by its dotted key.
        metrics (dict[str, dict[int, float]]): each metric by step. A step that was repeated after a restart has its
            last value.
        restarts (tuple[int, ...]): the last logged step that each restart kept, if it lost steps or began a new file.
        completions (tuple[dict[str, Any], ...]): rows of ``completions/``, each with its ``stage``.
        left_out (int): the rows that are not among them.
        unread (int): the lines of the log that could not be read.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: dict[str, dict[int, float]]
    restarts: tuple[int, ...] = ()
    completions: tuple[dict[str, Any], ...] = ()
    left_out: int = 0
    unread: int = 0
    syncs: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        since = self.metrics.get("steps_since_sync", {})
        object.__setattr__(self, "syncs", tuple(sorted({step - int(n) for step, n in since.items()} - {0})))

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The loss's bounds on token log-ratios, nats; None where the config has none."""
        low, high = (self.config.get(f"loss.log_eps_{side}") for side in "PR")
        # An interpolation of the config is text.
        return low if isinstance(low, int | float) else None, high if isinstance(high, int | float) else None

    @property
    def last_step(self) -> int:
        return max((step for values in self.metrics.values() for step in values), default=0)


def read_runs(folders: Sequence[Path]) -> list[RunLog]:
    """Reads the runs in folders.

    Raises:
        ConfigError: if a folder does not exist or has no log.
        DataError: if its config or its completions cannot be read.
    """
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    depth = next((n for n in range(1, 20) if len({part[-n:] for part in parts}) == len(parts)), 20)
    return ["/".join(part[-depth:]) for part in parts]


def _read(folder: Path, name: str) -> RunLog:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; name the output_dir of a run")
    config = _config(folder / CONFIG)
    metrics: dict[str, dict[int, float]] = {}
    restarts: list[int] = []
    unread = last = 0
    for file in _logs(folder, config):
        first = True
        for step, values, is_whole in _entries(file):
            trains = "loss" in values
            if trains and last and (first or step <= last):
                restarts.append(max((each for each in metrics["loss"] if each < step), default=0))
            if trains:
                first, last = False, step
            unread += not is_whole
            for metric, value in values.items():
                metrics.setdefault(metric, {})[step] = value
    completions, left_out = _completions(folder / "completions")
    return RunLog(
        name=name,
        folder=folder,
        config=config,
        metrics={metric: dict(sorted(values.items())) for metric, values in metrics.items()},
        restarts=tuple(restarts),
        completions=tuple(completions),
        left_out=left_out,
        unread=unread,
    )


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(_flat(OmegaConf.to_container(OmegaConf.load(file), resolve=False)))
    except Exception as error:  # of YAML or OmegaConf
        raise DataError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value.get("_component_", "") is None:
        yield f"{key}._component_", None  # removed, with its arguments
    elif isinstance(value, dict) and value:
        for name, each in value.items():
            yield from _flat(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for place, each in enumerate(value):
            yield from _flat(each, f"{key}[{place}]")
    else:
        yield key, value


def _logs(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Returns the files of torchtune's ``DiskLogger``, the oldest first."""
    named = [value for key, value in config.items() if key.startswith("metric_logger") and key.endswith(".log_dir")]
    named = [str(value).replace("${output_dir}", str(folder)) for value in named]
    places = [folder / "logs", folder, *map(Path, named)]
    for place in places:
        if found := [file for file in place.glob("*.txt") if any(True for _ in _entries(file))]:
            return sorted(found, key=_age)
    loggers = [str(value) for key, value in config.items() if re.fullmatch(r"metric_logger.*\._component_", key)]
    raise ConfigError(
        f"{folder}: has no log of metrics; a report reads what torchtune.training.metric_logging.DiskLogger writes to "
        f"output_dir/logs, and this run's metric_logger is {', '.join(loggers) or 'not known'}; give it both, as a list"
    )


def _age(file: Path) -> tuple[float, str]:
    """Returns what orders log files: the time in DiskLogger's names, else the time of the last change."""
    named = re.fullmatch(r"log_(\d{9,})", file.stem)
    return (float(named[1]) if named else file.stat().st_mtime), file.name


def _entries(file: Path) -> Iterator[tuple[int, dict[str, float], bool]]:
    """Yields step, metrics, and whether all of the entry was understood, of each whole line."""
    text = file.read_text(encoding="utf-8", errors="replace")
    for line in text[: text.rfind("\n") + 1].splitlines():  # a run in progress may be writing the last one
        if match := _STEP.fullmatch(line.strip()):
            values, is_whole = {}, True
            for item in match[2].split():
                name, _, number = item.rpartition(":")
                try:
                    values[name] = float(number)
                except ValueError:
                    is_whole = False
            yield int(match[1]), values, is_whole


def _completions(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns rows of the first, the last and evenly spaced stages between them, and how many there are besides."""
    rows: list[dict[str, Any]] = []
    left_out = 0
    for kind in ("round", "step"):
        mine = sorted(folder.glob(f"{kind}_*.jsonl"), key=_number)
        count = min(len(mine), _STAGES)
        chosen = {mine[round(i * (len(mine) - 1) / max(1, count - 1))] for i in range(count)}
        for file in mine:
            # At line feeds alone: a completion may have other separators. What follows the last is being written.
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            taken = lines[: _ROWS // count] if file in chosen else []
            left_out += len(lines) - len(taken)
            stage = f"round {_number(file)}" if kind == "round" else f"held out, step {_number(file)}"
            rows += [{"stage": stage, **_row(file, number, line)} for number, line in enumerate(taken, 1)]
    return rows, left_out


def _number(file: Path) -> int:
    digits = file.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _row(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}:{number}: is not JSON ({error}); remove the line") from error
    return row
