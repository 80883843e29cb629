import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from torchtune import utils

log = utils.get_logger("INFO")

_SECONDS_BETWEEN_LOOKS = 0.5


class StopRequest:
    """SIGTERM and SIGINT as a request: within the block they are noted, and the run ends when it can.

    The handler sets a plain attribute and nothing else: it runs between any two steps of the interpreter, where the
    code that it interrupts may hold a lock. A thread looks at the attribute twice a second, and calls ``interrupt``.

    Args:
        interrupt (Callable[[], None]): called once in that thread, to end what may wait for long.
    """

    def __init__(self, interrupt: Callable[[], None]) -> None:
        self.interrupt = interrupt
        self._number: int | None = None
        self._over = threading.Event()

    @property
    def signal(self) -> str | None:
        """The name of the signal that came last."""
        return None if self._number is None else signal.Signals(self._number).name

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._over.set()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number

    def _watch(self) -> None:
        while self._number is None:
            if self._over.wait(_SECONDS_BETWEEN_LOOKS):
                return
        try:
            self.interrupt()
        except Exception:  # an engine's or a reward's own; the run ends after its step all the same
            log.exception("stopping what is sampled or scored failed")
