"""MLflow's view of a schedule: a parent run, a child run a stage, filled from the store's journal by the conductor alone.

history.jsonl is written first; from there points go to the server, in order, from the server's own last step on. A
server that is down for a while costs delay and nothing else: no point is lost, none is doubled.
"""

import logging
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from training.history import read_history
from training.listener import Listener
from training.store import Store
from training.system_metrics import Sample, SystemTail
from vggcore.errors import TrackingError
from vggcore.schedule import EXEMPT, LOGISTIC, Stage

logger = logging.getLogger(__name__)

BATCH = 1000                # metrics a request: MLflow's limit
RETRY_AFTER_S = 30.0        # pause after a server did not answer
LOOK_EVERY_S = 5.0          # how often the journals of the machines are looked at
POINTS_AN_EPOCH = 50        # train_loss points an epoch that go to MLflow; all are in history.jsonl
EPOCH_METRICS = ("epoch", "val_loss", "val_top1_accuracy", "learning_rate", "seconds")
GRID_METRICS = ("C", "train_loss", "val_loss", "val_top1_accuracy", "seconds")      # of a logistic fit, a point a penalty
DOWN = (MlflowException, requests.RequestException, OSError)


@dataclass
class StageRun:
    """A child run, and how far the server's copy of each metric reaches."""

    run_id: str
    batches_per_epoch: int
    machines: SystemTail
    reached: dict[str, int] = field(default_factory=dict)      # metric -> last step on the server
    waiting: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)        # of the machines, that wait
    looked_at: float = float("-inf")
    stale: bool = True                                         # ask the server how far it got: at first, and after an error


class Tracker(Listener):
    """Writes a schedule's runs to one MLflow store."""

    def __init__(self, client: MlflowClient, *, experiment_id: str, parent_run_id: str, store: Store) -> None:
        """See open_tracker."""
        self.client, self.experiment_id, self.parent_run_id = client, experiment_id, parent_run_id
        self.store = store
        self.runs: dict[str, StageRun] = {}      # by stage key
        self.quiet_until = 0.0
        self.batches: dict[str, int] = {}

    def stage_begins(self, stage: Stage, key: str, *, done: bool) -> None:
        """Finds the stage's run by its key, or makes it, and marks it RUNNING; a done stage's run is completed."""
        folder = self.store.stage(key)
        self.runs[key] = run = StageRun(self.child_run(stage, key), self.batches[key], SystemTail(folder))
        if done:
            run.waiting = read_history(folder / "history.jsonl")
            run.samples = run.machines.new_samples()
            self.push(run)
            self.end(run.run_id, "FINISHED")
        else:
            self.client.update_run(run.run_id, status="RUNNING")

    def rows(self, stage: Stage, key: str, rows: list[dict[str, Any]]) -> None:
        """Sends what is new; when the server does not answer the rows wait."""
        run = self.runs[key]
        run.waiting += rows
        if time.monotonic() - run.looked_at > LOOK_EVERY_S:
            run.looked_at = time.monotonic()
            run.samples += run.machines.new_samples()
        if (run.waiting or run.samples) and time.monotonic() >= self.quiet_until:
            try:
                self.push(run)
            except DOWN as error:
                run.stale = True
                self.quiet_until = time.monotonic() + RETRY_AFTER_S
                logger.warning("MLflow does not answer (%s); training goes on, points wait in the store", shortly(error))

    def stage_ends(self, stage: Stage, key: str, status: str) -> None:
        """Closes the stage's run truthfully, with all of its points."""
        run = self.runs[key]
        run.samples += run.machines.new_samples()
        self.insist(lambda: self.push(run))
        self.insist(lambda: self.end(run.run_id, status))

    def insist(self, action: Callable[[], None]) -> None:
        """Does it, or raises TrackingError: what was trained is safe, and the same command records the rest."""
        try:
            action()
        except DOWN as error:
            raise TrackingError(
                f"MLflow does not answer ({shortly(error)}); all that was trained is in the store: start the same"
                " command again when the server is back, and it records the rest"
            ) from error

    def end(self, run_id: str, status: str) -> None:
        """Sets a run's end and status ("FINISHED", "KILLED", "FAILED") unless it has that status already."""
        if self.client.get_run(run_id).info.status != status:
            self.client.set_terminated(run_id, status)

    def push(self, run: StageRun) -> None:
        """Sends the waiting rows and samples that the server does not have."""
        if run.stale:
            run.reached = self.last_steps(run.run_id)
            run.stale = False
        now = int(time.time() * 1000)
        every = max(1, run.batches_per_epoch // POINTS_AN_EPOCH)
        metrics = []
        for row in run.waiting:
            step = row["iteration"]
            if "epoch" in row:
                values = {name: row[name] for name in EPOCH_METRICS}
            elif "C" in row:
                values = {name: row[name] for name in GRID_METRICS}
            else:
                values = {"train_loss": row["train_loss"]} if step % every == 0 else {}
            for name, value in values.items():
                if step > run.reached.get(name, -1):
                    metrics.append(Metric(name, float(value), now, step))
        metrics += [Metric(*sample) for sample in run.samples if sample[3] > run.reached.get(sample[0], -1)]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run.run_id, metrics=metrics[start : start + BATCH])
        for metric in metrics:
            run.reached[metric.key] = max(run.reached.get(metric.key, -1), metric.step)
        run.waiting, run.samples = [], []

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The last step of each metric on the server, in one request however long its history is."""
        return {metric.key: metric.step for metric in self.client.get_run(run_id).to_proto().data.metrics}

    def child_run(self, stage: Stage, key: str) -> str:
        """The id of the stage's run: the one with its key, or a new one; a kill while it was made leaves none half-made."""
        run_id = find_run(self.client, self.experiment_id, "vggrow.stage_key", key)
        if run_id is None:
            tags = {
                "vggrow.stage_key": key,
                "vggrow.kind": "stage",
                "mlflow.parentRunId": self.parent_run_id,
                "vggrow.init_from": stage.init_from or "random weights",
                **({"vggrow.weights_digest": stage.weights_digest} if stage.weights_digest else {}),
                "vggrow.machine": platform.node(),
            }
            run_id = str(self.client.create_run(self.experiment_id, run_name=stage.name, tags=tags).info.run_id)
        used = set(LOGISTIC) if stage.fit == "logistic" else None
        settings = stage.model_dump(mode="json", exclude=set(EXEMPT), include=used)
        known = self.client.get_run(run_id).data.params
        missing = [Param(name, str(value)) for name, value in settings.items() if name not in known]
        if missing:
            self.client.log_batch(run_id, params=missing)
        return run_id

    def log_results(self, run_id: str, metrics: dict[str, float], files: Iterable[tuple[Path, str]] = ()) -> None:
        """Figures of a finished stage (replaced, not added to, when logged again) and files with their folders."""
        now = int(time.time() * 1000)
        known = self.client.get_run(run_id).data.metrics
        fresh = [Metric(name, value, now, 0) for name, value in metrics.items() if known.get(name) != value]
        self.insist(lambda: self.client.log_batch(run_id, metrics=fresh))
        for path, folder in files:
            self.insist(partial(self.client.log_artifact, run_id, str(path), folder))

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Tags of a run, set anew where they differ."""
        known = self.client.get_run(run_id).data.tags
        for name, value in tags.items():
            if known.get(name) != value:
                self.insist(partial(self.client.set_tag, run_id, name, value))

    def log_bytes(self, run_id: str, content: bytes, name: str, scratch: Path) -> None:
        """An artifact from memory, such as a picture."""
        path = scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self.insist(lambda: self.client.log_artifact(run_id, str(path), str(Path(name).parent) if "/" in name else None))
        path.unlink()

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Tags of a run."""
        self.insist(lambda: self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()]))


def open_tracker(
    tracking: str, store: Store, *, recipe_name: str, schedule_key: str, tags: dict[str, str], artifact_location: str | None
) -> Tracker:
    """A tracker whose experiment and parent run exist, the parent RUNNING.

    tracking: checked before (see tracking_address). The parent run is found again by its schedule key.
    """
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)     # a traceback beside what it raises
    client = MlflowClient(tracking)
    try:
        experiment = client.get_experiment_by_name(recipe_name)
        if experiment is None:
            experiment_id = client.create_experiment(recipe_name, artifact_location=artifact_location)
        elif experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"--tracking {tracking}: experiment {recipe_name!r} was deleted there; restore it, or give the recipe"
                " another name"
            )
        else:
            experiment_id = experiment.experiment_id
        parent = find_run(client, experiment_id, "vggrow.schedule_key", schedule_key)
        if parent is None:
            all_tags = {"vggrow.schedule_key": schedule_key, "vggrow.kind": "schedule", **tags}
            parent = str(client.create_run(experiment_id, run_name=recipe_name, tags=all_tags).info.run_id)
        client.update_run(parent, status="RUNNING")
    except DOWN as error:
        raise TrackingError(f"--tracking {tracking}: {shortly(error)}") from error
    return Tracker(client, experiment_id=experiment_id, parent_run_id=parent, store=store)


def find_run(client: MlflowClient, experiment_id: str, tag: str, value: str) -> str | None:
    """The id of the oldest active run with this tag, or None."""
    found = client.search_runs(
        [experiment_id], f"tags.`{tag}` = '{value}'", max_results=1, order_by=["attributes.start_time ASC"]
    )
    return str(found[0].info.run_id) if found else None


def shortly(error: BaseException) -> str:
    """An error in one line of at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__


