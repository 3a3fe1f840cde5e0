"""A stage's training loop, the same in every worker: Ray Train runs `train_stage` in each of its processes.

Whatever the number of workers, iteration t trains on the same pictures, seen the same way, with the same dropout masks;
what the workers make together is the gradient of the global batch's mean loss. Rank 0 alone writes.
"""

import hashlib
import json
import logging
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from pipelines.cache import cache_folder, open_cache
from pipelines.loader import Batch, TestLoader, TrainLoader
from pipelines.manifest import Manifest, read_manifest
from pipelines.plan import ViewRule, batches_per_epoch, permutation, share
from training.checkpoint import Checkpoint, CheckpointWriter, Progress, newest_checkpoint, read_checkpoint, set_aside
from training.history import HistoryWriter, cut_history
from training.optimise import Plateau, ended_by, make_optimizer, set_learning_rate
from training.store import Store, fence_holds, stop_requested
from vggcore.errors import DatasetError, StoreError, TrainingError, VggrowError
from vggcore.initialise import copy_from_parent, initialise_net
from vggcore.nets import Vgg, build_net
from vggcore.recipe import NetName
from vggcore.schedule import Stage
from vggcore.weights import load_weights
from vggcore.whole_file import write_json

logger = logging.getLogger(__name__)

MOST_NAMED = 3                     # pictures that a message names
VAL_BATCH = 64                     # pictures a forward pass on val
VAL_CACHE_BYTES = 512 * 2**20      # val views stay in memory below this, in each worker


@dataclass(frozen=True)
class StageJob:
    """All that a worker needs to know; it travels to the workers by pickle."""

    stage: Stage
    key: str
    store: Path
    fingerprint: str
    parent: tuple[NetName, Path] | None    # the parent's net and its weights; None: random weights
    lock: str                          # name of the lock under which this stage is trained
    fence: int                         # the lock's number, see store.fence_holds
    nonce: str                         # what every worker must read in the store
    device: str                        # "cpu" or "cuda"
    threads: int                       # CPU threads a worker, for torch and for DALI each
    cached: bool = True                # read the decoded cache where the store has it


class Superseded(Exception):
    """Another command has taken the stage over; this worker writes nothing any more."""


class Team:
    """The workers of a stage: this one's rank, how many there are, and what they agree on."""

    def __init__(self, device: torch.device) -> None:
        """Reads rank and world size from torch.distributed; one worker alone needs no process group."""
        alone = not torch.distributed.is_initialized()
        self.rank = 0 if alone else torch.distributed.get_rank()
        self.world_size = 1 if alone else torch.distributed.get_world_size()
        self.device = device

    def total(self, *values: float) -> list[float]:
        """The sums over all workers, in float64; every worker gets the same bits."""
        if self.world_size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.tolist()

    def any_problem(self, problem: VggrowError | None) -> VggrowError | None:
        """The first worker's problem, the same in every worker; None when all are well."""
        if self.world_size == 1:
            return problem
        found: list[VggrowError | None] = [None] * self.world_size
        torch.distributed.all_gather_object(found, problem)
        return next((one for one in found if one is not None), None)


def train_stage(config: dict[str, Any]) -> None:
    """Trains one stage to its end, or to a stop request, from the newest checkpoint on.

    config: {"job": StageJob}. Outcomes are files in the stage's folder: result.json (finished), error.json (a problem
    for the user), neither (stopped, or killed). Any other exception is ours and goes to Ray.
    """
    job: StageJob = config["job"]
    device = ray.train.torch.get_device() if job.device == "cuda" else torch.device("cpu")
    set_up_torch(job)
    team = Team(device)
    problem: VggrowError | None = None
    try:
        manifest = read_manifest(Store(job.store).data(job.fingerprint))
        prove_same_world(job, manifest)
    except VggrowError as error:
        problem = error
    problem = team.any_problem(problem)
    try:
        if problem is None:
            training = StageTraining(job, manifest, team)
            problem = training.problem or training.run()
    except Superseded:
        logger.warning("stage %s: another command has taken over; this worker stops", job.stage.name)
        return
    if problem is not None and team.rank == 0:
        record_problem(job, problem)


def set_up_torch(job: StageJob) -> None:
    """Threads and the numeric choices that the stage's key stands for."""
    torch.set_num_threads(job.threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    tf32 = job.stage.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def prove_same_world(job: StageJob, manifest: Manifest) -> None:
    """StoreError or DatasetError unless this worker reads the driver's store and the scan's pictures."""
    store = Store(job.store)
    nonce = store.locks / f"{job.lock}.nonce"
    if not nonce.exists() or nonce.read_text() != job.nonce:
        raise StoreError(
            f"--store {job.store}: a worker does not see the store that the driver sees; name a folder that every node"
            " mounts at the same path"
        )
    pictures = manifest.split("train")
    for index in sorted({0, len(pictures.paths) // 2, len(pictures.paths) - 1}):
        path = pictures.root / pictures.paths[index]
        found = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.exists() else "no file"
        if found != pictures.contents[index]:
            raise DatasetError(
                f"{path}: a worker finds other content than the scan did ({found}, scanned {pictures.contents[index]});"
                " every node must see the same pictures; start again to scan again"
            )


def record_problem(job: StageJob, problem: VggrowError) -> None:
    """Leaves the problem for the conductor, which raises it again."""
    found = {"fence": job.fence, "type": type(problem).__name__, "message": str(problem)}
    write_json(Store(job.store).stage(job.key) / "error.json", found)


class StageTraining:
    """One worker's share of a stage: net, optimiser, loaders, and where the stage stands."""

    def __init__(self, job: StageJob, manifest: Manifest, team: Team) -> None:
        """Builds all and loads the newest checkpoint, or the first weights; nothing is written yet."""
        self.job, self.stage, self.team = job, job.stage, team
        self.store = Store(job.store)
        self.folder = self.store.stage(job.key)
        self.train, self.val = manifest.split("train"), manifest.split("val")
        stage = job.stage
        self.net = build_net(
            stage.net,
            classes=len(manifest.classes),
            head=stage.head,
            width=stage.width,
            crop=stage.crop,
            dropout=stage.dropout,
        )
        self.trouble: VggrowError | None = None    # what writing has come to, on rank 0
        self.passed_over: list[str] = []           # broken checkpoints that rank 0 found newer than the one it starts from
        self.problem: VggrowError | None = None    # what keeps this stage from going on, the same in every worker
        checkpoint = self.agreed_checkpoint()
        if checkpoint is None:
            first_weights(self.net, job)
        else:
            self.net.load_state_dict(checkpoint.weights())
        self.net.to(team.device)
        self.net.to(memory_format=torch.channels_last if stage.channels_last else torch.contiguous_format)
        self.optimizer = make_optimizer(self.net.parameters(), stage)
        start = Progress.start(Plateau.start(stage), world_size=team.world_size, threads=job.threads)
        self.progress = start
        if checkpoint is not None:
            self.optimizer.load_state_dict(checkpoint.optimizer_state())
            self.progress = replace(checkpoint.progress, world_size=team.world_size, threads=job.threads)
        self.model = self.parallel_model()
        device = str(team.device)
        cache = open_cache(cache_folder(job.store, job.fingerprint)) if job.cached else None
        self.loader = TrainLoader(
            self.train,
            manifest.colour,
            view_rule(stage),
            standardise=stage.standardise,
            rank=team.rank,
            world_size=team.world_size,
            device=device,
            threads=job.threads,
            cache=cache,
        )
        self.test_loader = TestLoader(
            self.val, manifest.colour, standardise=stage.standardise, device=device, threads=job.threads, cache=cache
        )
        self.val_views: list[tuple[Tensor, Tensor]] | None = None
        self.history = HistoryWriter(self.folder / "history.jsonl", self.may_write)
        self.writer = CheckpointWriter(self.folder, self.may_write)

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

    def parallel_model(self) -> torch.nn.Module:
        """The net as it is called in training: compiled if asked, gradients averaged over the workers."""
        model = cast(torch.nn.Module, torch.compile(self.net)) if self.stage.compile else self.net
        if self.team.world_size == 1:
            return model
        devices = [self.team.device] if self.team.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        self.warm_up(model)
        return model

    def warm_up(self, model: torch.nn.Module) -> None:
        """Two passes whose gradients are thrown away, so that a resumed run sums gradients in the same order.

        DDP regroups its buckets after its first backward: without this, from three workers on the first iteration
        after a start differs in the last bits from the same iteration in the middle of a run (measured, DESIGN 5).
        """
        model.train()
        for _ in range(2):
            images = torch.zeros(1, 3, self.stage.crop, self.stage.crop, device=self.team.device)
            self.net.set_draws(self.stage.seed, 0, torch.zeros(1, dtype=torch.int64, device=self.team.device))
            model(self.laid_out(images)).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def laid_out(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in the memory layout that the stage's convolutions want."""
        return images.contiguous(memory_format=torch.channels_last) if self.stage.channels_last else images

    def may_write(self) -> None:
        """Superseded when another command has taken this stage's lock."""
        if not fence_holds(self.store, self.job.lock, self.job.fence):
            raise Superseded

    def run(self) -> VggrowError | None:
        """Trains until the rule ends the stage, a stop is asked for, or a problem appears, which is returned."""
        if self.team.rank == 0:
            self.may_write()
            set_aside(self.folder, above=self.progress.iteration)
            cut_history(self.history.path, iteration=self.progress.iteration, epochs=self.progress.epoch)
            self.record_start()
        try:
            while not self.finished:
                outcome = self.train_epoch()
                if isinstance(outcome, VggrowError):
                    self.settle()
                    return outcome
                if outcome == "stopped":
                    return self.settle()
                self.end_epoch()
            return self.settle() or self.write_result()
        finally:
            self.loader.close()
            self.test_loader.close()

    def record_start(self) -> None:
        """Adds a line to starts.jsonl: when, where and from which iteration on these workers train."""
        row = {
            "fence": self.job.fence,
            "iteration": self.progress.iteration,
            "world_size": self.team.world_size,
            "threads": self.job.threads,
            "device": self.job.device,
            "host": socket.gethostname(),
            "passed_over": self.passed_over,
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        with (self.folder / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def finished(self) -> bool:
        """Whether the learning-rate rule or max_epochs has ended the stage."""
        return self.ended_by is not None

    @property
    def ended_by(self) -> str | None:
        """What has ended the stage, as result.json says it."""
        return ended_by(self.progress.plateau, epochs=self.progress.epoch, max_epochs=self.stage.max_epochs)

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
        set_learning_rate(self.optimizer, progress.plateau.learning_rate)
        self.model.train()
        coming = self.loader.epoch(progress.epoch, progress.batch)
        written_at, seconds_before, began = time.monotonic(), progress.seconds, time.monotonic()
        written_iteration = progress.iteration
        for index in range(progress.batch, batches):
            batch, problem = next_batch(coming)
            problem = problem or self.writing_problem()
            loss_sum = self.add_gradient(batch)
            stop = self.team.rank == 0 and stop_requested(self.store, self.job.lock, self.job.fence)
            total_loss, stops, problems = self.team.total(loss_sum, float(stop), float(problem is not None))
            if problems:
                return self.team.any_problem(problem) or TrainingError("a worker failed without a word")
            iteration = self.progress.iteration + 1
            if not np.isfinite(total_loss):
                return self.team.any_problem(self.no_number(batch, iteration, total_loss)) or TrainingError("no number")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
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
            if stops:
                return "stopped"
            yield batch.size if batch is not None else 0
            every = self.stage.checkpoint_every
            due = (
                iteration - written_iteration >= every.iterations
                if every.iterations is not None
                else time.monotonic() - written_at >= (every.seconds or 0)
            )
            if due and index + 1 < batches:   # the epoch's end writes one anyway
                self.checkpoint()
                written_at, written_iteration = time.monotonic(), iteration
        return "done"

    def no_number(self, batch: Batch | None, iteration: int, total_loss: float) -> TrainingError:
        """What to say of a loss that is not a number: the iteration, and the pictures of this worker that have such a loss.

        The update that it would make is not made: the weights are those of the iteration before.
        """
        names: list[str] = []
        if batch is not None and len(batch.labels):
            with torch.inference_mode(), self.autocast():
                self.net.set_draws(self.stage.seed, iteration - 1, batch.rows)
                losses = cross_entropy(self.net(self.laid_out(batch.images)).float(), batch.labels, reduction="none")
            bad = (~losses.isfinite()).nonzero().flatten().tolist()
            order = permutation(view_rule(self.stage), self.progress.epoch, len(self.train.paths))
            first = batch.index * self.stage.global_batch
            names = [str(self.train.paths[order[first + int(batch.rows[row])]]) for row in bad]
        which = f" for {len(names)} pictures, {', '.join(map(repr, names[:MOST_NAMED]))}" if names else ""
        return TrainingError(
            f"stage {self.stage.name!r}: the loss at iteration {iteration} (epoch {self.progress.epoch + 1}) is"
            f" {total_loss}{which}; the weights of iteration {iteration - 1} are kept: lower [train] learning_rate, now"
            f" {self.progress.plateau.learning_rate:g}, or look at these pictures"
        )

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        return torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.stage.precision == "bf16")

    def add_gradient(self, batch: Batch | None) -> float:
        """Adds this worker's part of the gradient of the global batch's mean loss; returns its sum of losses.

        DDP averages over workers, so each part is the sum of losses over world_size / global size. A worker without
        pictures runs one zero image with its loss times 0, to take part in the collectives.
        """
        device = self.team.device
        if batch is None or len(batch.labels) == 0:
            images = torch.zeros(1, 3, self.stage.crop, self.stage.crop, device=device)
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            torch.autograd.backward(self.losses(images, zero, zero) * 0.0)
            return 0.0
        micro = self.stage.micro_batch or len(batch.labels)
        starts = range(0, len(batch.labels), micro)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in starts:
            part = slice(start, start + micro)
            with self.exchange(start == starts[-1]):
                loss = self.losses(batch.images[part], batch.labels[part], batch.rows[part])
                torch.autograd.backward(loss * (self.team.world_size / batch.size))
            total += loss.detach().double()
        return float(total)

    def exchange(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged once an iteration, with the last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def losses(self, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """The sum of the pictures' cross-entropy losses, a float32 scalar."""
        self.net.set_draws(self.stage.seed, self.progress.iteration, rows)
        with self.autocast():
            logits = self.model(self.laid_out(images))
        return cross_entropy(logits.float(), labels, reduction="sum")

    def end_epoch(self) -> None:
        """Validates, moves the learning-rate rule on, records the epoch and writes a checkpoint."""
        began = time.monotonic()
        val_top1, val_loss = self.validate()
        progress = self.progress
        seconds = progress.seconds + time.monotonic() - began
        row = {
            "epoch": progress.epoch + 1,
            "iteration": progress.iteration,
            "train_loss": progress.loss_sum / len(self.train.paths),
            "val_loss": val_loss,
            "val_top1_accuracy": val_top1,
            "learning_rate": progress.plateau.learning_rate,
            "seconds": round(seconds, 3),
            "checkpoint_seconds": round(self.writer.waited_s, 3),
        }
        plateau = progress.plateau.after(progress.epoch, val_top1)
        self.progress = replace(
            progress,
            epoch=progress.epoch + 1,
            batch=0,
            loss_sum=0.0,
            seconds=seconds,
            plateau=plateau,
            val_top1=val_top1,
            best_iteration=progress.iteration if plateau.best_epoch == progress.epoch else progress.best_iteration,
        )
        if self.team.rank == 0:
            self.record(row)
        self.checkpoint()

    @torch.inference_mode()
    def validate(self) -> tuple[float, float]:
        """Top-1 accuracy and mean loss on val: centre crops at S, or at the middle of the range (Sec. 3.2)."""
        self.net.eval()
        correct, loss_sum = 0, 0.0
        for images, labels in self.views_of_val():
            with self.autocast():
                logits = self.net(self.laid_out(images)).float()
            correct += int((logits.argmax(1) == labels).sum())
            loss_sum += float(cross_entropy(logits, labels, reduction="sum"))
        total_correct, total_loss = self.team.total(float(correct), loss_sum)
        return total_correct / len(self.val.paths), total_loss / len(self.val.paths)

    def views_of_val(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's share of val, in batches; kept in memory from the first time on where it is small enough."""
        if self.val_views is not None:
            yield from self.val_views
            return
        start, stop = share(len(self.val.paths), self.team.rank, self.team.world_size)
        small = (stop - start) * 3 * self.stage.crop**2 * 4 <= VAL_CACHE_BYTES
        seen: list[tuple[Tensor, Tensor]] = []
        if stop > start:
            views = self.test_loader.centre(self.stage.middle_scale, self.stage.crop, VAL_BATCH, start, stop)
            for images, labels, _ in views:
                if small:
                    seen.append((images, labels))
                yield images, labels
        if small:
            self.val_views = seen

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
                self.progress, weights=self.net.state_dict(), optimizer_state=self.optimizer.state_dict()
            )
        except StoreError as error:
            self.trouble = self.trouble or error

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

    def write_result(self) -> VggrowError | None:
        """Rank 0 writes result.json, last of all: from now on the stage is done. Gives the problem, if there is one."""
        if self.team.rank != 0:
            return None
        self.may_write()
        progress = self.progress
        write_json(
            self.folder / "result.json",
            {
                "checkpoint": f"iteration-{progress.iteration}",
                "best_checkpoint": f"iteration-{progress.best_iteration}",
                "epochs": progress.epoch,
                "iterations": progress.iteration,
                "val_top1_accuracy": progress.val_top1,   # of the last epoch: of the weights that are the result
                "best_val_top1_accuracy": progress.plateau.best,
                "ended_by": self.ended_by,
                "seconds": round(progress.seconds, 3),
                "world_size": progress.world_size,
                "threads": progress.threads,
                "device": torch.cuda.get_device_name() if self.job.device == "cuda" else "cpu",
            },
        )
        return None


def next_batch(coming: Iterator[Batch]) -> tuple[Batch | None, VggrowError | None]:
    """The next batch, or the problem that kept it from coming."""
    try:
        return next(coming), None
    except VggrowError as error:
        return None, error


def view_rule(stage: Stage) -> ViewRule:
    """What of a stage decides its views."""
    return ViewRule(
        seed=stage.seed,
        net=stage.net,
        scale=stage.scale,
        crop=stage.crop,
        flip=stage.flip,
        colour=stage.colour,
        global_batch=stage.global_batch,
    )


def first_weights(net: Vgg, job: StageJob) -> None:
    """Random weights, and over them what the parent gives."""
    stage = job.stage
    initialise_net(net, stage.initialise, width=stage.width, seed=stage.seed, name=stage.net)
    if job.parent is not None:
        parent_net, weights = job.parent
        copy_from_parent(net, load_weights(weights), net_name=stage.net, parent_name=parent_net, head=stage.head)
