"""Checkpoints of a stage: everything needed to go on, in a folder that appears whole or not at all.

    checkpoints/iteration-<n>/model.safetensors   weights
    checkpoints/iteration-<n>/optimizer.pt        the optimiser's state (momentum), tensors only
    checkpoints/iteration-<n>/progress.json       where the stage stands: see Progress
"""

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.optimise import Plateau
from training.store import read_json
from vggcore.errors import StoreError
from vggcore.weights import load_weights, save_weights
from vggcore.whole_file import sync_folder, write_json

KEPT = 2   # the newest checkpoints that stay


@dataclass(frozen=True)
class Progress:
    """Where a stage stands: `batch` batches of epoch `epoch` (counted from 0) are done, `iteration` updates in all."""

    epoch: int
    batch: int
    iteration: int
    loss_sum: float            # sum of the losses of this epoch's pictures so far
    seconds: float             # training time so far, over all starts
    plateau: Plateau
    world_size: int            # for the record: what wrote this
    threads: int
    val_top1: float = -1.0     # of the last whole epoch; -1 before the first

    @classmethod
    def start(cls, plateau: Plateau, *, world_size: int, threads: int) -> "Progress":
        """Nothing done yet."""
        return cls(
            epoch=0, batch=0, iteration=0, loss_sum=0.0, seconds=0.0, plateau=plateau, world_size=world_size, threads=threads
        )


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    progress: Progress

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters by name, on the CPU."""
        return load_weights(self.folder / "model.safetensors")

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state_dict, on the CPU. Raises StoreError when the file is broken."""
        path = self.folder / "optimizer.pt"
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:   # a broken zip, a short read, a pickle that is refused: torch has no one error for it
            raise StoreError(f"{path}: cannot be read ({error}); remove its folder, the checkpoint before is used") from error
        return state


def checkpoint_folder(stage_folder: Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` updates stands."""
    return stage_folder / "checkpoints" / f"iteration-{iteration}"


def iterations_on_disk(stage_folder: Path) -> list[int]:
    """The iterations of the whole checkpoints, ascending."""
    folder = stage_folder / "checkpoints"
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"iteration-(\d+)", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def read_checkpoint(stage_folder: Path, iteration: int) -> Checkpoint:
    """The checkpoint after `iteration` updates. Raises StoreError when it is absent or its record is broken."""
    folder = checkpoint_folder(stage_folder, iteration)
    found = read_json(folder / "progress.json")
    if found is None:
        raise StoreError(f"{folder}: no checkpoint there; start the same command again")
    return Checkpoint(folder, Progress(**{**found, "plateau": Plateau(**found["plateau"])}))


def newest_checkpoint(stage_folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None before the first."""
    iterations = iterations_on_disk(stage_folder)
    return read_checkpoint(stage_folder, iterations[-1]) if iterations else None


def write_checkpoint(
    stage_folder: Path, progress: Progress, *, weights: dict[str, torch.Tensor], optimizer_state: dict[str, Any]
) -> Path:
    """Writes a checkpoint whole and drops all but the newest KEPT; returns its folder.

    Files go to a temporary folder, are made durable, and the folder is renamed: a crash at any line leaves the
    checkpoints that were there. One of the same iteration (stopped between an epoch's last update and its validation)
    is replaced.
    """
    folder = checkpoint_folder(stage_folder, progress.iteration)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_weights(weights, part / "model.safetensors")
    torch.save(optimizer_state, part / "optimizer.pt")
    with (part / "optimizer.pt").open("rb") as written:
        os.fsync(written.fileno())
    write_json(part / "progress.json", asdict(progress))
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old)
    else:
        part.rename(folder)
    sync_folder(folder.parent)
    drop_old(stage_folder)
    return folder


def drop_old(stage_folder: Path) -> None:
    """Removes all but the newest KEPT checkpoints, and what a killed writer left half-written."""
    for iteration in iterations_on_disk(stage_folder)[:-KEPT]:
        shutil.rmtree(checkpoint_folder(stage_folder, iteration))
    for leftover in (stage_folder / "checkpoints").glob(".iteration-*"):
        shutil.rmtree(leftover)
