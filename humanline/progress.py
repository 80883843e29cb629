"""How far a long stage is: a bar on a terminal, and elsewhere, as in a job's log file, a plain line now and then."""

import sys
import time
from contextlib import suppress
from typing import Any

from tqdm import tqdm

SECONDS = 10.0  # at least, between two plain lines
FIRST, PATIENCE = 0.01, 60.0  # the share at which the first line comes: less says little of the time left; or seconds


class Progress(tqdm):
    """tqdm's bar, with its arguments, for the terminal; otherwise lines, at most one every ten seconds.

    A line has what is done, of how much, the time so far, the time left, the speed, and the bar's postfix. A bar that
    stays on a terminal (``leave``) ends with a line. Where lines cannot be written, as on a full disk, there are none.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.plain = not (sys.stderr and not sys.stderr.closed and sys.stderr.isatty())
        self.written_at, self.written = time.monotonic(), settings.get("initial", 0)
        self.disable: bool  # without type in tqdm's stubs
        super().__init__(*arguments, dynamic_ncols=True, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Shows the bar; as a line, only if the last is ten seconds old."""
        if not self.plain:
            return super().display(msg, pos)
        waited = time.monotonic() - self.written_at
        tells = self.written > self.initial or self.n - self.initial >= FIRST * (self.total or 0)
        if waited >= (SECONDS if tells else PATIENCE):
            self._write()

    def clear(self, nolock: bool = False) -> None:
        """Removes the bar from the terminal; lines stay."""
        if not self.plain:
            super().clear(nolock)

    def close(self) -> None:
        """Ends the bar, with a last line if it is to stay or has an earlier one."""
        if not self.plain:
            super().close()
        elif not self.disable:
            self.disable = True
            self._decr_instances(self)
            if self.leave or self.written > self.initial:
                self._write()

    def _write(self) -> None:
        if self.n == self.written or sys.stderr is None:
            return
        self.written_at, self.written = time.monotonic(), self.n
        line = "{desc}: " * bool(self.desc) + "{n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}"
        facts = self.format_dict | {"ncols": None} | ({"bar_format": line + "{postfix}"} if self.total else {})
        with suppress(OSError, ValueError):
            print(" ".join(self.format_meter(**facts).split()), file=sys.stderr, flush=True)
