"""`vggrow bench recovery`: how soon a command trains, and trains again after a kill, beside bare Ray Train in the same run.

Real processes in turns. A step counts when its row is on disk; all contenders write their rows by one HistoryWriter, so
that all pay the same for it.
"""

import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from training.bench_subject import Subject, subject
from training.history import parse_rows, read_history
from training.processes import Command, environment_without
from training.ray_start import QUIET_AND_QUICK
from vggcore.recipe import Recipe
from vggcore.schedule import Stage

EVERY = 20                    # iterations between checkpoints, of all contenders
LIMIT_S = 600.0               # for the longest step of a machine that is busy
EPOCHS = 10**6                # no stage ends while it is watched
MEASURES = {
    "first_step": "command to first step",
    "new_store": "the same, in a new store",
    "worker": "worker killed, to the first new step",
    "command": "all killed and typed again, to the first new step",
}
OURS, DEFAULTS, QUICK = "vggrow", "bare", "bare_quick"
NAMES = {OURS: "vggrow train", DEFAULTS: "bare Ray Train", QUICK: "the same, our variables"}


@dataclass(frozen=True)
class Recovery(Subject):
    """Seconds by contender and measure, one a turn; `repeated` the iterations made a second time after a killed worker."""

    workers: int
    turns: int
    seconds: dict[str, dict[str, list[float]]]
    repeated: dict[str, list[int]]

    def median(self, contender: str, measure: str) -> float | None:
        """Seconds; None where it is no measure of this contender: bare Ray Train has no store."""
        found = self.seconds[contender].get(measure)
        return statistics.median(found) if found else None

    def ratio(self, measure: str, other: str) -> float:
        """Ours over another contender's; a start in a new store stands beside its plain start."""
        ours, theirs = self.median(OURS, measure), self.median(other, "first_step" if measure == "new_store" else measure)
        assert ours is not None and theirs is not None, "every measure has ours and theirs"
        return ours / theirs

    def to_json(self) -> dict[str, Any]:
        """Plain values, with medians and ratios."""
        return asdict(self) | {
            "medians": {name: {one: self.median(name, one) for one in MEASURES} for name in self.seconds},
            "ratios": {one: {name: self.ratio(one, name) for name in (DEFAULTS, QUICK)} for one in MEASURES},
        }


class Contender:
    """One command that can be started again and again, and where it writes what it does."""

    def __init__(self, words: Sequence[str], environment: dict[str, str], root: Path, folder: str) -> None:
        """folder: a pattern below `root` for the folder of history.jsonl and starts.jsonl, which may not be there yet."""
        self.words, self.environment, self.root, self.folder = words, environment, root, folder
        self.command: Command | None = None

    def start(self) -> Command:
        """The command as a process of its own, after the one before is gone."""
        self.kill()
        self.command = Command(self.words, environment=self.environment, log=self.root / "log")
        return self.command

    def running(self) -> Command:
        """The command that start() started."""
        assert self.command is not None, "started before it is watched"
        return self.command

    def kill(self) -> None:
        """Ends the command and all that it has started."""
        if self.command is not None:
            self.command.kill()
            self.command = None

    def file(self, name: str) -> Path:
        """A file of what it trains."""
        return next(self.root.glob(self.folder), self.root / "nothing yet") / name

    def reached(self) -> int:
        """The highest iteration on disk; 0 before the first."""
        return max((row["iteration"] for row in read_history(self.file("history.jsonl"))), default=0)

    def starts(self) -> list[int]:
        """The iteration that workers went on from, at each of their starts."""
        path = self.file("starts.jsonl")
        rows = parse_rows(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
        return [row["iteration"] for row in rows]


def measure(
    recipe: Recipe,
    stage: Stage,
    *,
    command: Sequence[str],
    workers: int,
    threads: int,
    turns: int,
    say: Callable[[str], None],
) -> Recovery:
    """Measures a stage of a recipe, from random weights, in a temporary folder that is removed.

    command: how vggrow is started. workers: 2 at least. threads: CPU threads a worker. say: hears each figure. Raises
    TrainingError when a command ends by itself or does not train.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in NAMES}
    repeated: dict[str, list[int]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory(prefix="vg-", ignore_cleanup_errors=True) as scratch:
        for turn in range(turns):
            for name in [*NAMES, *NAMES][turn % len(NAMES) :][: len(NAMES)]:      # each is first in some turn
                root = Path(scratch) / "0"            # short: Ray puts sockets below it, whose paths have 107 characters
                root.mkdir()

                def hear(what: str, found: float, name: str = name, turn: int = turn) -> None:
                    seconds[name].setdefault(what, []).append(found)
                    say(f"turn {turn + 1} of {turns}, {NAMES[name]}: {MEASURES[what]}: {found:.1f} s")

                if name == OURS:
                    contender = our_contender(root, command, workers, threads)
                else:
                    contender = bare_contender(root, stage, workers, threads, quick=name == QUICK)
                try:
                    if name == OURS:
                        start_in_a_new_store(contender, recipe, stage, hear)
                    repeated[name].append(one_turn(contender, turn, hear))
                finally:
                    contender.kill()
                shutil.rmtree(root)
    return Recovery(
        **vars(subject(stage, threads=threads, device="cpu")),
        workers=workers,
        turns=turns,
        seconds=seconds,
        repeated=repeated,
    )


def our_contender(root: Path, command: Sequence[str], workers: int, threads: int) -> Contender:
    """`vggrow train` on root/recipe.toml."""
    words = ["train", str(root / "recipe.toml"), "--workers", str(workers), "--threads", str(threads), "--device", "cpu"]
    return Contender([*command, *words, "--store", str(root / "store")], clean_environment(root), root, "store/stages/*")


def bare_contender(root: Path, stage: Stage, workers: int, threads: int, *, quick: bool) -> Contender:
    """training.bare_ray_train; quick: with our environment variables for Ray."""
    folder = root / "bare"
    folder.mkdir()
    (folder / "stage.json").write_text(stage.model_dump_json(), encoding="utf-8")
    words = [sys.executable, "-m", "training.bare_ray_train", str(folder), "--every", str(EVERY)]
    settings = QUIET_AND_QUICK if quick else {}
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}      # else Ray would write one to the home folder
    return Contender(
        [*words, "--workers", str(workers), "--threads", str(threads)],
        clean_environment(root) | settings | token,
        root,
        "bare",
    )


def clean_environment(root: Path) -> dict[str, str]:
    """The caller's, without its stores, clusters and Ray settings; Ray's files and all temporary ones go below `root`."""
    ours = ("VGGROW_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return environment_without(*ours, *QUIET_AND_QUICK) | {"RAY_TMPDIR": str(root), "TMPDIR": str(root)}


def recipe_text(recipe: Recipe, stage: Stage, number: int) -> str:
    """The recipe with one stage alone, from random weights and without an end; another `number` is another stage key."""
    tables = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    for name in ("schedule", "evaluate", "register"):
        tables.pop(name, None)
    (table,) = (one for one in recipe.stages if one.name == stage.name)
    written = table.model_dump(mode="json", exclude_none=True, exclude={"init_from"})
    tables["stage"] = [written | {"max_epochs": EPOCHS + number, "patience": EPOCHS}]
    tables["train"] = tables.get("train", {}) | {"checkpoint_every": f"{EVERY} iterations"}
    return tomli_w.dumps(tables)


def start_in_a_new_store(contender: Contender, recipe: Recipe, stage: Stage, hear: Callable[[str, float], None]) -> None:
    """Times the first command in a new store, to its first step, and leaves a store in which a new stage will begin."""
    path = contender.root / "recipe.toml"
    path.write_text(recipe_text(recipe, stage, 0), encoding="utf-8")
    hear("new_store", first_step(contender))
    contender.kill()
    shutil.rmtree(contender.root / "store" / "stages")
    path.write_text(recipe_text(recipe, stage, 1), encoding="utf-8")


def one_turn(contender: Contender, turn: int, hear: Callable[[str, float], None]) -> int:
    """Starts, kills a worker, kills all and starts again; gives the iterations made a second time after the worker's death."""
    hear("first_step", first_step(contender))
    train_on(contender)
    command = contender.running()
    before, workers = len(contender.starts()), command.workers()
    began = time.monotonic()
    workers[turn % len(workers)].kill()
    ended, repeated = first_new_step(contender, before)
    hear("worker", ended - began)
    train_on(contender)
    before = len(contender.starts())
    contender.kill()
    began = contender.start().began
    hear("command", first_new_step(contender, before)[0] - began)
    contender.kill()
    return repeated


def first_step(contender: Contender) -> float:
    """Starts the command; seconds to its first step."""
    command = contender.start()
    return command.wait_for(lambda: contender.reached() >= 1, "the first step", limit_s=LIMIT_S) - command.began


def train_on(contender: Contender) -> None:
    """Waits until training stands halfway between two checkpoints, so that all lose as much by a kill."""
    goal = (contender.reached() // EVERY + 1) * EVERY + EVERY // 2
    contender.running().wait_for(lambda: contender.reached() >= goal, f"iteration {goal}", limit_s=LIMIT_S)


def first_new_step(contender: Contender, before: int) -> tuple[float, int]:
    """Waits for new workers and their first step beyond all that was done; time.monotonic(), iterations made again.

    before: how often workers had started. The last rows of those that died may still appear until the new ones start.
    """
    command, highest = contender.running(), contender.reached()

    def restarted() -> bool:
        nonlocal highest
        if len(contender.starts()) > before:
            return True
        highest = max(highest, contender.reached())
        return False

    command.wait_for(restarted, "workers that start again", limit_s=LIMIT_S)
    ended = command.wait_for(lambda: contender.reached() > highest, "the first new step", limit_s=LIMIT_S)
    return ended, highest - contender.starts()[-1]


def recovery_text(found: Recovery) -> str:
    """For a person: medians, and ours as a multiple of bare Ray Train's."""
    lines = [
        f"{found.first_line()}, {found.workers} workers; medians of {found.turns} turns, in seconds; in brackets: vggrow /"
        " that one",
        f"{'':50}" + "".join(f"{name:>26}" for name in NAMES.values()),
    ]
    for what, words in MEASURES.items():
        cells = []
        for name in NAMES:
            seconds = found.median(name, what)
            ratio = "" if name == OURS else f"({found.ratio(what, name):.2f})"
            cells.append(f"{'-' if seconds is None else f'{seconds:.1f}'} {ratio:>6}")
        lines.append(f"{words:50}" + "".join(f"{cell:>26}" for cell in cells))
    again = [f"{statistics.median(found.repeated[name]):.0f} {'':6}" for name in NAMES]
    lines.append(f"{'iterations made again after the worker':50}" + "".join(f"{cell:>26}" for cell in again))
    lines.append(found.last_line())
    return "\n".join(lines)
