"""What a person sees on stderr while stages run: a moving line on a terminal, a plain line an epoch elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from training.run import Listener
from vggcore.schedule import Stage

SPEED_WINDOW_S = 10.0    # images/s is over about this time


class Progress(Listener):
    """Stage, epoch, images/s, loss, val accuracy and time left of the stage that runs."""

    def __init__(self, console: Console, *, pictures: int, stages: int) -> None:
        """pictures: training pictures an epoch; stages: how many the schedule has."""
        self.console, self.pictures, self.stages = console, pictures, stages
        self.number = 0
        self.live: Live | None = None

    def stage_begins(self, stage: Stage, key: str, *, done: bool) -> None:
        """Names the stage; a done one in a word."""
        self.number += 1
        place = f"[{self.number}/{self.stages}] {stage.name}"
        if done:
            self.say(f"{place}: done before ({key})")
            return
        low, high = stage.scale
        scale = f"S={low}" if low == high else f"S in [{low}, {high}]"
        self.say(f"{place}: net {stage.net}, {scale}, from {stage.init_from or 'random weights'} ({key})")
        self.batches = -(-self.pictures // stage.global_batch)
        self.seen: list[tuple[float, int]] = []
        self.last: dict[str, Any] = {}
        self.iteration = self.epoch = 0
        self.val: float | None = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, transient=True, refresh_per_second=4)
            self.live.start()

    def rows(self, stage: Stage, key: str, rows: list[dict[str, Any]]) -> None:
        """Takes new rows; on a terminal the moving line changes, elsewhere each epoch is a line."""
        for row in rows:
            if row["iteration"] < self.iteration or (row["iteration"] == self.iteration and "epoch" not in row):
                continue
            self.iteration, self.last = row["iteration"], row
            if "epoch" in row and row["epoch"] > self.epoch:
                self.epoch, self.val = row["epoch"], row["val_top1_accuracy"]
                if self.live is None:
                    self.say(self.line(stage))
        if rows:
            now = time.monotonic()
            recent = [(at, iteration) for at, iteration in self.seen if now - at < SPEED_WINDOW_S]
            self.seen = [*recent, (now, self.iteration)]
        if self.live is not None:
            self.live.update(Text(self.line(stage)))

    def workers_restarted(self, stage: Stage, key: str, iteration: int) -> None:
        """Says so; what comes again until the iteration that was reached is passed over."""
        self.say(f"{stage.name}: workers died and were started again; training goes on from iteration {iteration}")
        self.seen = []

    def stage_ends(self, stage: Stage, key: str, status: str) -> None:
        """Leaves the stage's last line."""
        if self.live is not None:
            self.live.stop()
            self.live = None
            self.say(self.line(stage))
        words = {"FINISHED": "finished", "KILLED": "stopped; the same command goes on here", "FAILED": "failed"}
        self.say(f"{stage.name}: {words[status]}")

    def line(self, stage: Stage) -> str:
        """The stage's state in one line."""
        parts = [f"{stage.name}: epoch {min(self.epoch + 1, stage.max_epochs) if self.live else self.epoch}/{stage.max_epochs}"]
        speed = self.images_per_second(stage)
        if speed:
            parts.append(f"{speed:,.0f} images/s")
        if "train_loss" in self.last:
            parts.append(f"loss {self.last['train_loss']:.4f}")
        if self.val is not None:
            parts.append(f"val {self.val:.4f}")
        if "learning_rate" in self.last:
            parts.append(f"lr {self.last['learning_rate']:g}")
        if speed:
            left = (stage.max_epochs * self.batches - self.iteration) * stage.global_batch / speed
            parts.append(f"at most {duration(left)} left")
        return ", ".join(parts)

    def images_per_second(self, stage: Stage) -> float | None:
        """Over the last seconds, validation included; None until there is something to measure."""
        if len(self.seen) < 2 or self.seen[-1][0] - self.seen[0][0] < 0.5:
            return None
        (began, first), (now, last) = self.seen[0], self.seen[-1]
        return (last - first) * stage.global_batch / (now - began) or None

    def say(self, words: str) -> None:
        """One line on stderr."""
        self.console.print(Text(words), soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
