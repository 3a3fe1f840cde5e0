"""The conductor: runs a schedule's stages on Ray Train, side by side where there is room, and answers for how they end.

All is driven from the main thread: it starts stages whose parents are done, passes on what they say, and owns the signals:
the first asks all workers for a checkpoint at their next iteration, a second one ends at once.
"""

import logging
import time
from collections.abc import Sequence

import ray

from pipelines.manifest import Manifest
from training.listener import Listener
from training.parents import check_parents, is_done, parent_of, stage_colour
from training.ray_start import start_ray
from training.stage_run import StageRun
from training.stop_switch import STOP_WAIT_S, Interrupted, StopSwitch
from training.where import Where, cores
from training.worker_count import most
from vggcore.errors import TrackingError, TrainingError, VggrowError
from vggcore.schedule import Stage

logger = logging.getLogger(__name__)

POLL_S = 0.2
COUNT_S = 5.0             # how often we ask the cluster how much room it has: nodes come and go


def train_schedule(
    stages: Sequence[Stage], keys: dict[str, str], manifest: Manifest, where: Where, listener: Listener
) -> None:
    """Trains every stage that is not done, parents first, as many at once as there is room for; stages: settled.

    A stage that fails stops no other; those that start from it are left out, and its error is raised at the end. Raises
    VggrowError, or Interrupted after a signal.
    """
    check_parents(stages, where.store, manifest.classes)
    with StopSwitch() as switch:
        crew = Crew(stages, keys, manifest, where, listener, switch)
        try:
            while crew.waiting or crew.running:
                crew.start_what_can()
                crew.look_after()
                if switch.stopped and not crew.running:
                    break
            if crew.stopped or crew.waiting:
                raise Interrupted
        except BaseException as error:
            crew.end_all(error)
            raise
    if crew.errors:
        raise next(iter(crew.errors.values()))


class Crew:
    """The stages that wait, run and have failed."""

    def __init__(
        self,
        stages: Sequence[Stage],
        keys: dict[str, str],
        manifest: Manifest,
        where: Where,
        listener: Listener,
        switch: StopSwitch,
    ) -> None:
        """Passes over what is done."""
        self.stages, self.keys, self.manifest = stages, keys, manifest
        self.where, self.listener, self.switch = where, listener, switch
        self.waiting = {stage.name: stage for stage in stages}
        self.running: dict[str, StageRun] = {}
        self.errors: dict[str, BaseException] = {}       # of failed stages and, the same, of those left out for them
        self.counted_at, self.room = -COUNT_S, 1
        self.taken = 0           # rooms of stages whose controller was killed here: Ray has them until it is started anew
        self.stopped = False                             # a stage was stopped by a signal
        for stage in stages:
            if is_done(where.store, keys[stage.name]):
                del self.waiting[stage.name]
                listener.stage_begins(stage, keys[stage.name], done=True)

    def start_what_can(self) -> None:
        """Starts the stages, in the recipe's order, whose parents are done, while there is room."""
        for stage in list(self.waiting.values()):
            if self.switch.stopped or len(self.running) >= self.slots():
                return
            parent = stage.init_from
            if parent in self.errors:
                del self.waiting[stage.name]
                self.errors[stage.name] = self.errors[parent]
                self.listener.stage_left_out(stage, self.keys[stage.name], f"not started: {parent} failed")
            elif parent not in self.waiting and parent not in self.running:
                self.start(stage)

    def start(self, stage: Stage) -> None:
        """Starts a stage; what keeps it from starting is its error."""
        del self.waiting[stage.name]
        key, where, manifest = self.keys[stage.name], self.where, self.manifest
        try:
            parent = parent_of(stage, self.stages, self.keys, where.store, manifest.classes)
            colour = stage_colour(stage, self.keys, where.store, manifest.colour)
        except VggrowError as error:      # what it starts from was removed while others trained
            self.errors[stage.name] = error
            self.listener.stage_left_out(stage, key, f"not started: {error}")
            logger.info("stage %s: %s", stage.name, error)
            return
        run = StageRun(stage, key, parent, colour, manifest, where, self.listener)
        self.running[stage.name] = run
        self.switch.on_stop = self.ask_all_to_stop
        try:
            run.begin()
        except Exception as error:
            self.close(run, error)
            return
        if self.switch.stopped:          # the signal came while it began
            run.ask_to_stop()

    def slots(self) -> int:
        """How many stages there is room for: by the CPUs, or GPUs, that Ray has; one where no Ray is needed."""
        where = self.where
        if where.in_this_process:
            return 1
        if self.taken and not self.running:
            ray.shutdown()
            self.taken, self.counted_at = 0, -COUNT_S
        if not ray.is_initialized():
            # Here, in the main thread: Ray's processes die with the thread that started them (PR_SET_PDEATHSIG).
            one = most(where.workers) * where.threads
            cpus = max(one, min(cores() // one, len(self.waiting)) * one)
            start_ray(
                where.store,
                address=where.address,
                cpus=cpus,
                stall_s=where.stall_s,
                elastic=isinstance(where.workers, tuple),
            )
            self.switch.take_signals()      # Ray puts a handler of its own on SIGTERM, which aborts the process
        if time.monotonic() - self.counted_at > COUNT_S:
            self.counted_at = time.monotonic()
            name, each = ("GPU", 1) if where.device == "cuda" else ("CPU", where.threads)
            have = ray.cluster_resources().get(name, 0.0)
            self.room = max(1, int(have // (each * most(where.workers))))
        return self.room - self.taken

    def look_after(self) -> None:
        """Passes on what running stages say, and closes those that are over."""
        if self.running:
            time.sleep(POLL_S)
        for run in list(self.running.values()):
            if run.poll():
                self.close(run, run.problem())
        if self.switch.overdue:
            raise Interrupted

    def close(self, run: StageRun, problem: BaseException | None) -> None:
        """Ends a stage that is over: finished, failed, or stopped by a signal."""
        stage, done = run.stage, is_done(self.where.store, run.key)
        del self.running[stage.name]
        if run.lost_its_controller and not self.where.on_a_cluster:
            self.taken += 1
        if problem is None and not done and not self.switch.stopped:
            problem = TrainingError(f"stage {stage.name!r}: its workers ended without a result; start the same command again")
        status = "FINISHED" if done else "FAILED" if problem is not None else "KILLED"
        run.say_end(status, problem)
        try:
            if problem is not None:
                self.errors[stage.name] = problem
                logger.info("stage %s: %s", stage.name, problem)
            self.stopped = self.stopped or status == "KILLED"
            if run.begun:
                self.listener.stage_ends(stage, run.key, status)
        except TrackingError as further:
            if problem is None:
                raise
            logger.warning("stage %s: its end is not recorded (%s)", stage.name, further)
        finally:
            run.let_go()

    def ask_all_to_stop(self) -> None:
        """Asks the workers of every running stage for a checkpoint and their end."""
        for run in self.running.values():
            run.ask_to_stop()

    def end_all(self, error: BaseException) -> None:
        """Ends what still runs when the schedule cannot go on: after a second signal, a stop that takes too long, an error."""
        if self.running and not isinstance(error, Interrupted):
            self.ask_all_to_stop()
            deadline = time.monotonic() + STOP_WAIT_S
            while time.monotonic() < deadline and any(run.is_at_work for run in self.running.values()):
                time.sleep(POLL_S)
        if self.running and ray.is_initialized():
            ray.shutdown()
        for run in list(self.running.values()):
            del self.running[run.stage.name]
            run.say_end("KILLED", error)
            run.let_go()
            if run.begun:
                try:
                    self.listener.stage_ends(run.stage, run.key, "KILLED")
                except Exception as further:
                    logger.warning("stage %s: its end is not recorded (%s)", run.stage.name, further)
