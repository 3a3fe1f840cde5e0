"""One tick of a retraining pipeline: scan, decide, train, evaluate, register, gate, promote, notify; each step a record.

A tick that was killed anywhere is taken up by the next call and ends as an undisturbed one would: what a step did before
its record was written is done again and changes nothing (docs/adr/0007-the-tick.md says why for each).
"""

import datetime
from collections.abc import Callable

from mlflow import MlflowClient
from rich.console import Console

from deploy.gate import bare
from deploy.gate_classes import new_class_text
from deploy.notify import FIRST_WAIT_S, read_secret
from deploy.pipeline_file import Pipeline
from deploy.signals import Signals
from deploy.tick_end import ask_gate, fail, supersede, tell, tell_waiting
from deploy.tick_look import look, recipe_digest, scan_and_decide
from deploy.tick_train import PicturesChanged, run_schedule, where_of
from deploy.tick_work import Work
from deploy.ticks import NOTHING_NEW, STOP, TRAIN, Tick, facts_of
from deploy.tracking_address import check_tracking, make_database, resolve_tracking
from training.store import Store, hold, open_store
from training.where import check_where
from vggcore.errors import DatasetError, VggrowError
from vggcore.recipe import Recipe, parse_recipe
from vggcore.schedule import resolve_stages

STARTS = 3               # how often a call begins anew because pictures changed while it worked


def utc_now() -> datetime.datetime:
    """The clock, unless a caller brings another."""
    return datetime.datetime.now(datetime.UTC)


def retrain(
    pipeline: Pipeline,
    *,
    dry_run: bool = False,
    accept: str | None = None,
    clock: Callable[[], datetime.datetime] = utc_now,
    first_wait_s: float = FIRST_WAIT_S,
) -> Tick:
    """Runs one tick, or finishes the one that was broken off, and gives it.

    dry_run: scans and decides; records nothing, trains nothing, tells nobody. accept: why data that got worse is trained on
    all the same. clock: what time it is, with a time zone.
    Raises VggrowError for what the user can mend, training.run.Interrupted after a signal; the same call goes on there.
    A tick that stopped because the data got worse is finished and returned: its outcome says so.
    """
    text = pipeline.recipe.read_text(encoding="utf-8")
    recipe = parse_recipe(text, place=str(pipeline.recipe), folder=pipeline.recipe.parent)
    check_run(pipeline, recipe)
    secret = read_secret(pipeline.notify) if pipeline.notify is not None else None
    store = open_store(pipeline.run.store)
    tracking = resolve_tracking(pipeline.run.tracking, store.root)
    check_tracking(tracking)
    make_database(tracking)
    with Signals() as signals, hold(store, f"retrain-{pipeline.name}", what=f"pipeline {pipeline.name!r}"):
        work = Work(
            pipeline=pipeline,
            recipe=recipe,
            recipe_text=text,
            rules=pipeline.gate.rules(),
            store=store,
            tracking=tracking,
            client=MlflowClient(tracking),
            secret=secret,
            accept=accept,
            clock=clock,
            signals=signals,
            console=Console(stderr=True, highlight=False),
            first_wait_s=first_wait_s,
        )
        if dry_run:
            return rehearse(work)
        tell_waiting(work)
        for left in reversed(range(STARTS)):
            tick = begin(work)
            try:
                return walk(work, tick)
            except (PicturesChanged, DatasetError) as error:
                if not left:
                    raise DatasetError(
                        f"pipeline {pipeline.name!r}: the pictures keep changing ({error}); try again later"
                    ) from error
                supersede(work, tick, f"the pictures changed while the tick was at work ({error})")
            except VggrowError as error:
                fail(work, tick, error)
                raise
    raise AssertionError


def check_run(pipeline: Pipeline, recipe: Recipe) -> None:
    """Refuses what [run] asks for and this machine has not got, before the tick begins. Raises RecipeError, DeviceError."""
    try:
        check_where(where_of(pipeline, Store(pipeline.run.store)), resolve_stages(recipe))
    except VggrowError as error:
        words = str(error)
        for option in ("--workers", "--device", "--address"):
            words = words.replace(option, f"[run] {option.removeprefix('--')}")
        raise type(error)(f"pipeline {pipeline.name!r}: {words}") from error


def begin(work: Work) -> Tick:
    """The unfinished tick, unless the recipe or the rules have changed since it decided; else a new one without records."""
    ticks = work.ticks.all()
    number_of_next = ticks[-1].number + 1 if ticks else 1
    if not ticks or ticks[-1].finished:
        return Tick(number_of_next)
    tick = ticks[-1]
    decided = tick.records.get("decide")
    if decided is None or decided["verdict"] != TRAIN or "register" in tick.records:
        return tick
    before = facts_of(tick)
    if (before.recipe, dict(before.rules)) == (recipe_digest(work.recipe), work.rule_facts):
        return tick
    supersede(work, tick, "the recipe or the gate rules changed before anything was registered")
    return Tick(number_of_next)


def walk(work: Work, tick: Tick) -> Tick:
    """Takes the steps that have no record yet, in order."""
    if "decide" not in tick.records:
        tick = scan_and_decide(work, tick)
    if tick.records["decide"]["verdict"] == TRAIN:
        if "register" not in tick.records:
            tick = run_schedule(work, tick)
        with work.signals.held_back():
            if "promote" not in tick.records:
                tick = ask_gate(work, tick)
    with work.signals.held_back():
        return tell(work, tick)


def rehearse(work: Work) -> Tick:
    """What a tick would do now: an unrecorded one, or the unfinished one as it stands."""
    ticks = work.ticks.all()
    if ticks and not ticks[-1].finished:
        return ticks[-1]
    scanned, decided = look(work)
    at = {"at": work.clock().isoformat()}
    return Tick(ticks[-1].number + 1 if ticks else 1, {"scan": at | scanned, "decide": at | decided})


def tick_text(tick: Tick) -> list[str]:
    """A tick for a person, a line each."""
    lines = [f"tick {tick.number}: {tick.outcome} ({bare(tick.reason)})"]
    decided = tick.records.get("decide", {})
    if not tick.finished and decided:
        what = {TRAIN: "would train", NOTHING_NEW: "nothing new", STOP: "would stop"}[decided["verdict"]]
        lines = [f"tick {tick.number}: {what}"]
    lines += [f"new: {reason}" for reason in decided.get("reasons", ())]
    start = decided.get("start") or {}
    if decided.get("verdict") == TRAIN and start.get("stage"):
        lines.append(f"start: stage {start['stage']} {start['why']}")
    elif decided.get("verdict") == TRAIN and start.get("wanted"):
        lines.append(f"start: the whole schedule, though a warm start is wanted: {start['why']}")
    scanned = tick.records.get("scan", {})
    lines += [f"note: {note}" for note in (*scanned.get("notes", ()), *(scanned.get("drift") or {}).get("notes", ()))]
    lines += [f"worse: {problem}" for problem in decided.get("problems", ())]
    registered = tick.records.get("register")
    if registered:
        accuracy = registered["test_top1_accuracy"]
        lines.append(f"version {registered['version']} of {registered['model']}: test top-1 accuracy {accuracy:.4f}")
    lines += map(new_class_text, tick.new_classes)
    told = tick.records.get("notify", {}).get("delivery")
    if told == "waits":
        lines.append("the webhook does not answer; what it was to be told is sent with the next tick")
    return lines
