"""Which pictures each worker trained in each iteration, for who wants to check: pictures/rank-<r>.jsonl of a stage.

    {"start": 2, "iteration": 31, "pictures": [7, 0, 12]}

pictures: rows of the manifest's train split, in the order of the global batch. What was trained again after a restart stands
there again, under a later start (a line of starts.jsonl): the last start's counts.
"""

import json
from pathlib import Path
from typing import TextIO

import numpy as np

from training.history import parse_rows
from training.history_tail import last_bytes
from vggcore.errors import StoreError


class PictureLog:
    """One worker's file; a line is on its way to the disk when add() returns, so that a kill loses none."""

    def __init__(self, stage_folder: Path, rank: int, start: int) -> None:
        """Opens the file, to add to it. Raises StoreError when it cannot be written."""
        self.start, self.path = start, stage_folder / "pictures" / f"rank-{rank}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = last_bytes(self.path)[-1:] in (b"\n", b"")
            self.file: TextIO = self.path.open("a", encoding="utf-8", buffering=1)
            self.file.write("" if whole else "\n")          # a kill or a full disk left a part of a line
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written ({error.strerror}); leave --log-pictures out") from error

    def add(self, iteration: int, pictures: np.ndarray) -> None:
        """Adds an iteration, counted from 1. Raises StoreError when the disk takes no more."""
        row = {"start": self.start, "iteration": iteration, "pictures": pictures.tolist()}
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StoreError(
                f"{self.path}: cannot be written ({error.strerror}); make room, or leave --log-pictures out"
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def pictures_that_count(stage_folder: Path) -> dict[int, list[int]]:
    """The pictures of each iteration's global batch over all workers, of the last start that trained it."""
    last: dict[int, int] = {}
    found: dict[tuple[int, int], list[int]] = {}
    for path in sorted((stage_folder / "pictures").glob("rank-*.jsonl"), key=rank_of):
        for row in parse_rows(path.read_text(encoding="utf-8").splitlines()):
            last[row["iteration"]] = max(last.get(row["iteration"], 0), row["start"])
            found.setdefault((row["start"], row["iteration"]), []).extend(row["pictures"])
    return {iteration: found[start, iteration] for iteration, start in sorted(last.items())}


def rank_of(path: Path) -> int:
    """The rank in a file's name."""
    return int(path.stem.removeprefix("rank-"))
