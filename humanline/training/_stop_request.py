import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest:
    """SIGTERM and SIGINT as a request: within the block they are noted, and the run ends when it can.

    Args:
        interrupt (Callable[[], None]): called as well, to end what may wait for long.

    Attributes:
        signal (str | None): the name of the signal that came.
    """

    def __init__(self, interrupt: Callable[[], None]) -> None:
        self.interrupt = interrupt
        self.signal: str | None = None

    def __enter__(self) -> "StopRequest":
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self.interrupt()
