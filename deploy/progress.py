"""What a person sees on stderr while stages run: moving lines on a terminal, a plain line an epoch elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from training.listener import Listener
from vggcore.schedule import Stage

SPEED_WINDOW_S = 10.0    # images/s is over about this time
GO_FIRST = ("rate", "loss", "speed")     # columns that a narrow terminal does without
ENDS = {"FINISHED": "finished", "KILLED": "stopped; the same command goes on here", "FAILED": "failed"}


class StageLine:
    """One stage's epoch, images/s, loss, val accuracy, learning rate and time left, from its history's rows."""

    def __init__(self, stage: Stage, pictures: int) -> None:
        """pictures: training pictures an epoch."""
        self.stage = stage
        self.batches = -(-pictures // stage.global_batch)
        self.seen: list[tuple[float, int]] = []
        self.last: dict[str, Any] = {}
        self.iteration = self.epoch = 0
        self.val: float | None = None
        self.rate: float | None = None           # the learning rate that the last epoch was trained with

    def take(self, rows: list[dict[str, Any]]) -> list[int]:
        """Takes new rows and gives the epochs that ended in them; what was known is passed over."""
        ended = []
        for row in rows:
            if row["iteration"] < self.iteration or (row["iteration"] == self.iteration and "epoch" not in row):
                continue
            self.iteration, self.last = row["iteration"], row
            if "epoch" in row and row["epoch"] > self.epoch:
                self.epoch, self.val, self.rate = row["epoch"], row["val_top1_accuracy"], row["learning_rate"]
                ended.append(self.epoch)
        if rows:
            now = time.monotonic()
            recent = [(at, iteration) for at, iteration in self.seen if now - at < SPEED_WINDOW_S]
            self.seen = [*recent, (now, self.iteration)]
        return ended

    def images_per_second(self) -> float | None:
        """Over the last seconds, validation included; None until there is something to measure."""
        if len(self.seen) < 2 or self.seen[-1][0] - self.seen[0][0] < 0.5:
            return None
        (began, first), (now, last) = self.seen[0], self.seen[-1]
        return (last - first) * self.stage.global_batch / (now - began) or None

    def cells(self, *, moving: bool) -> dict[str, str]:
        """What is known of the stage, "" where it is not yet; moving: the epoch that runs, else the one that ended."""
        stage, speed = self.stage, self.images_per_second()
        epoch = min(self.epoch + 1, stage.max_epochs) if moving else self.epoch
        left = (stage.max_epochs * self.batches - self.iteration) * stage.global_batch / speed if speed else 0.0
        return {
            "stage": f"{stage.name}:",
            "epoch": f"epoch {epoch}/{stage.max_epochs}",
            "speed": f"{speed:,.0f} images/s" if speed else "",
            "loss": f"loss {self.last['train_loss']:.4f}" if "train_loss" in self.last else "",
            "val": f"val {self.val:.4f}" if self.val is not None else "",
            "rate": f"lr {self.rate:g}" if self.rate is not None else "",
            "left": f"at most {duration(left)} left" if speed else "",
        }

    def text(self) -> str:
        """The stage's state in one line."""
        name, *rest = (words for words in self.cells(moving=False).values() if words)
        return f"{name} {', '.join(rest)}"


class FitLine:
    """A logistic stage's features, and then its penalties; it has what StageLine shows, in the same cells."""

    def __init__(self, stage: Stage) -> None:
        """Nothing is known yet."""
        self.stage = stage
        self.seen: list[tuple[float, int]] = []
        self.split, self.done, self.total = "", 0, 0
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.told: set[str] = set()       # splits whose features are computed, and said to be

    def take(self, rows: list[dict[str, Any]]) -> list[int]:
        """Takes new rows and gives the penalties among them, by their numbers."""
        for row in rows:
            self.last = row
            if not self.best or row["val_loss"] < self.best["val_loss"]:
                self.best = row
        return []

    def features(self, split: str, done: int, total: int) -> bool:
        """How far the features of a split are; whether they are newly complete."""
        if split in self.told:
            return False
        if split != self.split:
            self.seen = []
        if done != self.done or not self.seen:
            now = time.monotonic()
            recent = [(at, count) for at, count in self.seen if now - at < SPEED_WINDOW_S]
            self.seen = [*recent, (now, done)]
        self.split, self.done, self.total = split, done, total
        if done < total:
            return False
        self.told.add(split)
        return True

    def pictures_per_second(self) -> float | None:
        """Over the last seconds; None until there is something to measure."""
        (began, first), (now, last) = (self.seen[0], self.seen[-1]) if self.seen else ((0.0, 0), (0.0, 0))
        return (last - first) / (now - began) if now - began > 0.5 and last > first else None

    def cells(self, *, moving: bool) -> dict[str, str]:
        """What is known of the stage, "" where it is not yet."""
        computing = moving and not self.last and self.done < self.total
        speed, shown = self.pictures_per_second() if computing else None, self.last if moving else self.best
        place = f"features of {self.split} {self.done:,}/{self.total:,}" if computing or not self.last else ""
        if self.last:
            place = f"C {shown['C']:g}"
        return {
            "stage": f"{self.stage.name}:",
            "epoch": place,
            "speed": f"{speed:,.1f} images/s" if speed else "",
            "loss": f"loss {shown['train_loss']:.4f}" if shown else "",
            "val": f"val {shown['val_top1_accuracy']:.4f}" if shown else "",
            "rate": f"val loss {shown['val_loss']:.4f}" if shown else "",
            "left": f"{duration((self.total - self.done) / speed)} left" if speed else "",
        }

    def text(self) -> str:
        """The stage's state in one line."""
        name, *rest = (words for words in self.cells(moving=False).values() if words)
        return f"{name} {', '.join(rest)}"


class Progress(Listener):
    """Shows the stages that run, one or several at once."""

    def __init__(self, console: Console, *, pictures: int, stages: int) -> None:
        """pictures: training pictures an epoch; stages: how many the schedule has."""
        self.console, self.pictures, self.stages = console, pictures, stages
        self.number = 0
        self.lines: dict[str, StageLine | FitLine] = {}      # of the stages that run, by key
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
        if stage.fit == "logistic":
            scale = f"logistic fit at Q={', '.join(map(str, stage.default_test_scales))}"
        self.say(f"{place}: net {stage.net}, {scale}, from {stage.init_from or 'random weights'} ({key})")
        self.lines[key] = FitLine(stage) if stage.fit == "logistic" else StageLine(stage, self.pictures)
        if self.console.is_terminal and self.live is None:
            self.live = Live(console=self.console, transient=True, refresh_per_second=4)
            self.live.start()

    def rows(self, stage: Stage, key: str, rows: list[dict[str, Any]]) -> None:
        """Takes new rows; on a terminal the moving lines change, elsewhere the epoch that ended is a line."""
        line = self.lines[key]
        if line.take(rows) and self.live is None:
            self.say(line.text())
        self.show()

    def features(self, stage: Stage, key: str, split: str, done: int, total: int) -> None:
        """How far a logistic stage's features are; a line where those of a split are complete."""
        line = self.lines[key]
        if isinstance(line, FitLine) and line.features(split, done, total) and self.live is None:
            self.say(f"{stage.name}: features of {split}: {total:,} pictures computed")
        self.show()

    def show(self) -> None:
        """The moving lines as they are now, where there is a terminal."""
        if self.live is not None:
            self.live.update(side_by_side([line.cells(moving=True) for line in self.lines.values()], self.console.width))

    def workers_restarted(self, stage: Stage, key: str, iteration: int) -> None:
        """Says so; what comes again until the iteration that was reached is passed over."""
        self.say(f"{stage.name}: its workers were started anew; training goes on from iteration {iteration}")
        self.lines[key].seen = []

    def node_leaves(self, stage: Stage, key: str, iteration: int, every_s: float) -> None:
        """Says so."""
        self.say(
            f"{stage.name}: a node is about to be taken away, says Ray; checkpoint at iteration {iteration}, then one every"
            f" {every_s:.0f} s"
        )

    def checkpoint_passed_over(self, stage: Stage, key: str, words: str) -> None:
        """Says which, and why."""
        self.say(f"{stage.name}: a broken checkpoint was passed over, the one before is used: {words}")

    def stage_left_out(self, stage: Stage, key: str, reason: str) -> None:
        """Says why."""
        self.number += 1
        self.say(f"[{self.number}/{self.stages}] {stage.name}: {reason}")

    def stage_ends(self, stage: Stage, key: str, status: str) -> None:
        """Leaves the stage's last line."""
        line = self.lines.pop(key)
        if self.live is not None:
            self.show()
            self.say(line.text())
            if not self.lines:
                self.live.stop()
                self.live = None
        elif isinstance(line, FitLine) and line.best:
            self.say(line.text())
        self.say(f"{stage.name}: {ENDS[status]}")

    def say(self, words: str) -> None:
        """One line on stderr."""
        self.console.print(Text(words), soft_wrap=True)


def side_by_side(rows: list[dict[str, str]], width: int) -> Table:
    """The stages' cells below one another, for the eye to compare; a narrow terminal gets fewer columns, not two lines."""
    widths = {name: max(len(row[name]) for row in rows) for name in (rows[0] if rows else ())}
    shown = [name for name, wide in widths.items() if wide]
    for name in GO_FIRST:
        if name in shown and sum(widths[one] + 2 for one in shown) - 2 > width:
            shown.remove(name)
    table = Table.grid(padding=(0, 2, 0, 0))
    for name in shown:
        table.add_column(no_wrap=True, justify="right" if name in ("speed", "left") else "left")
    for row in rows:
        table.add_row(*(Text(row[name]) for name in shown))
    return table


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
