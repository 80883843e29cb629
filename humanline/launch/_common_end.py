"""Ends all ranks when one rank fails. Each rank prints the reason."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torchtune import training

from humanline.config import missing_package
from humanline.errors import ConfigError, DataError, TrainingError
from humanline.launch._processes import meeting_place

FAILURE, TOLD, GONE = "humanline/failure", "humanline/told", "humanline/gone"
SECONDS_BETWEEN_LOOKS = 0.5
OURS = ConfigError | DataError | TrainingError
PATIENCE_S = 10.0
"""How long a failed rank waits for the other ranks to print its error."""


@contextmanager
def common_end(program: str) -> Iterator[None]:
    """Ends the program with one line and exit code 1 if the block fails, and all other ranks with the same line.

    A file, a disk, a server or a user's component can fail on one rank alone, at any point, while the other ranks wait
    for it in a collective. The failed rank therefore writes its line to the store in which the ranks met. A thread of
    each other rank reads the store twice a second and ends its rank.

    An error that is not a user's mistake also prints its traceback, before the line, on the rank that raised it.

    Args:
        program (str): the program's name, which starts the line.
    """
    watch = _Watch(program) if training.is_distributed() else None
    try:
        yield
    except Exception as error:
        line = _line(error)
        if watch is None:
            if line is None:
                raise
            sys.exit(f"{program}: {line}")
        watch.end(error, line)
    else:
        if watch is not None:
            watch.stop()


def _line(error: Exception) -> str | None:
    """Returns an error as one line; None if it needs a traceback."""
    if isinstance(error, OURS):
        return str(error)
    if (package := missing_package(error)) is not None:
        return package
    return _named(error) if isinstance(error, OSError | MemoryError) else None


def _named(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class _Watch:
    """Watches for the failure of another rank, and tells the other ranks about the failure of this one."""

    def __init__(self, program: str) -> None:
        self.program = program
        store, self.rank, self.world_size = meeting_place()
        # A second connection, because a rank may wait in the first one for long.
        self.store = store.clone()  # type: ignore[attr-defined]
        self.lock, self.over = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        with self.lock:
            self.over.set()
        self.thread.join()

    def end(self, error: Exception, line: str | None) -> None:
        """Ends this rank because of its own error, or because of another rank's error that caused it."""
        self.stop()
        lost = line is None and "by peer" in str(error) and self._failure() is None
        if lost:
            line = "another rank ended without an error message; the system may have killed it, for example for memory"
        elif line is None and self._failure() is None:
            traceback.print_exception(error)
        # An error from outside humanline, or one caused by it, may be this rank's alone, so the line names the rank.
        if not isinstance(error, OURS) or not isinstance(error.__cause__, OURS | None):
            line = f"rank {self.rank}: {line or _named(error)}"
        self._say(self._failure(line) or str(line), wait=not lost)
        sys.exit(1)

    def _watch(self) -> None:
        while not self.over.wait(SECONDS_BETWEEN_LOOKS):
            line = self._failure()
            with self.lock:
                if line is not None and not self.over.is_set():
                    self._say(line)
                    os._exit(1)  # the main thread may wait forever for the failed rank

    def _failure(self, line: str | None = None) -> str | None:
        """Returns the line of the first rank that failed. If there is none, stores ``line`` and returns it."""
        try:
            if line is not None:
                return self.store.compare_set(FAILURE, "", line).decode()
            return self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else None
        except RuntimeError:  # the process that held the store has ended
            return line

    def _say(self, line: str, wait: bool = True) -> None:
        """Prints the line and waits until every rank has printed it: the launcher stops all when the first one ends."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(2, f"{self.program}: {line}\n".encode())
        try:
            self.store.add(TOLD, 1)
            if not wait:
                return
            self._wait_until(TOLD, self.world_size)
            if self.rank > 0:
                self.store.add(GONE, 1)
            else:  # rank 0's process may hold the store
                self._wait_until(GONE, self.world_size - 1)
        except RuntimeError:
            return

    def _wait_until(self, key: str, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.store.add(key, 0) < count and time.monotonic() < deadline:
            time.sleep(0.05)
