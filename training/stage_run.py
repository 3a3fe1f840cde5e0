"""One stage on Ray Train, from taking its lock to its end, however it ends.

`fit()` runs in a thread, since Ray Train takes SIGINT for itself in the main thread and leaves no checkpoint behind.
"""

import logging
import secrets
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path

import ray
import ray.train
import torch.distributed
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

import vggcore.errors
from pipelines.manifest import Manifest
from training.checkpoint import KEPT, iterations_on_disk
from training.history_tail import HistoryTail
from training.listener import Listener
from training.parents import is_done
from training.stage_job import StageJob
from training.stage_log import CONDUCTOR, FIT, conductor_hears, stage_log, stage_logger, versions
from training.store import hold, read_json, request_stop, stop_requested
from training.system_metrics import sampling_interval_s
from training.where import Where
from training.worker import train_stage
from training.worker_count import workers_text
from vggcore.errors import ClusterError, StoreError, TrainingError, VggrowError
from vggcore.nets import layer_table
from vggcore.recipe import NetName
from vggcore.schedule import Stage
from vggcore.whole_file import write_json, write_text

MAX_FAILURES = 3          # how often a stage's workers may die without a new checkpoint before we give up
LEFT_ALONE = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")     # what gloo says of others
RESIZE_S = 15.0           # how often a stage with a range of workers looks whether there is room for more


class StageRun:
    """A stage that is being trained; its lock is held from begin() to let_go()."""

    def __init__(
        self,
        stage: Stage,
        key: str,
        parent: tuple[NetName, Path] | None,
        manifest: Manifest,
        where: Where,
        listener: Listener,
    ) -> None:
        """Starts nothing yet; parent: net and weights."""
        self.stage, self.key, self.parent = stage, key, parent
        self.manifest, self.where, self.listener = manifest, where, listener
        self.folder = where.store.stage(key)
        self.log = stage_logger(key, CONDUCTOR)
        self.held = ExitStack()
        self.fit: FitThread | None = None
        self.begun, self.fence = False, 0

    def begin(self) -> None:
        """Takes the lock, says so, and lets Ray Train begin; a stage that others have just finished has nothing to do.

        Raises StoreError where another command holds the stage, or the disk has no room for its checkpoints.
        """
        store, lock = self.where.store, stage_lock(self.key)
        self.fence = self.held.enter_context(hold(store, lock, what=f"stage {self.stage.name!r} ({self.key})"))
        if is_done(store, self.key):
            self.listener.stage_begins(self.stage, self.key, done=True)
            return
        hears = conductor_hears(self.stage.name, in_this_process=self.where.in_this_process)
        self.held.enter_context(stage_log(self.folder, self.key, CONDUCTOR, hears))
        check_space(self.stage, len(self.manifest.classes), self.folder)
        self.say_begin()
        self.listener.stage_begins(self.stage, self.key, done=False)
        self.begun = True
        self.tail, self.starts = HistoryTail(self.folder / "history.jsonl"), HistoryTail(self.folder / "starts.jsonl")
        self.leaving = HistoryTail(self.folder / "preemptions.jsonl")
        self.first = True
        self.fit = FitThread(
            prepare(self.stage, self.key, self.fence, self.parent, self.manifest, self.where), self.where
        )
        self.fit.start()

    def say_begin(self) -> None:
        """Into the log: what is trained, where and with how much."""
        where, manifest = self.where, self.manifest
        self.log.info(
            "%s (%s) begins: --workers %s, --address %s, device %s, --threads %d; pictures %s: %d to train on, %d quarantined"
            " by the scan; %s",
            self.stage.name,
            self.key,
            workers_text(where.workers),
            where.address or ("none" if where.in_this_process else "local"),
            where.device,
            where.threads,
            manifest.fingerprint,
            len(manifest.split("train")),
            len(manifest.quarantine),
            versions(),
        )

    def say_end(self, status: str, problem: BaseException | None) -> None:
        """Into the log: how the stage ended; a problem that is not the user's with its traceback."""
        level = logging.INFO if problem is None else logging.ERROR
        ours = None if isinstance(problem, VggrowError) else problem
        self.log.log(level, "%s%s", status, f": {problem}" if problem else "", exc_info=ours)

    def ask_to_stop(self) -> None:
        """Asks the workers for a checkpoint at their next iteration, and their end."""
        self.log.info("told to stop: asks the workers for a checkpoint and their end")
        request_stop(self.where.store, stage_lock(self.key), self.fence)

    @property
    def is_at_work(self) -> bool:
        """Whether Ray Train still runs it."""
        return self.fit is not None and self.fit.is_alive()

    def poll(self) -> bool:
        """Passes on what is new; whether the stage is over, one way or another."""
        if self.fit is None:
            return True
        over = not self.is_at_work
        for start in self.starts.new_rows():
            if start["fence"] == self.fence:
                self.log.info(
                    "%s: world size %d, rank 0 on %s, from iteration %d on",
                    "workers have begun" if self.first else "workers were started anew",
                    start["world_size"],
                    start["host"],
                    start["iteration"],
                )
                if not self.first:
                    self.listener.workers_restarted(self.stage, self.key, start["iteration"])
                for words in start.get("passed_over", ()):
                    self.log.warning("a broken checkpoint was passed over, the one before is used: %s", words)
                    self.listener.checkpoint_passed_over(self.stage, self.key, words)
                self.first = False
        for notice in self.leaving.new_rows():
            if notice["fence"] == self.fence:
                self.log.warning("Ray says that a node will be taken away; checkpoint at iteration %d", notice["iteration"])
                self.listener.node_leaves(self.stage, self.key, notice["iteration"], notice["every_s"])
        self.listener.rows(self.stage, self.key, self.tail.new_rows())
        return over

    def problem(self) -> BaseException | None:
        """Why the stage, which is over, has no result; None where it has, or where it was asked to stop and did."""
        if self.fit is None or is_done(self.where.store, self.key):
            return None
        found = read_json(self.folder / "error.json")
        if found is not None and found["fence"] == self.fence:
            return getattr(vggcore.errors, found["type"], TrainingError)(found["message"])
        return self.fit.problem()

    def let_go(self) -> None:
        """Gives the lock back."""
        self.held.close()


def stage_lock(key: str) -> str:
    """The name of the lock under which a stage is trained."""
    return f"stage-{key}"


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
        preemptible=where.on_a_cluster,
        log_pictures=where.log_pictures,
        sample_s=sampling_interval_s(),
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


class FitThread(threading.Thread):
    """Ray Train's fit() in a thread of its own; what it raises is kept."""

    def __init__(self, job: StageJob, where: Where) -> None:
        """Starts nothing yet."""
        super().__init__(name=FIT + job.stage.name, daemon=True)
        self.job, self.where = job, where
        self.error: BaseException | None = None

    def run(self) -> None:
        """Runs the stage to its end; begins anew where Ray Train gives up after deaths and MAX_FAILURES is not passed.

        Ray Train counts deaths over its whole run, ours are those without a new checkpoint; and it begins no second time
        when a worker dies while the others are still being started (seen in a kill campaign). A problem that the workers
        return is kept as if it had been raised.
        """
        attempt = deaths = 0
        while True:
            reached, attempt = self.reached(), attempt + 1
            try:
                self.error = make_trainer(self.job, self.where, attempt).fit().return_value
                return
            except BaseException as error:
                stopped = stop_requested(self.where.store, self.job.lock, self.job.fence)
                counted = 1 if isinstance(error, ControllerError) else MAX_FAILURES + 1       # that Ray Train gave up after
                deaths = 0 if self.reached() > reached else deaths + counted
                if stopped or not only_deaths(error) or deaths > MAX_FAILURES:
                    self.error = error
                    return
                log = stage_logger(self.job.key, CONDUCTOR)
                log.warning("Ray Train gave up after deaths of workers, and begins anew: %s", error, exc_info=error)

    def reached(self) -> int:
        """The newest checkpoint's iteration, -1 before the first."""
        return max(iterations_on_disk(self.where.store.stage(self.job.key)), default=-1)

    def problem(self) -> BaseException | None:
        """What fit() raised: what a worker says the user can mend, deaths of workers as TrainingError, else as it is."""
        if self.error is None:
            return None
        if isinstance(self.error, VggrowError):
            return self.error
        for one in worker_failures(self.error):
            if isinstance(one, VggrowError):
                return one
            if "Gloo connectFullMesh failed" in str(one):
                return ClusterError(
                    f"stage {self.job.stage.name!r}: the workers do not reach one another (Gloo connectFullMesh failed); set"
                    " GLOO_SOCKET_IFNAME on every node to the card that the others see, such as eth0, where Ray is started"
                )
        if only_deaths(self.error):
            return TrainingError(
                f"stage {self.job.stage.name!r}: its workers died or hung more than {MAX_FAILURES} times without a new"
                " checkpoint; look for what kills or holds them (memory? --stall-limit?), then start the same command again:"
                " it goes on from the newest checkpoint"
            )
        return self.error


def worker_failures(error: BaseException) -> list[BaseException]:
    """What Ray Train says of each worker that failed, or of what failed while they were started; none for other errors."""
    if isinstance(error, ControllerError):
        return [error.controller_failure]
    return list((getattr(error, "worker_failures", None) or {}).values())


def only_deaths(error: BaseException) -> bool:
    """Whether workers died or hung, and none of them raised an error of its own."""
    failures = worker_failures(error)
    return bool(failures) and all(is_death(one) for one in failures)


def is_death(failure: BaseException) -> bool:
    """Whether a worker died, hung, or was left alone by one that did.

    Ray 2.60 has no public names for the errors of its health check, and where it keeps them is its own affair.
    """
    cause = getattr(failure, "health_check_failure", failure)
    if isinstance(cause, (ray.exceptions.RayActorError, torch.distributed.DistError)):
        return True
    if type(cause).__name__ == "WorkerHealthCheckTimeoutError":
        return True
    return isinstance(cause, RuntimeError) and any(words in str(cause) for words in LEFT_ALONE)


def make_trainer(job: StageJob, where: Where, attempt: int) -> TorchTrainer:
    """The Ray Train run of one stage; attempt: of this command, counted from 1."""
    gpu = where.device == "cuda"
    logging.getLogger("ray.train").setLevel(logging.WARNING)      # local mode says at each stage that it is one
    return TorchTrainer(
        train_stage,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=max(1, round(where.stall_s))),
        scaling_config=ScalingConfig(
            num_workers=0 if where.in_this_process else where.workers,
            elastic_resize_monitor_interval_s=RESIZE_S,
            use_gpu=gpu,
            resources_per_worker={"CPU": where.threads, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=f"{job.key}-{job.fence}-{attempt}",
            storage_path=str(where.store.scratch),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
