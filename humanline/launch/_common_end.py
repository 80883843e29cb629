"""However one rank fails, all ranks end, and each of them says why."""

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
"""How long a rank that failed waits for the others to have said so too."""


@contextmanager
def common_end(program: str) -> Iterator[None]:
    """Ends the program with one line and exit code 1 if the block fails, and all other ranks with the same line.

    A file, a disk, a server or a component of the user's may fail on one rank alone, at any point, while the others
    wait for it in a collective. So a rank that fails leaves its line in the store in which the ranks have met, and a
    thread of each other rank, which looks there twice a second, ends that rank.

    An error that no user can be expected to cause has its traceback before the line, on the rank that it came from.

    Args:
        program (str): the name that the line starts with.
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
    """What an error says in one line; None if it takes a traceback to understand it."""
    if isinstance(error, OURS):
        return str(error)
    if (package := missing_package(error)) is not None:
        return package
    return _named(error) if isinstance(error, OSError | MemoryError) else None


def _named(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class _Watch:
    """Looks out for the failure of another rank, and tells the others of this one's."""

    def __init__(self, program: str) -> None:
        self.program = program
        store, self.rank, self.world_size = meeting_place()
        # A connection of its own: a rank may wait in the other for long.
        self.store = store.clone()  # type: ignore[attr-defined]
        self.lock, self.over = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        with self.lock:
            self.over.set()
        self.thread.join()

    def end(self, error: Exception, line: str | None) -> None:
        """Ends this rank for an error of its own, or for that of another rank of which it is only the consequence."""
        self.stop()
        lost = line is None and "by peer" in str(error) and self._failure() is None
        if lost:
            line = "another rank ended without a word; the system may have killed it, for instance for its memory"
        elif line is None and self._failure() is None:
            traceback.print_exception(error)
        # What is not ours, or was made of what is not, other ranks need not have met.
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
                    os._exit(1)  # the main thread may wait for ever for the rank that failed

    def _failure(self, line: str | None = None) -> str | None:
        """The line that the first rank to fail has left; else ``line``, which is left for the others."""
        try:
            if line is not None:
                return self.store.compare_set(FAILURE, "", line).decode()
            return self.store.get(FAILURE).decode() if self.store.check([FAILURE]) else None
        except RuntimeError:  # the process that had the store has ended
            return line

    def _say(self, line: str, wait: bool = True) -> None:
        """Writes the line, and waits until every rank has: the launcher stops all when the first one ends."""
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
            else:  # whose process may have the store
                self._wait_until(GONE, self.world_size - 1)
        except RuntimeError:
            return

    def _wait_until(self, key: str, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.store.add(key, 0) < count and time.monotonic() < deadline:
            time.sleep(0.05)
