"""A stage's training loop, the same in every worker: Ray Train runs `train_stage` in each of its processes.

Whatever the number of workers, iteration t trains on the same pictures, seen the same way, with the same dropout masks;
what the workers make together is the gradient of the global batch's mean loss. Rank 0 alone writes.
"""

import json
import logging
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import ray.train.torch
import ray.util
import torch
from torch import Tensor

from pipelines.cache import cache_folder, open_cache
from pipelines.loader import Batch, TrainLoader
from pipelines.manifest import Manifest, read_manifest
from pipelines.plan import batches_per_epoch
from training.averaging import WeightAverage
from training.checkpoint import (
    AVERAGE,
    SUMS,
    Checkpoint,
    CheckpointWriter,
    Progress,
    checkpoint_folder,
    newest_checkpoint,
    on_cpu,
    read_checkpoint,
    set_aside,
)
from training.history import HistoryWriter, cut_history
from training.learner import Learner, set_up_torch
from training.learning_rate import learning_rate, steers
from training.losses import factors_by_class
from training.optimise import Plateau, ended_by
from training.orders import LAST_CHECKPOINTS_S, Orders
from training.picture_log import PictureLog
from training.result import result_of
from training.stage_job import StageJob, Superseded, prove_same_world, record_problem, view_rule
from training.stage_log import stage_log, stage_logger, versions, worker_hears, worker_name
from training.store import Store, fence_holds
from training.system_metrics import Sampler, machine_to_sample
from training.team import Team
from training.validation import Validation
from vggcore.errors import StoreError, TrainingError, VggrowError
from vggcore.weights import load_weights
from vggcore.whole_file import append_text, write_json

logger = logging.getLogger(__name__)

MOST_NAMED = 3                     # pictures that a message names


def train_stage(config: dict[str, Any]) -> VggrowError | None:
    """Trains one stage to its end, or to a stop request, from the newest checkpoint on.

    config: {"job": StageJob}. Outcomes are files in the stage's folder: result.json (finished), error.json (a problem
    for the user), neither (stopped, or killed). The problem is returned too: the store may be what takes no writes. Any
    other exception is ours and goes to Ray.
    """
    job: StageJob = config["job"]
    device = ray.train.torch.get_device() if job.device == "cuda" else torch.device("cpu")
    set_up_torch(job)
    team = Team(device)
    with stage_log(Store(job.store).stage(job.key), job.key, worker_name(team.rank), worker_hears) as log:
        log.info("%s (%s): worker %d of %d begins; %s", job.stage.name, job.key, team.rank, team.world_size, versions())
        return train_with(job, team, log)


def train_with(job: StageJob, team: Team, log: logging.Logger) -> VggrowError | None:
    """What train_stage does, with this worker's place among the others and its log."""
    problem: VggrowError | None = None
    try:
        manifest = read_manifest(Store(job.store).data(job.fingerprint)).in_order(job.classes)
        prove_same_world(job, manifest)
    except VggrowError as error:
        problem = error
    problem = team.any_problem(problem)
    sampler: Sampler | None = None
    try:
        if problem is None:
            training = StageTraining(job, manifest, team)
            sampler = start_sampler(training)
            problem = training.problem or training.run()
    except Superseded:
        logger.warning("stage %s: another command has taken over; this worker stops", job.stage.name)
        return None
    finally:
        if sampler is not None:
            sampler.close()
    if problem is not None:
        log.error("ends: %s", problem)
        if team.rank == 0:
            record_problem(job, problem)
    return problem


def start_sampler(training: "StageTraining") -> Sampler | None:
    """Begins to sample what this machine does, in one worker of each machine; all workers call it together."""
    job = training.job
    machine = machine_to_sample(job, training.team) if job.sample_s else None
    if machine is None:
        return None
    gpus = job.device == "cuda"
    sampler = Sampler(training.folder, machine, every_s=job.sample_s, gpus=gpus, may_write=training.may_write)
    sampler.start()
    return sampler


class StageTraining:
    """One worker's share of a stage: net, optimiser, loaders, and where the stage stands."""

    def __init__(self, job: StageJob, manifest: Manifest, team: Team) -> None:
        """Builds all and loads the newest checkpoint, or the first weights; nothing is written yet."""
        self.job, self.stage, self.team = job, job.stage, team
        self.store = Store(job.store)
        self.folder = self.store.stage(job.key)
        self.log = stage_logger(job.key, worker_name(team.rank))
        self.train = manifest.split("train")
        stage = job.stage
        self.trouble: VggrowError | None = None    # what writing has come to, on rank 0
        self.passed_over: list[str] = []           # broken checkpoints that rank 0 found newer than the one it starts from
        self.problem: VggrowError | None = None    # what keeps this stage from going on, the same in every worker
        checkpoint = self.agreed_checkpoint()
        factors = factors_by_class(stage, manifest.classes, self.train.labels)
        self.learner = Learner(job, len(manifest.classes), team, checkpoint, factors)
        if checkpoint is None:
            self.progress = Progress.start(Plateau.start(stage), world_size=team.world_size, threads=job.threads)
        else:
            self.progress = replace(checkpoint.progress, world_size=team.world_size, threads=job.threads)
        self.average = WeightAverage()             # of rank 0, which alone writes
        if checkpoint is not None and team.rank == 0:
            self.average = checkpoint.average()
        cache = open_cache(cache_folder(job.store, job.fingerprint)) if job.cached else None
        self.loader = TrainLoader(
            self.train,
            job.colour,
            view_rule(stage),
            standardise=stage.standardise,
            rank=team.rank,
            world_size=team.world_size,
            device=str(team.device),
            threads=job.threads,
            cache=cache,
        )
        self.validation = Validation(job, manifest, team, cache)
        self.orders = Orders(job, team)
        self.picture_log: PictureLog | None = None
        self.history = HistoryWriter(self.folder / "history.jsonl", self.may_write)
        self.writer = CheckpointWriter(self.folder, self.may_write, self.say_written)

    def agreed_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint as rank 0 sees it, so that all workers start from one; None also for a problem."""
        newest, problem = None, None
        if self.team.rank == 0:
            try:
                newest = newest_checkpoint(self.folder, self.passed_over)
            except StoreError as error:
                problem = error
        self.problem = self.team.any_problem(problem)
        (iteration,) = self.team.total(float(newest.progress.iteration if newest else -1) if self.team.rank == 0 else 0.0)
        return None if iteration < 0 else read_checkpoint(self.folder, int(iteration))

    def may_write(self) -> None:
        """Superseded when another command has taken this stage's lock."""
        if not fence_holds(self.store, self.job.lock, self.job.fence):
            raise Superseded

    def run(self) -> VggrowError | None:
        """Trains until the rule ends the stage, a stop is asked for, or a problem appears, which is returned."""
        problem = self.team.any_problem(self.clear_the_way(self.team.everyones(place())))
        problem = problem or self.team.any_problem(self.open_picture_log())
        if problem is not None:
            return problem
        self.say_begin()
        try:
            while not self.finished:
                outcome = self.train_epoch()
                if isinstance(outcome, VggrowError):
                    self.settle()
                    return outcome
                if outcome == "stopped" or not self.end_epoch():
                    self.log.info("told to stop; stops at iteration %d", self.progress.iteration)
                    return self.settle()
            return self.finish()
        finally:
            self.loader.close()
            self.validation.close()
            if self.picture_log is not None:
                self.picture_log.close()

    def clear_the_way(self, places: list[str]) -> VggrowError | None:
        """Rank 0 cuts from the history what will come again, and records this start; places: of all workers."""
        if self.team.rank != 0:
            return None
        self.may_write()
        try:
            set_aside(self.folder, above=self.progress.iteration)
            cut_history(self.history.path, iteration=self.progress.iteration, epochs=self.progress.epoch)
            self.record_start(places)
        except StoreError as error:
            return error
        return None

    def record_start(self, places: list[str]) -> None:
        """Adds a line to starts.jsonl: when, where and from which iteration on these workers train."""
        row = {
            "fence": self.job.fence,
            "iteration": self.progress.iteration,
            "world_size": self.team.world_size,
            "threads": self.job.threads,
            "device": self.job.device,
            "host": socket.gethostname(),
            "places": places,
            "passed_over": self.passed_over,
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        append_text(self.folder / "starts.jsonl", json.dumps(row) + "\n")

    def say_begin(self) -> None:
        """Into the log: from where on this worker trains, and with what."""
        job, stage, progress = self.job, self.stage, self.progress
        parent = f"weights from {stage.init_from}" if job.parent else "random weights"
        device = torch.cuda.get_device_name() if job.device == "cuda" else "cpu"
        self.log.info(
            "trains net %s, S=%s, from iteration %d (epoch %d of at most %d), %s, on %s, %d threads, %s, learning rate %g",
            stage.net,
            "-".join(map(str, sorted(set(stage.scale)))),
            progress.iteration,
            progress.epoch + 1,
            stage.max_epochs,
            parent,
            device,
            job.threads,
            stage.precision,
            self.rate(progress.iteration),
        )

    def say_written(self, iteration: int, seconds: float) -> None:
        """Into the log: a checkpoint is on disk."""
        self.log.info("checkpoint of iteration %d written in %.2f s", iteration, seconds)

    def open_picture_log(self) -> VggrowError | None:
        """Opens this worker's log of pictures, if one is wanted; all number this start alike. Gives what kept it from that."""
        if not self.job.log_pictures:
            return None
        starts = self.folder / "starts.jsonl"
        lines = len(starts.read_bytes().splitlines()) if self.team.rank == 0 and starts.exists() else 0
        (start,) = self.team.total(float(lines))
        try:
            self.picture_log = PictureLog(self.folder, self.team.rank, int(start))
        except StoreError as error:
            return error
        return None

    @property
    def finished(self) -> bool:
        """Whether the learning-rate rule or max_epochs has ended the stage."""
        return self.ended_by is not None

    @property
    def ended_by(self) -> str | None:
        """What has ended the stage, as result.json says it."""
        return ended_by(self.progress.plateau, epochs=self.progress.epoch, max_epochs=self.stage.max_epochs)

    def rate(self, iteration: int) -> float:
        """The classifier's learning rate in the update that follows `iteration` others."""
        batches = batches_per_epoch(len(self.train.paths), self.stage.global_batch)
        return learning_rate(self.stage, self.progress.plateau, iteration, batches)

    def train_epoch(self) -> VggrowError | str:
        """The rest of the current epoch: "done", "stopped" by request, or the problem that ended it."""
        steps = self.steps()
        while True:
            try:
                next(steps)
            except StopIteration as end:
                outcome: VggrowError | str = end.value
                return outcome

    def steps(self) -> Generator[int, None, VggrowError | str]:
        """The rest of the current epoch, an iteration a step: yields pictures trained, returns what train_epoch gives."""
        progress = self.progress
        batches = batches_per_epoch(len(self.train.paths), self.stage.global_batch)
        self.learner.model.train()
        coming = self.loader.epoch(progress.epoch, progress.batch)
        written_at, seconds_before, began = time.monotonic(), progress.seconds, time.monotonic()
        written_iteration = progress.iteration
        batch, problem = next_batch(coming) if progress.batch < batches else (None, None)
        for index in range(progress.batch, batches):
            problem = problem or self.writing_problem()
            losses = self.learner.add_gradient(batch, self.progress.iteration)
            goes_on = problem is None and index + 1 < batches
            following = next_batch(coming) if goes_on else (None, None)               # planned while a GPU is at work
            loss_sum = float(losses)                                                  # waits for the GPU
            total_loss, stop, ask, problems = self.team.total(loss_sum, *self.orders.flags(), float(problem is not None))
            if problems:
                return self.team.any_problem(problem) or TrainingError("a worker failed without a word")
            iteration = self.progress.iteration + 1
            if not np.isfinite(total_loss):
                return self.team.any_problem(self.no_number(batch, iteration, total_loss)) or TrainingError("no number")
            self.learner.update(self.rate(iteration - 1))
            self.progress = replace(
                self.progress,
                batch=index + 1,
                iteration=iteration,
                loss_sum=self.progress.loss_sum + total_loss,
                seconds=seconds_before + time.monotonic() - began,
            )
            if self.team.rank == 0:
                size = min(self.stage.global_batch, len(self.train.paths) - index * self.stage.global_batch)
                self.record({"iteration": iteration, "train_loss": total_loss / size})
            if self.picture_log is not None and batch is not None:
                self.log_pictures(self.picture_log, batch)
            if stop:
                return "stopped"
            if self.orders.heed(ask):
                self.say_leaving()
            yield batch.size if batch is not None else 0
            every = self.stage.checkpoint_every
            waited = time.monotonic() - written_at
            due = (
                iteration - written_iteration >= every.iterations
                if every.iterations is not None
                else waited >= (every.seconds or 0)
            )
            due = due or (self.orders.leaving and waited > LAST_CHECKPOINTS_S)
            if due and index + 1 < batches:   # the epoch's end writes one anyway
                self.checkpoint()
                written_at, written_iteration = time.monotonic(), iteration
            batch, problem = following
        return "done"

    def no_number(self, batch: Batch | None, iteration: int, total_loss: float) -> TrainingError:
        """What to say of a loss that is not a number: the iteration, and the pictures of this worker that have such a loss.

        The update that it would make is not made: the weights are those of the iteration before.
        """
        names: list[str] = []
        if batch is not None and len(batch.labels):
            losses = self.learner.each_loss(batch, iteration - 1)
            bad = (~losses.isfinite()).nonzero().flatten().tolist()
            pictures = [part[bad] for part in (batch.pictures, batch.partners) if part is not None]
            names = [str(path) for path in self.train.paths[np.unique(np.concatenate(pictures))]]
        which = f" for {len(names)} pictures, {', '.join(map(repr, names[:MOST_NAMED]))}" if names else ""
        return TrainingError(
            f"stage {self.stage.name!r}: the loss at iteration {iteration} (epoch {self.progress.epoch + 1}) is"
            f" {total_loss}{which}; the weights of iteration {iteration - 1} are kept: lower [train] learning_rate, now"
            f" {self.rate(iteration - 1):g}, or look at these pictures"
        )

    def say_leaving(self) -> None:
        """A node of ours will be taken away: a checkpoint now, and soon again until that happens."""
        logger.warning(
            "stage %s: Ray says that a node of this stage is about to be taken away; a checkpoint at iteration %d, and every"
            " %.0f s from now on",
            self.stage.name,
            self.progress.iteration,
            LAST_CHECKPOINTS_S,
        )
        if self.team.rank == 0:
            row = {"fence": self.job.fence, "iteration": self.progress.iteration, "every_s": LAST_CHECKPOINTS_S}
            try:
                append_text(self.folder / "preemptions.jsonl", json.dumps(row) + "\n")
            except StoreError as error:
                self.trouble = self.trouble or error
        self.checkpoint()

    def log_pictures(self, log: PictureLog, batch: Batch) -> None:
        """Adds this worker's pictures of the iteration that was just trained."""
        try:
            log.add(self.progress.iteration, batch.pictures)
        except StoreError as error:
            self.trouble = self.trouble or error

    def heed_while_validating(self) -> bool:
        """Whether to stop, agreed by all workers; a notice that a node will go leaves a checkpoint."""
        stop, ask = self.team.total(*self.orders.flags())
        if self.orders.heed(ask):
            self.say_leaving()
        return stop > 0

    def end_epoch(self) -> bool:
        """Validates, moves the learning-rate rule on, records the epoch and writes a checkpoint; False: told to stop."""
        began = time.monotonic()
        measured = self.validation.measure(self.learner, self.heed_while_validating)
        if measured is None:
            return False
        val_top1, val_loss = measured
        progress = self.progress
        val_seconds = time.monotonic() - began
        seconds = progress.seconds + val_seconds
        row = {
            "epoch": progress.epoch + 1,
            "iteration": progress.iteration,
            "train_loss": progress.loss_sum / len(self.train.paths),
            "val_loss": val_loss,
            "val_top1_accuracy": val_top1,
            "learning_rate": self.rate(progress.iteration - 1),      # of the epoch's last update
            "seconds": round(seconds, 3),
            "val_seconds": round(val_seconds, 3),
            "checkpoint_seconds": round(self.writer.waited_s, 3),
        }
        plateau = progress.plateau.after(progress.epoch, val_top1, steers=steers(self.stage, progress.epoch))
        self.progress = replace(
            progress,
            epoch=progress.epoch + 1,
            batch=0,
            loss_sum=0.0,
            seconds=seconds,
            plateau=plateau,
            val_top1=val_top1,
            val_loss=val_loss,
        )
        if plateau.best_epoch == progress.epoch:
            self.progress = replace(self.progress, best_iteration=progress.iteration, best_val_loss=val_loss)
        if self.stage.average and self.team.rank == 0:
            self.average.add(self.learner.net.state_dict(), self.progress.epoch, self.stage, plateau)
        if self.team.rank == 0:
            self.record(row)
            self.log.info("epoch %d of at most %d: %s", row["epoch"], self.stage.max_epochs, told(row))
        self.checkpoint()
        return True

    def record(self, row: dict[str, Any]) -> None:
        """Adds a row to the history; a disk that takes no more is a problem that all workers hear of at the next iteration."""
        try:
            self.history.add(row)
        except StoreError as error:
            self.trouble = self.trouble or error

    def checkpoint(self) -> None:
        """Rank 0 begins to write where the stage stands; all go on meanwhile."""
        if self.team.rank != 0:
            return
        try:
            self.history.flush()
            self.may_write()
            self.writer.write(
                self.progress,
                weights=self.learner.net.state_dict(),
                optimizer_state=self.learner.optimizer.state_dict(),
                more=self.average_files(),
            )
        except StoreError as error:
            self.trouble = self.trouble or error

    def average_files(self) -> dict[str, Mapping[str, Tensor]]:
        """The sums of weights and their mean, as far as there are any, by the names that they have in a checkpoint."""
        sums, mean = self.average.tensors(), self.average.mean
        return {SUMS: sums} if sums else {AVERAGE: mean} if mean is not None else {}

    def writing_problem(self) -> VggrowError | None:
        """What writing history or checkpoints has come to, so far."""
        try:
            self.writer.raise_error()
        except StoreError as error:
            self.trouble = self.trouble or error
        return self.trouble

    def settle(self) -> VggrowError | None:
        """A checkpoint of where the stage stands, on disk when this returns; or rank 0's problem with it."""
        if self.trouble is None:
            self.checkpoint()
        try:
            self.writer.wait()
        except StoreError as error:
            self.trouble = self.trouble or error
        return self.trouble

    def finish(self) -> VggrowError | None:
        """Leaves the last checkpoint, what the averaged weights reach on val, and result.json; or gives the problem."""
        problem = self.settle()
        if not self.stage.average:
            return problem or self.write_result(None)
        problem = self.team.any_problem(problem)
        if problem is not None:
            return problem
        measured = self.measure_average()
        if measured is None:
            self.log.info("told to stop; stops before the averaged weights were validated")
            return None
        return measured if isinstance(measured, VggrowError) else self.write_result(measured)

    def measure_average(self) -> tuple[float, float] | VggrowError | None:
        """Top-1 accuracy and mean loss of the averaged weights on val, or a problem; None: told to stop."""
        problem: VggrowError | None = None
        average: dict[str, Tensor] = {}
        try:
            average = load_weights(checkpoint_folder(self.folder, self.progress.iteration) / AVERAGE)
        except StoreError as error:
            problem = error
        problem = self.team.any_problem(problem)
        if problem is not None:
            return problem
        net = self.learner.net
        last = on_cpu(net.state_dict())
        net.load_state_dict(average)
        try:
            return self.validation.measure(self.learner, lambda: self.team.total(*self.orders.flags())[0] > 0)
        finally:
            net.load_state_dict(last)

    def write_result(self, average_val: tuple[float, float] | None) -> VggrowError | None:
        """Rank 0 writes result.json, last of all: from now on the stage is done. Gives the problem, if there is one."""
        if self.team.rank != 0:
            return None
        self.may_write()
        device = torch.cuda.get_device_name() if self.job.device == "cuda" else "cpu"
        try:
            result = result_of(
                self.folder, self.progress, ended_by=self.ended_by, average_val=average_val, device=device
            )
            write_json(self.folder / "result.json", result)
        except StoreError as error:
            return error
        self.log.info("finished by iteration %d, epoch %d", self.progress.iteration, self.progress.epoch)
        return None


def told(row: dict[str, Any]) -> str:
    """An epoch's figures in words, for the log."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in row.items() if name != "epoch")


def place() -> str:
    """Where this worker runs: its node's address in the cluster, or this machine's name where there is none."""
    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else socket.gethostname()


def next_batch(coming: Iterator[Batch]) -> tuple[Batch | None, VggrowError | None]:
    """The next batch, or the problem that kept it from coming."""
    try:
        return next(coming), None
    except VggrowError as error:
        return None, error


