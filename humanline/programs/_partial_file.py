"""Rows that are written one by one, so that an interrupted program resumes with the missing rows."""

import fcntl
import glob
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from humanline.errors import ConfigError


class PartialFile:
    """The rows of an incomplete output, in a file beside it. Only one process at a time may hold the file.

    Args:
        output (str | Path): the path of the output.
        made_of (Any): everything that the rows depend on, as JSON values. The file's name has its digest, so that rows
            made of anything else are not reused.
        date (str | None): today, if the rows depend on the date. Rows that were begun on another day are completed with
            that day's date.

    Attributes:
        date (str | None): the date that the rows were begun on; None if they do not depend on it.
        path (Path): the partial file.
        rows (list[Any]): within the block, the rows that an earlier run has written.
    """

    def __init__(self, output: str | Path, made_of: Any, date: str | None = None) -> None:
        output = Path(output).expanduser()
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:12]
        start = f"{output.name}.{digest}"
        if date is not None:
            begun = sorted(output.parent.glob(f"{glob.escape(start)}.*.partial"))
            date = begun[-1].suffixes[-2][1:] if begun else date
            start = f"{start}.{date}"
        self.date = date
        self.path = output.with_name(f"{start}.partial")

    def __enter__(self) -> "PartialFile":
        """Opens and locks the file, and reads its complete rows.

        Raises:
            ConfigError: if another process holds the file, or it cannot be written or locked.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released with the process, however it ends
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"output: {self.path} is being written by another run; wait for it, or use another output"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"output: {self.path} cannot be written or locked ({error}); use another output"
            ) from None
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]  # without a partly written last line
        self._file.truncate(len(whole))
        self.rows = [json.loads(line) for line in whole.splitlines()]
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to the file."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(lines.encode(errors="backslashreplace"))  # half of a character stays JSON's escape
        self._file.flush()
