import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from humanline.distributed import first_error, gathered
from humanline.errors import ConfigError
from humanline.launch._processes import launch_name

PATIENCE_S = 120
"""How long a restarted run waits for its earlier self: what is left of it on a lost node, or that node's lock."""
VISIBLE_S = 20
"""How long a file of one node may take to be seen by another."""


class OutputFolder:
    """A run's folder, which this run alone holds.

    Attributes:
        restarted (bool): whether torchrun has started this very run before, and the run had taken the folder for its
            own. One that was refused, and that torchrun starts again for it, is not restarted.
    """

    def __init__(self, restarted: bool, lock: "_Lock | None", launches: list[str]) -> None:
        self.restarted = restarted
        self._lock = lock
        self._launches = launches

    def accept(self) -> None:
        """Marks the folder as this run's, once nothing in it speaks against that."""
        if self._lock is not None:
            self._lock.write(self._launches)


@contextmanager
def sole_use(output_dir: str, resume_from: bool | str) -> Iterator[OutputFolder]:
    """Holds a run's folder for this run. The lock goes with the process, however that ends.

    Args:
        output_dir (str): the folder.
        resume_from (bool | str): what the config says to resume from. A start that says something else is another run.

    Raises:
        ConfigError: on all ranks, if another run holds it, it cannot be written to, or is not the same for all nodes.
    """
    folder = Path(output_dir)
    launches = sorted({each for each in gathered(launch_name(f"from {resume_from}")) if each})
    with ExitStack() as held:
        error, lock, restarted = None, None, False
        if dist.get_rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = _Lock(held, folder / ".lock")
                restarted = not set(launches).isdisjoint(lock.read().get("launches", []))
                error = lock.take(patience=PATIENCE_S if restarted else 0)
            except OSError as failure:
                error = f"cannot be written to: {failure}"
        if (error := first_error(error)) is None:
            written, restarted = gathered((lock.read() if lock else {}, restarted))[0]
            error = first_error(_not_shared(folder, written))
        if error is not None:
            raise ConfigError(f"output_dir: {folder} {error}")
        yield OutputFolder(restarted, lock, launches)


class _Lock:
    """The file by which rank 0 holds a folder; its first line tells who does, and whose the folder is."""

    def __init__(self, held: ExitStack, path: Path) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        held.callback(os.close, self.file)

    def read(self) -> dict[str, Any]:
        return _first_line(os.pread(self.file, 1 << 20, 0))

    def write(self, launches: list[str]) -> None:
        who = {"process": os.getpid(), "host": platform.node(), "launches": launches}
        line = json.dumps(who).encode() + b"\n"
        os.pwrite(self.file, line, 0)  # in one go, so that a kill leaves the old line or the new one
        os.ftruncate(self.file, len(line))
        os.fsync(self.file)

    def take(self, patience: float) -> str | None:
        """Locks the file and writes this process into it; returns what prevents that."""
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    other = self.read()
                    return (
                        f"is in use by another run (process {other.get('process')} on {other.get('host')}); give each "
                        "run a folder of its own"
                    )
                time.sleep(0.2)
        self.write(self.read().get("launches", []))
        return None


def _first_line(content: bytes) -> dict[str, Any]:
    """Who has written itself into a lock; nobody if it is new, or cannot be read."""
    try:
        return dict(json.loads(content.split(b"\n")[0]))
    except (ValueError, TypeError):
        return {}


def _not_shared(folder: Path, written: dict[str, Any]) -> str | None:
    """What is wrong if this rank does not see what rank 0 has written."""
    deadline = time.monotonic() + VISIBLE_S
    while True:
        try:
            if _first_line((folder / ".lock").read_bytes()) == written:
                return None
        except OSError:
            pass
        if time.monotonic() > deadline:
            return f"on {platform.node()} is not that of rank 0 on {written['host']}; give one that all nodes share"
        time.sleep(0.2)
