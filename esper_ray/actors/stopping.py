"""What people want of a run as a whole, and a signal that asks for its end."""

from __future__ import annotations

import signal
import threading
from enum import Enum
from types import FrameType, TracebackType
from typing import Any, Self


class Wish(Enum):
    """What a run is to do at its next epoch boundary; at PAUSE and STOP it is stored first."""

    RUN = "resume"
    PAUSE = "pause"
    STOP = "stop"

    def then(self, newer: Wish) -> Wish:
        """What holds after one more wish: a stop cannot be taken back."""
        return self if self is Wish.STOP else newer


class StopSignal:
    """Listens for SIGTERM while it is entered; the handler only sets `came`.

    Signals reach the main thread alone: entered in another one it does nothing.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def __enter__(self) -> Self:
        """Listen."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Listen no more; whoever listened before does so again."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.came = True
