import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from torchtune import utils

from humanline.launch import meeting_place

log = utils.get_logger("INFO")

_SECONDS_BETWEEN_LOOKS = 0.5
_PATIENCE_S = 10.0
"""How long the end of a run waits for its thread, which may ask a store on a lost node."""
_STOP = "humanline/stop"


class StopRequest:
    """Records SIGTERM and SIGINT within the block as a request to stop, so that the run can end at a safe point.

    The handler only sets a plain attribute: it runs between any two steps of the interpreter, where the interrupted
    code may hold a lock. A thread checks the attribute twice a second, and calls ``interrupt``.

    Args:
        interrupt (Callable[[], None]): called once in that thread, to end long waits.
    """

    def __init__(self, interrupt: Callable[[], None]) -> None:
        self.interrupt = interrupt
        self._number: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        store, _, world_size = meeting_place()
        # A signal may reach one rank only, while another waits for a server. A separate connection, as in _Watch.
        self._store = store.clone() if world_size > 1 else None  # type: ignore[attr-defined]

    @property
    def signal(self) -> str | None:
        """The name of the last signal; None before the first."""
        return None if self._number is None else signal.Signals(self._number).name

    def __enter__(self) -> "StopRequest":
        # The interpreter writes to the pipe at once; the handler has to wait while the main thread is in a collective.
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._over.set()
        os.close(signal.set_wakeup_fd(self._wakeup))  # which wakes the thread
        # A thread that asks the store while the interpreter ends aborts the process.
        self._thread.join(_PATIENCE_S)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def _watch(self) -> None:
        while not self._is_asked():
            if self._over.is_set():
                os.close(self._reader)
                return
        try:
            self.interrupt()
        except Exception:  # from an engine or a reward; the run still ends after its step
            log.exception("stopping the engine or the reward failed")

    def _is_asked(self) -> bool:
        """Returns whether this rank or another has received a signal. Waits half a second at most."""
        if select.select([self._reader], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
            came = [number for number in os.read(self._reader, 1 << 10) if number in self._before]
            if not came and not self._over.is_set() and self._number is None:
                return False
            self._number = came[-1] if came else self._number
        if self._store is not None:
            try:
                if self._number is not None:
                    self._store.set(_STOP, str(self._number))
                elif self._store.check([_STOP]):
                    return True
            except RuntimeError:  # the process that held the store has ended
                pass
        return self._number is not None
