"""Checkpoints of a stage: everything needed to go on, in a folder that appears whole or not at all.

    checkpoints/iteration-<n>/model.safetensors   weights
    checkpoints/iteration-<n>/optimizer.pt        the optimiser's state (its moments), tensors only
    checkpoints/iteration-<n>/sums.safetensors    with [train] average: sums of weights (see averaging), where there are any
    checkpoints/iteration-<n>/average.safetensors the mean of the last epochs' weights, once the stage has ended
    checkpoints/iteration-<n>/progress.json       where the stage stands (see Progress), and the digests of the others

The newest two stay, and that of the epoch with the best val top-1. A checkpoint whose files are not what was written is
set aside as checkpoints/broken-iteration-<n>, and the one before is used.
"""

import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from training.averaging import SUM_BYTES, WeightAverage, most_sums
from training.optimise import Plateau, moments
from training.store import read_json
from vggcore.errors import StoreError
from vggcore.schedule import Stage
from vggcore.weights import load_weights, save_weights
from vggcore.whole_file import refusal, sync_folder, write_json

logger = logging.getLogger(__name__)

KEPT = 2   # the newest checkpoints that stay
FLOAT_BYTES = 4
WEIGHTS, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.pt", "progress.json"
SUMS, AVERAGE = "sums.safetensors", "average.safetensors"


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
    best_iteration: int = -1   # where the epoch with the best val top-1 so far ended; -1 before the first
    val_loss: float = -1.0     # of the last whole epoch; -1 before the first, or not recorded
    best_val_loss: float = -1.0  # of the epoch with the best val top-1

    @classmethod
    def start(cls, plateau: Plateau, *, world_size: int, threads: int) -> "Progress":
        """Nothing done yet."""
        return cls(
            epoch=0, batch=0, iteration=0, loss_sum=0.0, seconds=0.0, plateau=plateau, world_size=world_size, threads=threads
        )


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk; files: the digests of its files as they were written."""

    folder: Path
    progress: Progress
    files: dict[str, str]

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters by name, on the CPU."""
        return load_weights(self.folder / WEIGHTS)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state_dict, on the CPU. Raises StoreError when the file is broken."""
        path = self.folder / OPTIMIZER
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:   # a broken zip, a short read, a pickle that is refused: torch has no one error for it
            raise StoreError(f"{path}: cannot be read ({error}); remove its folder, the checkpoint before is used") from error
        return state

    def average(self) -> WeightAverage:
        """The sums of weights under way, or their mean; nothing where there are none."""
        sums, mean = (load_weights(self.folder / name) if name in self.files else None for name in (SUMS, AVERAGE))
        return WeightAverage.read(sums, mean)

    def problem(self) -> str | None:
        """What of it is not as it was written, in words; None: it is whole."""
        for name, wanted in self.files.items():
            path = self.folder / name
            try:
                found = file_digest(path)
            except OSError as error:
                return f"{path}: cannot be read ({error.strerror})"
            if found != wanted:
                return f"{path}: is not what was written (digest {found}, written {wanted})"
        return None


def room_for_checkpoints(stage: Stage, parameters: int, trained: int) -> int:
    """Bytes of disk that a stage's checkpoints take at most: the newest, the best, and one that is being written.

    parameters: of the net; trained: those that are not frozen.
    """
    if stage.fit == "logistic":      # one, of weights alone, and the one that a killed start has left
        return 2 * FLOAT_BYTES * parameters
    one = FLOAT_BYTES * (parameters + moments(stage) * trained) + SUM_BYTES * most_sums(stage) * parameters
    return (KEPT + 2) * one


def file_digest(path: Path) -> str:
    """blake2b-128 of a file, 32 hex characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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
    found = read_json(folder / PROGRESS)
    if found is None:
        raise StoreError(f"{folder}: no checkpoint there; start the same command again")
    files = found.pop("files", {})      # records from before there were digests have none
    try:
        return Checkpoint(folder, Progress(**{**found, "plateau": Plateau(**found["plateau"])}), files)
    except (TypeError, KeyError) as error:
        raise StoreError(f"{folder / PROGRESS}: no record of a checkpoint ({error}); remove its folder") from error


def newest_checkpoint(stage_folder: Path, passed_over: list[str] | None = None) -> Checkpoint | None:
    """The newest checkpoint whose files are what was written, or None before the first.

    Broken ones are set aside, and what was found is appended to `passed_over`. Raises StoreError when all are broken: to
    start the stage over is the user's word.
    """
    problems: list[str] = []
    for iteration in reversed(iterations_on_disk(stage_folder)):
        try:
            found = read_checkpoint(stage_folder, iteration)
            problem = found.problem()
        except StoreError as error:
            problem = str(error)
        if problem is None:
            if passed_over is not None:
                passed_over += problems
            return found
        logger.warning("checkpoint passed over: %s", problem)
        problems.append(problem)
    if problems:
        raise StoreError(
            f"{problems[0]}; and no checkpoint before it is whole: bring one back from a copy of the store, or remove"
            f" {stage_folder} to train the stage from its start"
        )
    return None


def set_aside(stage_folder: Path, above: int) -> None:
    """Renames the checkpoints above an iteration, which were found broken, so that they count for nothing any more.

    Raises StoreError where the store takes no writes.
    """
    for iteration in iterations_on_disk(stage_folder):
        if iteration > above:
            folder = checkpoint_folder(stage_folder, iteration)
            broken = folder.with_name(f"broken-{folder.name}")
            shutil.rmtree(broken, ignore_errors=True)
            try:
                folder.rename(broken)
            except OSError as error:
                raise StoreError(refusal(broken, error)) from error


def write_checkpoint(
    stage_folder: Path,
    progress: Progress,
    *,
    weights: dict[str, torch.Tensor],
    optimizer_state: dict[str, Any],
    more: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    may_write: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint whole and drops what need not stay; returns its folder. more: further tensors, by file name.

    Files go to a temporary folder, are made durable, and the folder is renamed: a crash at any line leaves the
    checkpoints that were there. One of the same iteration (stopped between an epoch's last update and its validation)
    is replaced. may_write is asked last, see fence_holds. Raises StoreError when the disk takes no more: the checkpoints
    that were there stay.
    """
    folder = checkpoint_folder(stage_folder, progress.iteration)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_weights(weights, part / WEIGHTS)
        torch.save(optimizer_state, part / OPTIMIZER)
        with (part / OPTIMIZER).open("rb") as written:
            os.fsync(written.fileno())
        for name, tensors in (more or {}).items():
            save_weights(dict(tensors), part / name)
        files = {name: file_digest(part / name) for name in (WEIGHTS, OPTIMIZER, *(more or {}))}
        write_json(part / PROGRESS, {**asdict(progress), "files": files})
        may_write()
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old)
        else:
            part.rename(folder)
        sync_folder(folder.parent)
        drop_old(stage_folder, progress.best_iteration)
    except (OSError, StoreError, RuntimeError) as error:      # torch.save's own for a full disk is a RuntimeError
        shutil.rmtree(part, ignore_errors=True)
        left = iterations_on_disk(stage_folder)
        stands = f"that of iteration {left[-1]} stands" if left else "there is none yet"
        reason = first_line(error.__cause__ or error)      # ours begins with the same path, which may be long
        raise StoreError(
            f"{folder}: a checkpoint cannot be written ({reason}), {stands}; make room, or make the store writable, and start"
            " the same command again"
        ) from error
    return folder


def first_line(error: BaseException) -> str:
    """The first line of an error's text, 200 characters at most."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def drop_old(stage_folder: Path, best_iteration: int) -> None:
    """Removes all but the newest KEPT checkpoints and the best epoch's, and what a killed writer left half-written."""
    for iteration in iterations_on_disk(stage_folder)[:-KEPT]:
        if iteration != best_iteration:
            shutil.rmtree(checkpoint_folder(stage_folder, iteration))
    for leftover in (stage_folder / "checkpoints").glob(".iteration-*"):
        shutil.rmtree(leftover)


class CheckpointWriter:
    """Writes a stage's checkpoints behind its back, one at a time: training waits for a copy in memory, not for the disk."""

    def __init__(
        self, stage_folder: Path, may_write: Callable[[], None], on_written: Callable[[int, float], None] | None = None
    ) -> None:
        """may_write: asked before a checkpoint appears; raises when this process has lost the right to write.

        on_written: hears, in the thread that wrote, of each checkpoint's iteration and the seconds that writing took.
        """
        self.stage_folder, self.may_write, self.on_written = stage_folder, may_write, on_written
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.waited_s = 0.0              # how long training has waited, in all

    def write(
        self,
        progress: Progress,
        *,
        weights: dict[str, torch.Tensor],
        optimizer_state: dict[str, Any],
        more: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Copies the tensors and begins to write; the one before is waited for. Raises what that one came to.

        more: further tensors by file name, which nobody changes: they are not copied.
        """
        began = time.monotonic()
        self.join()
        copies = on_cpu(weights), on_cpu(optimizer_state), more
        self.thread = threading.Thread(target=self.run, args=(progress, *copies), name="checkpoint", daemon=True)
        self.thread.start()
        self.waited_s += time.monotonic() - began

    def run(
        self,
        progress: Progress,
        weights: dict[str, torch.Tensor],
        optimizer_state: dict[str, Any],
        more: Mapping[str, Mapping[str, torch.Tensor]] | None,
    ) -> None:
        """The thread's work; an error is kept for whoever asks next."""
        began = time.monotonic()
        try:
            write_checkpoint(
                self.stage_folder,
                progress,
                weights=weights,
                optimizer_state=optimizer_state,
                more=more,
                may_write=self.may_write,
            )
            if self.on_written is not None:
                self.on_written(progress.iteration, time.monotonic() - began)
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        """Returns when all is on disk. Raises what writing came to: StoreError, or what may_write raised."""
        began = time.monotonic()
        self.join()
        self.waited_s += time.monotonic() - began

    def join(self) -> None:
        """Waits for the thread."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.raise_error()

    def raise_error(self) -> None:
        """Raises what the last writing came to, once, if it has ended badly; waits for nothing."""
        error, self.error = self.error, None
        if error is not None:
            raise error


def on_cpu(value: Any) -> Any:
    """A copy of tensors in nested dicts and lists, on the CPU, in their own memory format."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(one) for key, one in value.items()}
    if isinstance(value, list):
        return [on_cpu(one) for one in value]
    return value
