"""history.jsonl: what happened in a stage, a line an iteration and a line an epoch, each point once; of a logistic fit a line a
penalty.

    {"iteration": 12, "train_loss": 0.61}
    {"epoch": 3, "iteration": 48, "train_loss": ..., "val_loss": ..., "val_top1_accuracy": ..., "learning_rate": ..., ...}
    {"iteration": 5, "C": 0.01, "train_loss": ..., "val_loss": ..., "val_top1_accuracy": ..., ...}      a penalty tried

Rank 0 alone writes it; MLflow is filled from it. Epochs count from 1 here, as people do.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vggcore.whole_file import append_text, write_text

FLUSH_EVERY_S = 0.5


class HistoryWriter:
    """Appends rows to a stage's history, a few at a time; `may_write` is asked before each write (see fence_holds)."""

    def __init__(self, path: Path, may_write: Callable[[], None]) -> None:
        """`may_write` raises when this process has lost the right to write."""
        self.path, self.may_write = path, may_write
        self.waiting: list[str] = []
        self.flushed_at = -math.inf      # so that the first row is on disk at once

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row; the first is on disk at once, others half a second later at the latest, or at the next flush."""
        self.waiting.append(json.dumps(row, allow_nan=False) + "\n")
        if time.monotonic() - self.flushed_at > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Writes all rows that wait. Raises StoreError when the disk takes no more."""
        if self.waiting:
            self.may_write()
            append_text(self.path, "".join(self.waiting))
        self.waiting.clear()
        self.flushed_at = time.monotonic()


def parse_rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of whole lines; a line that a killed writer left unfinished is passed over."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_history(path: Path) -> list[dict[str, Any]]:
    """All rows in order, each iteration and each epoch once; no file is no rows."""
    if not path.exists():
        return []
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    for row in parse_rows(path.read_text(encoding="utf-8").splitlines()):
        kept[("epoch", row["epoch"]) if "epoch" in row else ("iteration", row["iteration"])] = row
    return sorted(kept.values(), key=lambda row: (row["iteration"], "epoch" in row))


def cut_history(path: Path, *, iteration: int, epochs: int) -> None:
    """Drops what came after a checkpoint of `iteration` updates and `epochs` whole epochs: it will happen again."""
    rows = [
        row
        for row in read_history(path)
        if (row["epoch"] <= epochs if "epoch" in row else row["iteration"] <= iteration)
    ]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
