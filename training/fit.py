"""Ray Train's run of one stage: how it is asked for, which of its failures are deaths of workers, when to begin anew.

`fit()` runs in a thread, since Ray Train takes SIGINT for itself in the main thread and leaves no checkpoint behind.
"""

import logging
import threading
from typing import Any

import ray
import ray.train
import torch.distributed
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from training.checkpoint import iterations_on_disk
from training.stage_job import StageJob
from training.stage_log import CONDUCTOR, FIT, stage_logger
from training.store import stop_requested
from training.where import Where
from training.worker import train_stage
from vggcore.errors import ClusterError, TrainingError, VggrowError

MAX_FAILURES = 3          # how often a stage's workers may die without a new checkpoint before we give up
LEFT_ALONE = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting")     # what gloo says of others
RESIZE_S = 15.0           # how often a stage with a range of workers looks whether there is room for more

# What Ray 2.60's trainer has beside it that no stage uses, each a process that loads Ray Data: shards of Ray Datasets,
# for we have none; on this machine also what gives a cluster's room back after a controller that died: it would ask the
# dashboard, which our own Ray has not got. There Crew in run.py sees to that room.
UNUSED = frozenset({"DatasetsCallback"})
UNUSED_HERE = UNUSED | {"PlacementGroupCleanerCallback"}


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

    @property
    def lost_its_controller(self) -> bool:
        """Whether Ray Train's own process of this stage was killed; the room of its workers is not given back by itself."""
        return isinstance(self.error, ray.exceptions.RayActorError)

    def problem(self) -> BaseException | None:
        """What fit() raised: what a worker says the user can mend, deaths of workers as TrainingError, else as it is."""
        if self.error is None:
            return None
        if self.lost_its_controller:
            return TrainingError(
                f"stage {self.job.stage.name!r}: Ray Train's controller, a process beside its workers, was killed (memory?);"
                " start the same command again: it goes on from the newest checkpoint"
            )
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


class StageTrainer(TorchTrainer):  # type: ignore[misc]    # Ray has no types
    """Ray Train's, less what it would start beside the workers that no stage uses.

    Ray has no setting for that. A Ray that makes its callbacks elsewhere starts them as before: nothing else changes.
    """

    unused: frozenset[str] = UNUSED

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's own, by their classes' names less `unused`."""
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in self.unused]


def make_trainer(job: StageJob, where: Where, attempt: int) -> TorchTrainer:
    """The Ray Train run of one stage; attempt: of this command, counted from 1."""
    gpu = where.device == "cuda"
    logging.getLogger("ray.train").setLevel(logging.WARNING)      # local mode says at each stage that it is one
    trainer = StageTrainer(
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
    if not where.on_a_cluster:
        trainer.unused = UNUSED_HERE
    return trainer
