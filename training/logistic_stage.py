"""A stage with fit = "logistic": features of its pictures, the layer fitted on them, and a result as any other stage leaves it.

It runs in a thread of the driver; features are computed by Ray tasks where there are several workers. What it leaves:
history.jsonl with a line a penalty, a checkpoint with all weights, those of the convs as they were given, and, last of all,
result.json. A stage that was stopped or killed finds its features in the store, and is fitted from the start.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.manifest import Manifest, Pictures
from training.checkpoint import WEIGHTS, checkpoint_folder, file_digest
from training.features.compute import Workers, features_of
from training.features.source import stage_source, stage_spec
from training.features.suspects import write_suspects
from training.history import HistoryWriter
from training.stage_job import StageJob, Superseded, record_problem
from training.stage_log import CONDUCTOR, FIT, stage_logger
from training.store import Store, fence_holds, stop_requested
from training.where import Where
from training.worker_count import most
from vggcore.errors import StoreError, VggrowError
from vggcore.logistic import GRID, Layer, Rows, Solution, class_factors, fit_layer
from vggcore.nets import FC_NAMES
from vggcore.recipe import BEST_ON_VAL
from vggcore.weights import save_weights
from vggcore.whole_file import append_text, refusal, sync_folder, write_json, write_text

LOOK_S = 0.1                # how often the work looks whether it is to stop
LAYER = FC_NAMES["linear"][0]

Progress = Callable[[str, int, int], None]      # of a split: pictures computed, pictures to compute


class Stopped(Exception):
    """The stage was asked to stop; what was computed is in the store."""


class LogisticThread(threading.Thread):
    """One logistic stage; what ended it badly is kept. It has what StageRun asks of Ray Train's FitThread."""

    lost_its_controller = False      # there is none

    def __init__(self, job: StageJob, manifest: Manifest, where: Where) -> None:
        """Starts nothing yet."""
        super().__init__(name=FIT + job.stage.name, daemon=True)
        self.job, self.manifest, self.where = job, manifest, where
        self.error: BaseException | None = None
        self.features: dict[str, tuple[int, int]] = {}      # by split: pictures computed, pictures to compute

    def run(self) -> None:
        """Fits the stage to its end, or to a stop request."""
        try:
            LogisticStage(self.job, self.manifest, self.where, self.show).run()
        except Stopped:
            stage_logger(self.job.key, CONDUCTOR).info("stopped on request: nothing is lost, features are kept")
        except Superseded:
            stage_logger(self.job.key, CONDUCTOR).warning("another command has taken over; this one stops")
        except VggrowError as error:
            record_problem(self.job, error)
            self.error = error
        except BaseException as error:
            self.error = error

    def show(self, split: str, done: int, total: int) -> None:
        """How far the features are."""
        self.features[split] = (done, total)

    def problem(self) -> BaseException | None:
        """What ended it badly."""
        return self.error


class LogisticStage:
    """The work of one logistic stage."""

    def __init__(self, job: StageJob, manifest: Manifest, where: Where, progress: Progress = lambda *_: None) -> None:
        """progress: is told how far the features are."""
        assert job.parent is not None, 'recipe_checks refuses fit = "logistic" without init_from'
        self.job, self.stage, self.manifest, self.where, self.progress = job, job.stage, manifest, where, progress
        self.store = Store(job.store)
        self.folder = self.store.stage(job.key)
        self.log = stage_logger(job.key, CONDUCTOR)
        self.source = stage_source(job.stage, job.parent.weights, job.parent.tensors, job.colour)
        self.spec = stage_spec(self.source, job.stage)
        self.began, self.looked_at, self.computed = time.monotonic(), 0.0, 0
        self.splits: list[tuple[Pictures, NDArray[np.float32]]] = []      # train and val with their features

    def run(self) -> None:
        """Features, fit, checkpoint, result. Raises VggrowError, Stopped, or Superseded when another command took over."""
        self.record_start()
        train, val = self.rows("train"), self.rows("val")
        self.log.info("features: %d values a picture, %d pictures computed", self.spec.values, self.computed)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)       # BLAS sums in another order with another number
        try:
            layer, grid = self.fit(train, val)
            self.write_suspects()
        finally:
            torch.set_num_threads(threads)
        file = self.write_checkpoint(layer)
        self.write_result(layer, grid, file)

    def record_start(self) -> None:
        """Adds a line to starts.jsonl and begins the history anew."""
        self.may_write()
        row = {
            "fence": self.job.fence,
            "iteration": 0,
            "world_size": most(self.where.workers),
            "threads": self.job.threads,
            "device": self.job.device,
            "host": socket.gethostname(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        append_text(self.folder / "starts.jsonl", json.dumps(row) + "\n")
        write_text(self.folder / "history.jsonl", "")

    def rows(self, split: str) -> Rows:
        """A split's features and labels in the order of the pictures' contents; what the store does not have is computed."""
        pictures = self.manifest.split(split)
        order = np.lexsort((pictures.paths.astype(str), pictures.contents.astype(str)))
        found = features_of(
            pictures,
            self.spec,
            self.source,
            self.store,
            Workers.of(self.where),
            progress=lambda done, total: self.progress(split, done, total),
            check=self.check,
            say=self.log.info,
        )
        self.computed += found.computed
        self.splits.append((pictures, found.values))
        return Rows(torch.from_numpy(found.values[order]), torch.from_numpy(pictures.labels[order]))

    def fit(self, train: Rows, val: Rows) -> tuple[Layer, list[dict[str, Any]]]:
        """The layer, and the rows of the history: one a penalty."""
        history = HistoryWriter(self.folder / "history.jsonl", self.may_write)
        grid: list[dict[str, Any]] = []

        def record(solution: Solution) -> None:
            grid.append(grid_row(solution, len(grid) + 1, time.monotonic() - self.began))
            history.add(grid[-1])
            self.log.info("%s", ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in grid[-1].items()))

        layer = fit_layer(
            train,
            val,
            classes=len(self.manifest.classes),
            factors=class_factors(self.stage.class_weights, self.manifest.classes, train.labels),
            on_solution=record,
            check=self.check,
        )
        history.flush()
        return layer, grid

    def write_suspects(self) -> None:
        """Writes the list of pictures whose labels their neighbours contradict."""
        self.may_write()
        write_suspects(self.folder, self.splits, self.manifest.classes, self.check)

    def write_checkpoint(self, layer: Layer) -> str:
        """Writes all weights, whole or not at all; their file within the stage's folder. Raises StoreError."""
        weights: dict[str, Tensor] = {
            **self.source.used(self.spec.groups),
            f"{LAYER}.weight": layer.weight,
            f"{LAYER}.bias": layer.bias,
        }
        folder = checkpoint_folder(self.folder, len(GRID))
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            for leftover in folder.parent.glob(".iteration-*"):
                shutil.rmtree(leftover)
            save_weights(weights, part / WEIGHTS)
            self.may_write()
            shutil.rmtree(folder, ignore_errors=True)      # of a start that was killed before its result
            part.rename(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise StoreError(refusal(folder, error)) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return str((folder / WEIGHTS).relative_to(self.folder))

    def write_result(self, layer: Layer, grid: list[dict[str, Any]], file: str) -> None:
        """Writes result.json: from now on the stage is done."""
        chosen = layer.chosen
        weights = {
            "file": file,
            "digest": file_digest(self.folder / file),
            "val_top1_accuracy": chosen.val_top1,
            "val_loss": chosen.val_loss,
        }
        checkpoint = checkpoint_folder(self.folder, len(GRID)).name
        self.may_write()
        write_json(
            self.folder / "result.json",
            {
                "checkpoint": checkpoint,
                "best_checkpoint": checkpoint,
                "weights": {"last": weights, BEST_ON_VAL: weights},
                "epochs": 0,
                "iterations": sum(int(row["steps"]) for row in grid),
                "val_top1_accuracy": chosen.val_top1,
                "best_val_top1_accuracy": chosen.val_top1,
                "val_loss": chosen.val_loss,
                "ended_by": "converged",
                "fit": "logistic",
                "C": chosen.c,
                "gradient_norm": chosen.gradient_norm,
                "features": {"key": self.spec.key, "values": self.spec.values, "constant": layer.dropped},
                "seconds": round(time.monotonic() - self.began, 3),
                "world_size": most(self.where.workers),
                "threads": self.job.threads,
                "device": torch.cuda.get_device_name() if self.job.device == "cuda" else "cpu",
            },
        )
        self.log.info("finished: C = %g", chosen.c)

    def check(self) -> None:
        """Stopped where that was asked for."""
        if time.monotonic() - self.looked_at > LOOK_S:
            self.looked_at = time.monotonic()
            if stop_requested(self.store, self.job.lock, self.job.fence):
                raise Stopped

    def may_write(self) -> None:
        """Superseded when another command has taken this stage's lock."""
        if not fence_holds(self.store, self.job.lock, self.job.fence):
            raise Superseded


def grid_row(solution: Solution, number: int, seconds: float) -> dict[str, Any]:
    """A line of the history: one penalty's fit; number: its place in the grid, from 1."""
    return {
        "iteration": number,
        "C": solution.c,
        "train_loss": solution.train_loss,
        "val_loss": solution.val_loss,
        "val_top1_accuracy": solution.val_top1,
        "steps": solution.iterations,
        "gradient_norm": solution.gradient_norm,
        "seconds": round(seconds, 3),
    }
