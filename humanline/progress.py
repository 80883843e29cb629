"""How far a long stage is: a bar on a terminal, and elsewhere, as in a job's log file, a plain line now and then."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 10.0  # at least, between two plain lines


class Progress(tqdm):
    """tqdm's bar, with its arguments, for the terminal; otherwise lines, the first after ten seconds.

    A line has what is done, of how much, the time so far, the time left, the speed, and the bar's postfix.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.plain, self.written_at, self.written = not sys.stderr.isatty(), time.monotonic(), -1
        self.disable: bool  # without type in tqdm's stubs
        super().__init__(*arguments, dynamic_ncols=True, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Shows the bar; as a line, only if the last is ten seconds old."""
        if not self.plain:
            return super().display(msg, pos)
        if self.n != self.written and time.monotonic() - self.written_at >= SECONDS:
            self._write()

    def clear(self, nolock: bool = False) -> None:
        """Removes the bar from the terminal; lines stay."""
        if not self.plain:
            super().clear(nolock)

    def close(self) -> None:
        """Ends the bar. The last line says what was done, if an earlier one was written or the bar is to stay."""
        if not self.plain:
            super().close()
        elif not self.disable:
            self.disable = True
            self._decr_instances(self)
            if self.n != self.written and (self.leave or self.written >= 0):
                self._write()

    def _write(self) -> None:
        self.written_at, self.written = time.monotonic(), self.n
        line = "{n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}{postfix}"
        line = f"{self.desc}: {line}" if self.desc else line
        facts = self.format_dict | {"ncols": None} | ({"bar_format": line} if self.total else {})
        print(" ".join(self.format_meter(**facts).split()), file=sys.stderr, flush=True)
