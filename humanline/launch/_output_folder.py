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
"""How long a restarted run waits for the lock of its earlier processes, for example those on a lost node."""
VISIBLE_S = 20
"""How long a file written on one node may take to appear on another."""


class OutputFolder:
    """A run's folder, locked by this run.

    Attributes:
        restarted (bool): whether torchrun started this run before and the run accepted the folder then. A run that
            failed before accepting it does not count as restarted.
    """

    def __init__(self, restarted: bool, lock: "_Lock | None", launches: list[str]) -> None:
        self.restarted = restarted
        self._lock = lock
        self._launches = launches

    def accept(self) -> None:
        """Records that the folder belongs to this run. Call it when all checks of the folder have passed."""
        if self._lock is not None:
            self._lock.write(self._launches)


@contextmanager
def sole_use(output_dir: str, resume_from: bool | str) -> Iterator[OutputFolder]:
    """Locks a run's folder for this run. The lock ends with the process, however the process ends.

    Args:
        output_dir (str): the folder.
        resume_from (bool | str): the config's ``resume_from_checkpoint``. A start with another value is another run.

    Raises:
        ConfigError: on all ranks, if another run holds the folder, it is not writable, or the nodes do not share it.
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
    """Rank 0's lock file of a folder. Its first line names the process that holds it and the launches that own it."""

    def __init__(self, held: ExitStack, path: Path) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        held.callback(os.close, self.file)

    def read(self) -> dict[str, Any]:
        return _first_line(os.pread(self.file, 1 << 20, 0))

    def write(self, launches: list[str]) -> None:
        who = {"process": os.getpid(), "host": platform.node(), "launches": launches}
        line = json.dumps(who).encode() + b"\n"
        os.pwrite(self.file, line, 0)  # one write, so a kill leaves the old line or the new one
        os.ftruncate(self.file, len(line))
        os.fsync(self.file)

    def take(self, patience: float) -> str | None:
        """Locks the file and writes this process into it. Returns the reason if it cannot."""
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    other = self.read()
                    return (
                        f"is in use by another run (process {other.get('process')} on {other.get('host')}); use a "
                        "different folder for each run"
                    )
                time.sleep(0.2)
        self.write(self.read().get("launches", []))
        return None


def _first_line(content: bytes) -> dict[str, Any]:
    """Returns the content of a lock; empty if the lock is new or unreadable."""
    try:
        return dict(json.loads(content.split(b"\n")[0]))
    except (ValueError, TypeError):
        return {}


def _not_shared(folder: Path, written: dict[str, Any]) -> str | None:
    """Returns an error if this rank does not see the lock that rank 0 wrote."""
    deadline = time.monotonic() + VISIBLE_S
    while True:
        try:
            if _first_line((folder / ".lock").read_bytes()) == written:
                return None
        except OSError:
            pass
        if time.monotonic() > deadline:
            return f"on {platform.node()} is not rank 0's folder on {written['host']}; use one that all nodes share"
        time.sleep(0.2)
