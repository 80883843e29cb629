"""Which checkpoints a run has, and where in the run each was written."""

import json
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"


def has_checkpoints(output_dir: str) -> bool:
    """Returns whether a run's folder has checkpoints."""
    return bool(steps_in(Path(output_dir) / "checkpoints"))


def saved_dates(output_dir: str, which: bool | str) -> dict[str, str]:
    """Returns the dates in the checkpoint that ``which`` names, as for :meth:`TrainingCheckpoint.load`.

    They are the days that chat templates read, by config key: ``tokenizer.date`` and ``reward.date``. There is none if
    there is no such checkpoint, or it cannot be read; loading it then says why.
    """
    folder = Path(output_dir) / "checkpoints"
    newest = (folder / f"step_{step}" for step in reversed(steps_in(folder)))
    for path in newest if which is True or which == "latest" else [Path(str(which))]:
        try:
            run: dict[str, Any] = json.loads((path / RUN_FILE).read_text())
            settings = run["position"] | run["progress"].get("source", {}).get("settings", {})
        except (OSError, ValueError, KeyError):
            continue
        return {key: settings[key] for key in ("tokenizer.date", "reward.date") if key in settings}
    return {}


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, ascending."""
    names = (path.name.removeprefix("step_") for path in folder.glob("step_*"))
    return sorted(int(name) for name in names if name.isdigit())
