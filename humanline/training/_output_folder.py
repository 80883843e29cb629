import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from humanline.errors import ConfigError
from humanline.training._agreement import first_error, gathered, on_any_rank
from humanline.training._launch import launch_id, restarts

PATIENCE_S = 120
"""How long a restarted run waits for its earlier self: what is left of it on a lost node, or that node's lock."""


@contextmanager
def sole_use(output_dir: str) -> Iterator[bool]:
    """Holds a run's folder for this run, and tells whether torchrun has started this very run before.

    The lock goes with the process, however that ends.

    Raises:
        ConfigError: on all ranks, if another run holds it, it cannot be written to, or is not the same for all nodes.
    """
    folder = Path(output_dir)
    with ExitStack() as held:
        (again,), holder, error = on_any_rank(restarts() > 0), _holder(), None
        if dist.get_rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(folder / ".lock", "a+"))
                before = _read(file)
                again |= holder["launch"] is not None and before.get("launch") == holder["launch"]
                error = _lock(file, holder, patience=PATIENCE_S if again else 0)
            except OSError as failure:
                error = f"cannot be written to: {failure}"
        if (error := first_error(error)) is None:
            error = first_error(_not_shared(folder, gathered(holder)[0]))
        if error is not None:
            raise ConfigError(f"output_dir: {folder} {error}")
        yield on_any_rank(again)[0]


def _holder() -> dict[str, Any]:
    return {"process": os.getpid(), "host": platform.node(), "launch": launch_id()}


def _lock(file: TextIO, holder: dict[str, Any], patience: float) -> str | None:
    """Locks the file and writes this process into it; returns what prevents that."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                other = _read(file)
                return (
                    f"is in use by another run (process {other.get('process')} on {other.get('host')}); give each run "
                    "a folder of its own"
                )
            time.sleep(0.2)
    file.truncate(0)
    print(json.dumps(holder), file=file, flush=True)
    os.fsync(file.fileno())
    return None


def _read(file: TextIO) -> dict[str, Any]:
    """Who has written itself into the file; nobody if it is new, or cannot be read."""
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except (ValueError, TypeError):
        return {}


def _not_shared(folder: Path, holder: dict[str, Any]) -> str | None:
    """What is wrong if this rank does not see what rank 0 has written."""
    try:
        with open(folder / ".lock") as file:
            seen = _read(file)
    except OSError:
        seen = {}
    if seen == holder:
        return None
    return f"on {platform.node()} is not that of rank 0 on {holder['host']}; give a folder that all nodes share"
