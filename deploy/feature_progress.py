"""What a person sees on stderr while features are computed: how many, how fast, how long still."""

import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from deploy.progress import duration

PLAIN_EVERY_S = 10.0      # between lines where there is no terminal
WINDOW_S = 20.0           # the rate is over about this time


class FeatureProgress:
    """Shows one computation of features; a context manager."""

    def __init__(self, console: Console, label: str = "features") -> None:
        """label: begins the line."""
        self.console, self.label = console, label
        self.seen: list[tuple[float, int]] = []
        self.told_at = float("-inf")
        self.live: Live | None = None

    def __enter__(self) -> "FeatureProgress":
        return self

    def __exit__(self, *_: object) -> None:
        """The moving line goes."""
        if self.live is not None:
            self.live.stop()

    def advance(self, done: int, total: int) -> None:
        """Pictures computed so far, of those to compute."""
        now = time.monotonic()
        self.seen = [*((at, count) for at, count in self.seen if now - at < WINDOW_S), (now, done)]
        line = Text(self.text(done, total))
        if self.console.is_terminal:
            if self.live is None:
                self.live = Live(console=self.console, transient=True, refresh_per_second=4)
                self.live.start()
            self.live.update(line)
        elif now - self.told_at >= PLAIN_EVERY_S or done == total:
            self.told_at = now
            self.console.print(line, soft_wrap=True)

    def text(self, done: int, total: int) -> str:
        """The line."""
        (began, first), (now, last) = self.seen[0], self.seen[-1]
        speed = (last - first) / (now - began) if now - began > 0.5 and last > first else None
        words = f"{self.label}: {done:,} of {total:,} pictures"
        return f"{words}, {speed:,.1f} pictures/s, {duration((total - done) / speed)} left" if speed else words

    def say(self, words: str) -> None:
        """One line of its own."""
        self.console.print(Text(words), soft_wrap=True)
