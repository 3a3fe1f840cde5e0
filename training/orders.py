"""What the workers of a stage are told while they train: to stop, or that a node of theirs is about to be taken away."""

import time

import ray.train

from training.stage_job import StageJob
from training.store import Store, stop_requested
from training.team import Team

ASK_EVERY_S = 2.0            # how often Ray is asked for a preemption notice: all workers wait for one another there
LAST_CHECKPOINTS_S = 10.0    # how often a checkpoint is written once a node is about to go


class Orders:
    """Rank 0 looks, all act on the same iteration: its flags travel with the sum of the losses."""

    def __init__(self, job: StageJob, team: Team) -> None:
        """Nothing is asked yet."""
        self.job, self.team, self.store = job, team, Store(job.store)
        self.asked_at = time.monotonic()
        self.leaving = False         # a node of ours is about to be taken away

    def flags(self) -> tuple[float, float]:
        """What rank 0 wants of all: to stop, to ask Ray; 0 elsewhere."""
        if self.team.rank != 0:
            return 0.0, 0.0
        stop = stop_requested(self.store, self.job.lock, self.job.fence)
        ask = self.job.preemptible and not self.leaving and time.monotonic() - self.asked_at > ASK_EVERY_S
        return float(stop), float(ask)

    def heed(self, ask: float) -> bool:
        """After the flags were summed: whether a notice has just come, the same in every worker."""
        if not ask:
            return False
        self.asked_at = time.monotonic()
        self.leaving = ray.train.get_preemption_info() is not None
        return self.leaving
