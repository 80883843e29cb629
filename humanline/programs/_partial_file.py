"""Rows that are written down as they are made: a program that was cut short goes on with those that it lacks."""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from humanline.errors import ConfigError


class PartialFile:
    """The rows of an output that is not whole yet, in a file beside it, which one process at a time may hold.

    Args:
        output (str | Path): the output.
        made_of (Any): all that the rows depend on, as JSON has it. The file's name has a digest of it, so that rows of
            anything else are not taken over.

    Attributes:
        path (Path): the file.
        rows (list[Any]): within the block, what an earlier run has left.
    """

    def __init__(self, output: str | Path, made_of: Any) -> None:
        output = Path(output).expanduser()
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.path = output.with_name(f"{output.name}.{digest}.partial")

    def __enter__(self) -> "PartialFile":
        """
        Raises:
            ConfigError: if another process holds the file, or it cannot be written or locked.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it goes with the process, however that ends
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"output: {self.path} is being written by another run; wait for it, or name another"
            ) from None
        except OSError as error:
            raise ConfigError(f"output: {self.path} cannot be written or locked ({error}); name another") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]  # behind it is a line that was being written
        self._file.truncate(len(whole))
        self.rows = [json.loads(line) for line in whole.splitlines()]
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows behind those that are there."""
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self._file.flush()
