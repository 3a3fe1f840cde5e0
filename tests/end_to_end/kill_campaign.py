"""The kill campaign: a small schedule, killed again and again at random moments, must end as if nobody had disturbed it.

    python -m tests.end_to_end.kill_campaign --workers 2 3 --kills 12 --seed 1 --out docs/images

A run is one store and one command, typed again whenever it has ended before its time. A kill is SIGKILL to a worker, to the
command ("driver": what it leaves behind is left alone, and the command typed again at once), or to both at once. Its moment
is uniform over what is left of the life of its target, its parts as long as in the run that nobody disturbed: for the driver
from the first import over training, validation and checkpoints to the registration, for a worker from its own birth.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import psutil

from tests.end_to_end.campaign_figure import write_figure
from tests.end_to_end.campaign_record import Campaign, Kill, Life, Run
from tests.end_to_end.command import SIGKILL, Running, wait_until
from tests.end_to_end.conftest import RECIPE
from tests.end_to_end.outcome import outcome, rows_of
from tests.end_to_end.test_resume import iterations, stage_folder
from tests.pipelines.photo_folders import make_photo_folder
from training.fit import MAX_FAILURES

KINDS = ("worker", "driver", "both")
KILLS_A_RUN = MAX_FAILURES + 1      # the first run has so many of workers alone: all in training, they end a command
EPOCHS = 150                        # of 7 iterations: 18 s on 2 quiet cores, beside 23 s of start and 10 s of evaluation
PATIENCE_S = 1200                   # for anything to happen, on a machine that others use too
LOOK_S = 0.1                        # between two looks at a command: looking takes time from it
JOURNAL_S = 0.5                     # between two steps of the journal, at most
LEFTOVERS_S = 60                    # for the processes of a killed driver to be gone


def campaign(
    photos: Path, folder: Path, *, workers: int, kills: int, seed: int, keep: Callable[[Campaign], None]
) -> Campaign:
    """Trains once undisturbed, and then kills runs until there have been so many kills; raises what a run ends with.

    keep: called after every run with all that there is so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "photos.toml"
    recipe.write_text(RECIPE.format(root=photos, epochs=EPOCHS, every="5 iterations"))
    draws = random.Random(f"{seed} {workers}")
    life = undisturbed_life(recipe, folder / "undisturbed", workers)
    wanted = outcome(folder / "undisturbed")
    total = max(row["iteration"] for row in wanted["history"])
    found = Campaign(workers, seed, total, life, [])
    say(f"{workers} workers, seed {seed}: undisturbed, {total} iterations in {life.whole:.0f} s")
    coming = sorted(islice(cycle(KINDS), kills), key=KINDS.index)
    others = coming[KILLS_A_RUN:]
    draws.shuffle(others)
    coming[KILLS_A_RUN:] = others
    while coming:
        name = f"run-{len(found.runs) + 1}"
        run = disturbed_run(Typist(recipe, folder / name, workers), coming[:KILLS_A_RUN], life, total, draws)
        came_to = outcome(folder / name)
        run.differs = tuple(name for name in wanted if came_to[name] != wanted[name])
        found.runs.append(run)
        for kill in run.kills:
            coming.remove(kill.kind)      # a run that ended before its time leaves kills for another
        say(f"{name}: {run.words()}")
        keep(found)
    return found


def write_record(campaigns: list[Campaign], out: Path) -> None:
    """kill-campaign.json and kill-campaign.svg."""
    records = [one.record() for one in campaigns]
    (out / "kill-campaign.json").write_text(json.dumps(records, indent=1) + "\n")
    write_figure(records, out / "kill-campaign.svg")


def say(line: str) -> None:
    """A line on stdout, at once."""
    print(line, flush=True)


class Typist:
    """Types the command, and again whenever it has ended before its time."""

    def __init__(self, recipe: Path, store: Path, workers: int) -> None:
        """Types it for the first time."""
        self.words = ("train", recipe, "--workers", workers, "--threads", 1, "--store", store)
        self.store, self.run = store, Run(workers, [])
        self.type()

    def type(self) -> None:
        """Starts the command."""
        self.run.commands += 1
        self.typed_at = time.monotonic()
        self.deaths, self.fresh, self.starts_before = 0, True, starts(self.store)
        self.running = Running(*self.words, log=self.store.with_name(f"{self.store.name}-{self.run.commands}.log"))

    def ended(self) -> bool:
        """Whether the command has ended for good; one that says rightly that it should be typed again is typed again."""
        if self.running.process.poll() is None:
            return False
        if self.running.process.returncode == 2:
            said = self.running.output()
            gave_up = self.deaths > MAX_FAILURES and f"its workers died or hung more than {MAX_FAILURES} times" in said
            too_busy = "Ray's processes did not start on this machine" in said
            if gave_up or too_busy:
                self.run.gave_up += gave_up
                self.run.too_busy += too_busy
                self.type()
                return False
        return True

    def has_workers(self) -> bool:
        """Whether Ray Train's workers are there."""
        return bool(self.running.workers())

    def finish(self) -> None:
        """Waits for the end of the last command, which must be a good one."""
        wait_until(self.ended, timeout_s=PATIENCE_S, every_s=LOOK_S)
        code = self.running.process.returncode
        assert code == 0, f"{self.store}, command {self.run.commands} ended with {code}:\n{self.running.output()}"


def undisturbed_life(recipe: Path, store: Path, workers: int) -> Life:
    """Runs the command to its end and looks on."""
    typist = Typist(recipe, store, workers)
    moments = []
    try:
        for condition in (typist.has_workers, lambda: iterations(store) > 0, lambda: result_is_there(store)):
            reached(typist, condition)
            moments.append(time.monotonic())
        typist.finish()
    finally:
        typist.running.kill_everything()
    there, first, result = moments
    return Life(there - typist.typed_at, first - there, result - first, time.monotonic() - result)


def disturbed_run(typist: Typist, kinds: list[str], life: Life, total: int, draws: random.Random) -> Run:
    """One run with a kill of each of these kinds, in their order, or fewer where it ends before a kill's moment."""
    store, run = typist.store, typist.run
    began, starts_at_kill, leftovers = typist.typed_at, [], []
    try:
        for kind in kinds:
            wait_for_moment(typist, kind, draws.random(), life, total)
            victims = typist.running.workers() if kind != "driver" and not typist.ended() else []
            if typist.ended() or (kind != "driver" and not victims):      # they have just ended
                break
            before = starts(store)
            training = before > (starts_at_kill[-1] if starts_at_kill else 0)
            kill = Kill(
                kind=kind,
                second=round(time.monotonic() - began, 2),
                command=run.commands,
                iteration=iterations(store),
                phase="end" if result_is_there(store) else "training" if training else "start",
                writing=any(store.glob("stages/*/checkpoints/.iteration-*.part")),
            )
            family = psutil.Process(typist.running.process.pid).children(recursive=True)
            if victims:
                try:
                    draws.choice(victims).kill()
                except psutil.NoSuchProcess:      # it has ended in this very moment
                    break
                typist.deaths += 1
                typist.fresh = False
            run.kills.append(kill)
            starts_at_kill.append(before)
            if kind != "worker":
                typist.running.send(SIGKILL)
                typist.running.wait()
                leftovers += family
                typist.type()
        typist.finish()
    finally:
        typist.running.kill_everything()
    run.seconds = round(time.monotonic() - began, 1)
    went_on = [row["iteration"] for row in rows_of(stage_folder(store) / "starts.jsonl")]
    for kill, before in zip(run.kills, starts_at_kill, strict=True):
        kill.resumed_from = went_on[before] if before < len(went_on) else None
    wait_until(lambda: not any(map(lives, leftovers)), timeout_s=LEFTOVERS_S)
    return run


def wait_for_moment(typist: Typist, kind: str, share: float, life: Life, total: int) -> None:
    """Waits until this share (0..1) of what is left of the target's life has passed, or the command has ended.

    In training the clock is the iteration (and a part of a second, since the journal is seen in steps), so that a machine
    that others use too moves no moment.
    """
    store = typist.store
    done = iterations(store)
    start = life.workers_start + (life.before_workers if typist.fresh and kind == "driver" else 0.0)
    training = 0.0 if result_is_there(store) else life.training * (1 - done / total)
    point = share * (start + training + (life.after if kind == "driver" else 0.0))
    if kind != "driver":
        reached(typist, typist.has_workers)
    if point < start:
        pause(typist, point)
    elif point < start + training:
        reached(typist, lambda: iterations(store) >= done + (total - done) * (point - start) / training)
        pause(typist, point % JOURNAL_S)
    else:
        reached(typist, lambda: result_is_there(store))
        pause(typist, point - start - training)


def reached(typist: Typist, condition: Callable[[], bool]) -> None:
    """Waits for a condition, or the command's end."""
    wait_until(lambda: typist.ended() or condition(), timeout_s=PATIENCE_S, every_s=LOOK_S)


def pause(typist: Typist, seconds: float) -> None:
    """Lets so much time pass, unless the command ends."""
    moment = time.monotonic() + seconds
    while time.monotonic() < moment and not typist.ended():
        time.sleep(min(0.02, max(0.0, moment - time.monotonic())))


def lives(process: psutil.Process) -> bool:
    """Whether a process still does anything."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def starts(store: Path) -> int:
    """How often workers have begun to train in this store."""
    return sum(path.read_text().count("\n") for path in store.glob("stages/*/starts.jsonl"))


def result_is_there(store: Path) -> bool:
    """Whether the stage has its result."""
    return any(store.glob("stages/*/result.json"))


def main() -> None:
    """The command: see the module's words."""
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.kill_campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="numbers of workers, a campaign each (default: 2)")
    parser.add_argument("--kills", type=int, default=12, help="SIGKILLs in each campaign (default: 12)")
    parser.add_argument("--seed", type=int, default=None, help="of kinds and moments (default: drawn, and printed)")
    parser.add_argument("--out", type=Path, required=True, help="folder for kill-campaign.json and kill-campaign.svg")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    folder = Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    say(f"stores and logs: {folder}")
    photos = make_photo_folder(folder / "photos", per_class=20, split=True, size=(48, 72))
    given.out.mkdir(parents=True, exist_ok=True)
    found: list[Campaign] = []
    for workers in given.workers:
        one = campaign(
            photos,
            folder / f"workers-{workers}",
            workers=workers,
            kills=given.kills,
            seed=seed,
            keep=lambda so_far: write_record([*found, so_far], given.out),
        )
        found.append(one)
    if not all(run.equal for one in found for run in one.runs):
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
