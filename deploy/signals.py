"""SIGINT and SIGTERM while a tick is at work: they end it where nothing is half done; the next call goes on there."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from training.stop_switch import Interrupted


class Signals:
    """The two signals while the block runs."""

    def __init__(self) -> None:
        """Handlers are set on entry and put back on leaving."""
        self.came, self.holding = False, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        """Takes the signals; in another thread than the main one they stay with their owner."""
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self.before[name] = signal.signal(name, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        """A signal came."""
        self.came = True
        self.check()

    def check(self) -> None:
        """Raises Interrupted after a signal, unless it is held back."""
        if self.came and not self.holding:
            raise Interrupted

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Promotion and notification take seconds: a signal waits for the end of them."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
