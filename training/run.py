"""The conductor: runs a schedule's stages one after the other on Ray Train, and answers for every way they may end.

`fit()` runs in a thread, since Ray Train takes SIGINT for itself in the main thread and leaves no checkpoint behind;
signals belong to us: the first asks all workers for a checkpoint at their next iteration, a second one ends at once.
"""

import logging
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

import vggcore.errors
from pipelines.manifest import Manifest
from training.checkpoint import KEPT
from training.history import parse_rows
from training.parents import check_stored_parents, is_done, parent_weights
from training.ray_start import start_ray
from training.store import Store, hold, read_json, request_stop
from training.worker import StageJob, train_stage
from training.worker_count import WorkerCount, most, workers_text
from vggcore.errors import DeviceError, RecipeError, StoreError, TrainingError
from vggcore.nets import layer_table
from vggcore.recipe import NetName
from vggcore.schedule import Stage
from vggcore.whole_file import write_json, write_text

logger = logging.getLogger(__name__)

POLL_S = 0.2
STOP_WAIT_S = 20.0        # how long workers may take to write a checkpoint after a signal
MAX_FAILURES = 3          # how often a stage's workers may die before we give up
RESIZE_S = 15.0           # how often a stage with a range of workers looks whether there is room for more


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def threads_for(workers: WorkerCount) -> int:
    """CPU threads a worker where none are named: this machine's cores, shared by the most workers."""
    return max(1, cores() // most(workers))


class Interrupted(Exception):
    """SIGINT or SIGTERM came; all that was asked for is safe in the store."""


@dataclass(frozen=True)
class Where:
    """Where a schedule runs and with how much; nothing here changes what is trained."""

    store: Store
    workers: WorkerCount = 1
    threads: int = 1
    address: str | None = None
    device: str = "cpu"
    cache_gib: float = 2.0       # what decoded pictures may take in the store; 0: none are kept

    @property
    def device_here(self) -> str:
        """The device for work in the conductor itself: a cluster's head may have no GPU though its workers do."""
        return "cuda" if self.device == "cuda" and torch.cuda.is_available() else "cpu"

    @property
    def in_this_process(self) -> bool:
        """One worker on this machine needs no Ray cluster: Ray Train's local mode runs it right here."""
        return self.workers == 1 and self.address is None and "RAY_ADDRESS" not in os.environ

    @property
    def on_a_cluster(self) -> bool:
        """Whether workers run where nodes come and go, and not in processes of this machine."""
        return (self.address or os.environ.get("RAY_ADDRESS", "local")) != "local"


class Listener:
    """Hears what happens while stages run; the default hears nothing."""

    def stage_begins(self, stage: Stage, key: str, *, done: bool) -> None:
        """A stage is next; `done`: it has finished before and is passed over."""

    def rows(self, stage: Stage, key: str, rows: list[dict[str, Any]]) -> None:
        """New rows of the stage's history; called every POLL_S, also with no rows."""

    def workers_restarted(self, stage: Stage, key: str, iteration: int) -> None:
        """Workers died and were replaced; training goes on from a checkpoint."""

    def stage_ends(self, stage: Stage, key: str, status: str) -> None:
        """The stage is "FINISHED", "KILLED" (by a signal; it can go on) or "FAILED"."""


def check_where(where: Where, stages: Sequence[Stage]) -> None:
    """RecipeError or DeviceError for what cannot work, before anything starts."""
    batch = min(stage.global_batch for stage in stages)
    workers = workers_text(where.workers)
    if most(where.workers) > batch:
        raise RecipeError(
            f"--workers {workers} is more than global_batch {batch}: a worker would have no picture; use at most"
            f" {batch} workers, or a larger batch"
        )
    if isinstance(where.workers, tuple) and not where.on_a_cluster:
        raise RecipeError(
            f"--workers {workers}: on one machine there is always room for the same number of workers; name that number, or"
            " a cluster by --address"
        )
    if where.device == "cuda" and where.in_this_process and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch finds no GPU on this machine; use --device cpu, or see `vggrow doctor`")
    if where.device == "cpu" and any(stage.precision == "tf32" for stage in stages):
        raise DeviceError('[train] precision: "tf32" needs a GPU; use "fp32", or --device cuda')


def train_schedule(
    stages: Sequence[Stage], keys: dict[str, str], manifest: Manifest, where: Where, listener: Listener
) -> None:
    """Trains every stage that is not done, parents first. Raises VggrowError, or Interrupted after a signal."""
    check_stored_parents(stages, where.store, manifest.classes)
    with StopSwitch() as switch:
        for stage in stages:
            key = keys[stage.name]
            if is_done(where.store, key):
                listener.stage_begins(stage, key, done=True)
                continue
            parent = parent_weights(stage, stages, keys, where.store)
            with hold(where.store, stage_lock(key), what=f"stage {stage.name!r} ({key})") as fence:
                listener.stage_begins(stage, key, done=is_done(where.store, key))
                if is_done(where.store, key):      # another schedule with the same stage has just finished it
                    continue
                try:
                    train_one(stage, key, fence, parent, manifest, where, listener, switch)
                except Interrupted:
                    listener.stage_ends(stage, key, "KILLED")
                    raise
                except BaseException:
                    listener.stage_ends(stage, key, "FAILED")
                    raise
                listener.stage_ends(stage, key, "FINISHED")


def stage_lock(key: str) -> str:
    """The name of the lock under which a stage is trained."""
    return f"stage-{key}"


def train_one(
    stage: Stage,
    key: str,
    fence: int,
    parent: tuple[NetName, Path] | None,
    manifest: Manifest,
    where: Where,
    listener: Listener,
    switch: "StopSwitch",
) -> None:
    """Trains one stage, whose lock is held, until it has a result."""
    store, folder, lock = where.store, where.store.stage(key), stage_lock(key)
    check_space(stage, len(manifest.classes), folder)
    if not where.in_this_process:
        # Here and not in fit's thread: Ray's processes die with the thread that started them (PR_SET_PDEATHSIG).
        elastic = isinstance(where.workers, tuple)
        start_ray(store, address=where.address, cpus=most(where.workers) * where.threads, elastic=elastic)
        switch.take_signals()      # Ray puts a handler of its own on SIGTERM, which aborts the process
    switch.on_stop = lambda: request_stop(store, lock, fence)
    if switch.stopped:
        raise Interrupted
    fit = FitThread(prepare(stage, key, fence, parent, manifest, where), where)
    fit.start()
    tail, starts = HistoryTail(folder / "history.jsonl"), HistoryTail(folder / "starts.jsonl")
    first = True
    while fit.is_alive():
        fit.join(POLL_S)
        for start in starts.new_rows():
            if start["fence"] == fence:
                if not first:
                    listener.workers_restarted(stage, key, start["iteration"])
                first = False
        listener.rows(stage, key, tail.new_rows())
        if switch.overdue:
            ray.shutdown()
            raise Interrupted
    listener.rows(stage, key, tail.new_rows())
    if is_done(store, key):
        return
    raise_problem(folder, fence)
    if switch.stopped:
        raise Interrupted
    fit.raise_error(stage.name)
    raise TrainingError(f"stage {stage.name!r}: its workers ended without a result; start the same command again")


def prepare(
    stage: Stage,
    key: str,
    fence: int,
    parent: tuple[NetName, Path] | None,
    manifest: Manifest,
    where: Where,
) -> StageJob:
    """Writes what the workers will read, stage.json and the nonce, and gives their job."""
    store, folder, lock = where.store, where.store.stage(key), stage_lock(key)
    write_json(
        folder / "stage.json",
        {
            "name": stage.name,
            "key": key,
            "stage": stage.model_dump(mode="json"),
            "parent": parent and {"net": parent[0], "key": parent[1].parent.parent.parent.name},
            "fingerprint": manifest.fingerprint,
            "classes": list(manifest.classes),
        },
    )
    (folder / "error.json").unlink(missing_ok=True)
    nonce = secrets.token_hex(16)
    write_text(store.locks / f"{lock}.nonce", nonce)
    return StageJob(
        stage=stage,
        key=key,
        store=store.root,
        fingerprint=manifest.fingerprint,
        parent=parent,
        lock=lock,
        fence=fence,
        nonce=nonce,
        device=where.device,
        threads=where.threads,
        cached=where.cache_gib > 0,
    )


def check_space(stage: Stage, classes: int, folder: Path) -> None:
    """StoreError unless the disk holds the checkpoints that stay and the one that is being written."""
    rows = layer_table(stage.net, classes=classes, head=stage.head, width=stage.width, crop=stage.crop)
    checkpoint = 8 * sum(row.parameters for row in rows)      # weights and momentum, float32
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    wanted = (KEPT + 2) * checkpoint          # the newest, the best, and one that is being written
    if free < wanted:
        raise StoreError(
            f"{folder}: {free / 2**30:.1f} GiB free, but stage {stage.name!r} needs {wanted / 2**30:.1f} GiB for its"
            " checkpoints; free some, or name another folder by --store"
        )


def raise_problem(stage_folder: Path, fence: int) -> None:
    """Raises the problem that a worker left for us in this attempt, if any."""
    found = read_json(stage_folder / "error.json")
    if found is not None and found["fence"] == fence:
        raise getattr(vggcore.errors, found["type"], TrainingError)(found["message"])


class FitThread(threading.Thread):
    """Ray Train's fit() in a thread of its own; what it raises is kept."""

    def __init__(self, job: StageJob, where: Where) -> None:
        """Starts nothing yet."""
        super().__init__(name=f"fit-{job.stage.name}", daemon=True)
        self.job, self.where = job, where
        self.error: BaseException | None = None

    def run(self) -> None:
        """Runs the stage to its end."""
        try:
            make_trainer(self.job, self.where).fit()
        except BaseException as error:
            self.error = error

    def raise_error(self, stage: str) -> None:
        """Raises what fit() raised: deaths of workers as TrainingError, anything else as it is."""
        if self.error is None:
            return
        failures = getattr(self.error, "worker_failures", None)
        if failures and all(isinstance(one, ray.exceptions.RayActorError) for one in failures.values()):
            raise TrainingError(
                f"stage {stage!r}: its workers died more than {MAX_FAILURES} times; look for what kills them (memory?),"
                " then start the same command again: it goes on from the newest checkpoint"
            ) from self.error
        raise self.error


def make_trainer(job: StageJob, where: Where) -> TorchTrainer:
    """The Ray Train run of one stage."""
    gpu = where.device == "cuda"
    logging.getLogger("ray.train").setLevel(logging.WARNING)      # local mode says at each stage that it is one
    return TorchTrainer(
        train_stage,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=0 if where.in_this_process else where.workers,
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=gpu,
            resources_per_worker={"CPU": where.threads, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=f"{job.key}-{job.fence}",
            storage_path=str(where.store.scratch),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


class HistoryTail:
    """Reads a growing journal: each call gives the whole lines that are new.

    A history that was cut to a checkpoint is a new file, and is read from its start again: its readers pass over what
    they know, by iteration.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        self.inode = self.offset = 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Rows since the last call."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:
                self.inode, self.offset = inode, 0
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return parse_rows(whole.decode().splitlines())


class StopSwitch:
    """Owns SIGINT and SIGTERM while stages run: the first asks for a checkpoint, the second ends at once."""

    def __init__(self) -> None:
        """Handlers are set on entry and put back on leaving."""
        self.on_stop: Callable[[], None] = lambda: None
        self.stopped_at: float | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSwitch":
        """Takes the signals."""
        self.take_signals()
        return self

    def take_signals(self) -> None:
        """Sets our handlers; in another thread than the main one the signals stay with their owner."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                found = signal.signal(number, self.handle)
                self.before.setdefault(number, found)

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """A signal came."""
        if self.stopped_at is not None:
            raise Interrupted
        self.stopped_at = time.monotonic()
        logger.warning("%s: writing a checkpoint, then stopping; once more ends at once", signal.Signals(number).name)
        self.on_stop()

    @property
    def stopped(self) -> bool:
        """Whether a signal came."""
        return self.stopped_at is not None

    @property
    def overdue(self) -> bool:
        """Whether the workers have had their time to stop."""
        return self.stopped_at is not None and time.monotonic() - self.stopped_at > STOP_WAIT_S
