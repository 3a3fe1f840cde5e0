"""The kill campaign: a small schedule, killed again and again at random moments, must end as if nobody had disturbed it.

    python -m tests.end_to_end.kill_campaign --workers 2 3 --kills 12 --seed 1 --out docs/images

A run is one store and one command, typed again whenever it has ended before its time. A kill is SIGKILL to a worker, to the
command ("driver": what it leaves behind is left alone, and the command typed again at once), or to both at once. Its moment
is uniform over what is left of the life of its target, as long as that was in the run that nobody disturbed: for the driver
from the first import over training, validation and checkpoints to the registration, for a worker from its own birth.
"""

import argparse
import dataclasses
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from tests.end_to_end.command import SIGKILL, Running, wait_until
from tests.end_to_end.conftest import RECIPE
from tests.end_to_end.test_resume import iterations, mlflow_points, run_statuses, stage_folder, weights
from tests.pipelines.photo_folders import make_photo_folder
from training.stage_run import MAX_FAILURES

KINDS = ("driver", "both", "worker")
KILLS_A_RUN = 4
FIRST_RUN = MAX_FAILURES + 3        # of workers alone: deaths in training beyond MAX_FAILURES end a command, in a start not
EPOCHS = 150                        # of 7 iterations: 18 s on 2 quiet cores, beside 23 s of start and 10 s of evaluation
PATIENCE_S = 600                    # for anything to happen, on a machine that others use too
LEFTOVERS_S = 60                    # for the processes of a killed driver to be gone
METRICS = ("train_loss", "epoch", "val_loss", "val_top1_accuracy", "learning_rate")


@dataclass(frozen=True)
class Life:
    """How long the parts of an undisturbed command took, in seconds."""

    before_workers: float    # until its workers were there
    workers_start: float     # from then until the first iteration
    training: float          # validation and checkpoints among it
    after: float             # evaluation, package, registration

    @property
    def whole(self) -> float:
        """From its start to its end."""
        return self.before_workers + self.workers_start + self.training + self.after


@dataclass
class Kill:
    """One kill, as it was found and as the run went on from it."""

    kind: str                          # of KINDS
    second: float                      # since the run's first command began
    command: int                       # the how manieth command of the run it hit, from 1
    iteration: int                     # reached, as the journal had it (half a second old at most)
    phase: str                         # "start" (or restart of workers), "training", "end" (of the stage and after)
    writing: bool                      # a checkpoint was being written
    resumed_from: int | None = None    # iteration; None: nothing was left to train


@dataclass
class Run:
    """One store from its first command to its result."""

    workers: int
    kills: list[Kill]
    commands: int = 1
    gave_up: int = 0                   # commands that ended with exit 2 since workers died too often
    seconds: float = 0.0
    leftover_s: float = 0.0            # the longest that a killed driver's processes outlived it, looked at between kills
    differs: tuple[str, ...] = ()      # what was not as in the undisturbed run

    @property
    def equal(self) -> bool:
        """Whether it ended like the run that nobody disturbed."""
        return not self.differs


@dataclass
class Campaign:
    """All runs at one number of workers."""

    workers: int
    seed: int
    iterations: int
    undisturbed: Life
    runs: list[Run]

    @property
    def kills(self) -> list[Kill]:
        """Those of all runs."""
        return [kill for run in self.runs for kill in run.kills]

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self) | {"equal": [run.equal for run in self.runs]}


def campaign(photos: Path, folder: Path, *, workers: int, kills: int, seed: int) -> Campaign:
    """Trains once undisturbed, and then kills runs until there have been so many kills; raises what a run ends with."""
    folder.mkdir(parents=True)
    recipe = folder / "photos.toml"
    recipe.write_text(RECIPE.format(root=photos, epochs=EPOCHS, every="5 iterations"))
    draws = random.Random(f"{seed} {workers}")
    life = undisturbed_life(recipe, folder / "undisturbed", workers)
    wanted = outcome(folder / "undisturbed")
    total = max(row["iteration"] for row in wanted["history"])
    found = Campaign(workers, seed, total, life, [])
    say(f"{workers} workers, seed {seed}: undisturbed, {total} iterations in {life.whole:.0f} s")
    coming = ["worker"] * min(FIRST_RUN, kills)
    coming += shuffled(list(islice(cycle(KINDS), kills - len(coming))), draws)
    while coming:
        store = folder / f"run-{len(found.runs) + 1}"
        most = KILLS_A_RUN if found.runs else FIRST_RUN
        run = disturbed_run(recipe, store, workers, coming[:most], life, total, draws)
        reached = outcome(store)
        run.differs = tuple(name for name in wanted if reached[name] != wanted[name])
        found.runs.append(run)
        for kill in run.kills:
            coming.remove(kill.kind)      # a run that ended before its time leaves kills for another
        say(f"{store.name}: {', '.join(map(told, run.kills))}; {run.seconds:.0f} s, {run.commands} commands: {verdict(run)}")
    return found


def say(line: str) -> None:
    """A line on stdout, at once."""
    print(line, flush=True)


def shuffled(kinds: list[str], draws: random.Random) -> list[str]:
    """In a drawn order."""
    draws.shuffle(kinds)
    return kinds


def told(kill: Kill) -> str:
    """A kill in words."""
    return f"{kill.kind} at {kill.second:.1f} s ({kill.phase}, iteration {kill.iteration}, on from {kill.resumed_from})"


def verdict(run: Run) -> str:
    """How a run ended, in words."""
    return "equal" if run.equal else f"NOT EQUAL in {', '.join(run.differs)}"


def command(recipe: Path, store: Path, workers: int, number: int) -> Running:
    """The command, as it is typed each time."""
    log = store.with_name(f"{store.name}-{number}.log")
    return Running("train", recipe, "--workers", workers, "--threads", 1, "--store", store, log=log)


def undisturbed_life(recipe: Path, store: Path, workers: int) -> Life:
    """Runs the command to its end and looks on."""
    began = time.monotonic()
    running = command(recipe, store, workers, 1)
    moments = []
    try:
        for condition in (running.workers, lambda: iterations(store) > 0, lambda: result_is_there(store)):
            wait_until(lambda condition=condition: bool(condition()), timeout_s=PATIENCE_S, running=running)
            moments.append(time.monotonic() - began)
        code = running.wait(PATIENCE_S)
    finally:
        running.kill_everything()
    assert code == 0, running.output()
    there, first, result = moments
    return Life(there, first - there, result - first, time.monotonic() - began - result)


def disturbed_run(
    recipe: Path, store: Path, workers: int, kinds: list[str], life: Life, total: int, draws: random.Random
) -> Run:
    """One run with a kill of each of these kinds, in their order, or fewer where it ends before a kill's moment."""
    run, leftovers = Run(workers, []), []
    began = time.monotonic()
    running, deaths, fresh, at_start = command(recipe, store, workers, 1), 0, True, 0
    starts_at_kill: list[int] = []
    try:
        for kind in kinds:
            share = draws.random()
            while True:
                over = wait_for_moment(running, kind, share, fresh, life, iterations(store) / total)
                if not over or not gave_up(running, deaths):
                    break
                run.gave_up += 1
                run.commands += 1
                running, deaths, fresh, at_start = command(recipe, store, workers, run.commands), 0, True, starts(store)
            if over:
                break
            victims = running.workers() if kind != "driver" else []
            if kind != "driver" and not victims:      # they have just ended
                break
            run.kills.append(
                Kill(
                    kind=kind,
                    second=round(time.monotonic() - began, 2),
                    command=run.commands,
                    iteration=iterations(store),
                    phase="end" if result_is_there(store) else "training" if starts(store) > at_start else "start",
                    writing=any(store.glob("stages/*/checkpoints/.iteration-*.part")),
                )
            )
            starts_at_kill.append(starts(store))
            family = psutil.Process(running.process.pid).children(recursive=True)
            if victims:
                draws.choice(victims).kill()
                deaths += 1
            fresh, at_start = False, starts(store)
            if kind != "worker":
                running.send(SIGKILL)
                running.wait()
                leftovers += family
                run.commands += 1
                running, deaths, fresh = command(recipe, store, workers, run.commands), 0, True
        code = running.wait(PATIENCE_S)
        while gave_up(running, deaths):
            run.gave_up += 1
            run.commands += 1
            running, deaths = command(recipe, store, workers, run.commands), 0
            code = running.wait(PATIENCE_S)
        assert code == 0, f"{store}, command {run.commands}:\n{running.output()}"
    finally:
        running.kill_everything()
    run.seconds = round(time.monotonic() - began, 1)
    went_on = [row["iteration"] for row in rows_of(stage_folder(store) / "starts.jsonl")]
    for kill, before in zip(run.kills, starts_at_kill, strict=True):
        kill.resumed_from = went_on[before] if before < len(went_on) else None
    wait_until(lambda: not any(map(lives, leftovers)), timeout_s=LEFTOVERS_S)
    return run


def wait_for_moment(running: Running, kind: str, share: float, fresh: bool, life: Life, progress: float) -> bool:
    """Waits until this share (0..1) of what is left of the target's life has passed; whether the command has ended before.

    fresh: the command has just been typed; else its workers have just been killed. progress: share of the iterations done.
    """
    left = life.workers_start + life.training * (1 - progress)
    if kind == "driver":
        left += life.after + (life.before_workers if fresh else 0.0)
    else:
        patience = time.monotonic() + PATIENCE_S
        while not running.workers():
            if running.process.poll() is not None:
                return True
            assert time.monotonic() < patience, f"no worker for {PATIENCE_S} s:\n{running.output()}"
            time.sleep(0.1)
    moment = time.monotonic() + share * left
    while time.monotonic() < moment and running.process.poll() is None:
        time.sleep(min(0.02, max(0.0, moment - time.monotonic())))
    return running.process.poll() is not None


def gave_up(running: Running, deaths: int) -> bool:
    """Whether the command has ended with its one line about workers that die too often, and rightly."""
    return (
        running.process.poll() == 2
        and deaths > MAX_FAILURES
        and f"its workers died more than {MAX_FAILURES} times" in running.output()
    )


def lives(process: psutil.Process) -> bool:
    """Whether a process still does anything."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Every line of a journal; an unfinished one is an error."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def starts(store: Path) -> int:
    """How often workers have begun to train in this store."""
    return sum(path.read_text().count("\n") for path in store.glob("stages/*/starts.jsonl"))


def result_is_there(store: Path) -> bool:
    """Whether the stage has its result."""
    return any(store.glob("stages/*/result.json"))


def outcome(store: Path) -> dict[str, Any]:
    """All that must be the same however often a run was killed; clocks and names of machines left out."""
    folder = stage_folder(store)
    result = json.loads((folder / "result.json").read_text())
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("photos").experiment_id])
    versions = client.search_model_versions("name = 'photos'")
    return {
        "weights": weights(store),
        "optimiser": (folder / "checkpoints" / result["checkpoint"] / "optimizer.pt").read_bytes(),
        "history": list(without_clocks(rows_of(folder / "history.jsonl"))),
        "MLflow's points": {metric: mlflow_points(store, metric) for metric in METRICS},
        "MLflow's clocks": [step for step, _ in mlflow_points(store, "seconds")],
        "MLflow's runs": run_statuses(store),
        "MLflow's parameters": sorted(sorted(run.data.params.items()) for run in runs),
        "test's figures": sorted(sorted(tests_figures(run.data.metrics)) for run in runs),
        "versions": [(version.version, version.aliases) for version in versions],
    }


def tests_figures(metrics: dict[str, float]) -> Iterator[tuple[str, float]]:
    """What a run has measured on the test split."""
    return ((name, value) for name, value in metrics.items() if name.startswith("test_"))


def without_clocks(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of a history without what no two runs have in common."""
    for row in rows:
        yield {name: value for name, value in row.items() if name not in ("seconds", "checkpoint_seconds")}


def main() -> None:
    """The command: see the module's words."""
    from tests.end_to_end.campaign_figure import write_figure

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
        found.append(campaign(photos, folder / f"workers-{workers}", workers=workers, kills=given.kills, seed=seed))
        records = [one.record() for one in found]
        (given.out / "kill-campaign.json").write_text(json.dumps(records, indent=1) + "\n")
        write_figure(records, given.out / "kill-campaign.svg")
    if not all(run.equal for one in found for run in one.runs):
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
