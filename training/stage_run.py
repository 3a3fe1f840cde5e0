"""One stage on Ray Train, from taking its lock to its end, however it ends."""

import logging
import secrets
import shutil
from contextlib import ExitStack
from pathlib import Path

import vggcore.errors
from pipelines.colour import Colour
from pipelines.manifest import Manifest
from training.checkpoint import room_for_checkpoints
from training.fit import FitThread
from training.freezing import frozen_parameters
from training.history_tail import HistoryTail
from training.listener import Listener
from training.logistic_stage import LogisticThread
from training.parents import Parent, is_done
from training.stage_job import StageJob
from training.stage_log import CONDUCTOR, conductor_hears, stage_log, stage_logger, versions
from training.store import hold, read_json, request_stop
from training.system_metrics import sampling_interval_s
from training.where import Where
from training.worker_count import workers_text
from vggcore.errors import StoreError, TrainingError, VggrowError
from vggcore.nets import parameter_sizes
from vggcore.schedule import Stage
from vggcore.whole_file import write_json, write_text


class StageRun:
    """A stage that is being trained; its lock is held from begin() to let_go()."""

    def __init__(
        self,
        stage: Stage,
        key: str,
        parent: Parent | None,
        colour: Colour,
        manifest: Manifest,
        where: Where,
        listener: Listener,
    ) -> None:
        """Starts nothing yet; colour: see parents.stage_colour."""
        self.stage, self.key, self.parent, self.colour = stage, key, parent, colour
        self.manifest, self.where, self.listener = manifest, where, listener
        self.folder = where.store.stage(key)
        self.log = stage_logger(key, CONDUCTOR)
        self.held = ExitStack()
        self.fit: FitThread | LogisticThread | None = None
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
        job = prepare(self.stage, self.key, self.fence, self.parent, self.colour, self.manifest, self.where)
        if self.stage.fit == "logistic":
            self.fit = LogisticThread(job, self.manifest, self.where)
        else:
            self.fit = FitThread(job, self.where)
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
        """Whether it still runs."""
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
        if isinstance(self.fit, LogisticThread):
            for split, (done, total) in list(self.fit.features.items()):
                self.listener.features(self.stage, self.key, split, done, total)
        self.listener.rows(self.stage, self.key, self.tail.new_rows())
        return over

    @property
    def lost_its_controller(self) -> bool:
        """Whether Ray Train's own process of this stage was killed."""
        return self.fit is not None and self.fit.lost_its_controller

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
    parent: Parent | None,
    colour: Colour,
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
            "parent": parent and {"key": parent.key, "name": parent.name},
            "mean": colour.mean.tolist(),
            "deviation": colour.deviation.tolist() if stage.standardise else None,
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
        classes=manifest.classes,
        parent=parent,
        colour=colour,
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
    sizes, frozen = parameter_sizes(stage.net, classes=classes, **stage.net_settings), frozen_parameters(stage)
    parameters = sum(sizes.values())
    wanted = room_for_checkpoints(stage, parameters, parameters - sum(sizes[name] for name in frozen))
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise StoreError(
            f"{folder}: {free / 2**30:.1f} GiB free, but stage {stage.name!r} needs {wanted / 2**30:.1f} GiB for its"
            " checkpoints; free some, or name another folder by --store"
        )
