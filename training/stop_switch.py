"""SIGINT and SIGTERM while stages run: they belong to us, and leave a checkpoint behind."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

STOP_WAIT_S = 20.0        # how long workers may take to write a checkpoint after a signal


class Interrupted(Exception):
    """SIGINT or SIGTERM came; all that was asked for is safe in the store."""


class StopSwitch:
    """Owns SIGINT and SIGTERM while stages run: the first asks for a checkpoint, the second ends at once."""

    def __init__(self) -> None:
        """Handlers are set on entry and put back on leaving."""
        self.on_stop: Callable[[], None] = lambda: None
        self.stopped_at: float | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSwitch":
        """Takes the signals."""
        self.take_signals()
        return self

    def take_signals(self) -> None:
        """Sets our handlers; in another thread than the main one the signals stay with their owner."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                found = signal.signal(number, self.handle)
                self.before.setdefault(number, found)

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """A signal came."""
        if self.stopped_at is not None:
            raise Interrupted
        self.stopped_at = time.monotonic()
        logger.warning("%s: writing a checkpoint, then stopping; once more ends at once", signal.Signals(number).name)
        self.on_stop()

    @property
    def stopped(self) -> bool:
        """Whether a signal came."""
        return self.stopped_at is not None

    @property
    def overdue(self) -> bool:
        """Whether the workers have had their time to stop."""
        return self.stopped_at is not None and time.monotonic() - self.stopped_at > STOP_WAIT_S
