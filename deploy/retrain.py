"""One tick of a retraining pipeline: scan, decide, train, evaluate, register, gate, promote, notify; each step a record.

A tick that was killed anywhere is taken up by the next call and ends as an undisturbed one would: what a step did before
its record was written is done again and changes nothing (docs/adr/0007-the-tick.md says why for each).
"""

import datetime
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock
from mlflow import MlflowClient
from rich.console import Console

from deploy.drift import Drift, Summary, compare, moved, summarise
from deploy.gate import GateRules
from deploy.line import Line, Together, run_line
from deploy.notify import FIRST_WAIT_S, Outbox, read_secret
from deploy.pipeline_file import Pipeline
from deploy.progress import Progress
from deploy.promote import ALREADY, Outcome, find_champion, history, number, promote
from deploy.promote import PROMOTED as DID_PROMOTE
from deploy.registry import CHAMPION, TOP1_TAG
from deploy.scans import scan_data
from deploy.ticks import (
    BELOW_FLOOR,
    KEPT,
    NOTHING_NEW,
    PROMOTED,
    REFUSED,
    STOP,
    STOPPED,
    SUPERSEDED,
    TRAIN,
    UNCHANGED,
    WAITS,
    Facts,
    Tick,
    Ticks,
    facts_of,
    iso,
    last_trained,
    news,
    renewal,
)
from deploy.tracking_address import SQLITE, check_tracking, resolve_tracking
from pipelines.manifest import Manifest, read_manifest
from training.run import Interrupted, Listener, Where, cores
from training.store import Store, hold, open_store
from vggcore.digest import digest
from vggcore.errors import DatasetError, RecipeError, StoreError, VggrowError
from vggcore.recipe import Recipe, parse_recipe
from vggcore.schedule import Stage

logger = logging.getLogger(__name__)

STARTS = 3               # how often a call begins anew because pictures changed while it worked
TOLD = frozenset({PROMOTED, REFUSED, WAITS, STOPPED, BELOW_FLOOR})     # outcomes that the webhook hears of
TOLD_ONCE = frozenset({STOPPED, BELOW_FLOOR, WAITS})                   # and not again while nothing about them changes


def utc_now() -> datetime.datetime:
    """The clock, unless a caller brings another."""
    return datetime.datetime.now(datetime.UTC)


class PicturesChanged(Exception):
    """The pictures are not those that this tick decided about."""


@dataclass(frozen=True)
class Job:
    """What a tick works with, the same from its first step to its last."""

    pipeline: Pipeline
    recipe: Recipe
    recipe_text: str
    rules: GateRules
    store: Store
    tracking: str
    client: MlflowClient
    secret: bytes | None
    accept: str | None               # a person's reason to train although the data got worse
    clock: Callable[[], datetime.datetime]
    signals: "Signals"
    console: Console
    first_wait_s: float

    @property
    def ticks(self) -> Ticks:
        """The pipeline's records."""
        return Ticks.of(self.store, self.pipeline.name)

    @property
    def outbox(self) -> Outbox:
        """What the webhook is told."""
        return Outbox(self.store.root / "retraining" / self.pipeline.name / "notifications")

    def write(self, tick: Tick, step: str, facts: Mapping[str, Any]) -> Tick:
        """Records a step of a tick; a signal that came meanwhile ends the call here."""
        found = self.ticks.write(tick.number, step, self.clock(), facts)
        self.signals.check()
        return found


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
    secret = read_secret(pipeline.notify) if pipeline.notify is not None else None
    store = open_store(pipeline.run.store)
    tracking = resolve_tracking(pipeline.run.tracking, store.root)
    check_tracking(tracking)
    make_database(tracking, store)
    with Signals() as signals, hold(store, f"retrain-{pipeline.name}", what=f"pipeline {pipeline.name!r}"):
        job = Job(
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
            return rehearse(job)
        tell_waiting(job)
        for left in reversed(range(STARTS)):
            tick = begin(job)
            try:
                return walk(job, tick)
            except (PicturesChanged, DatasetError) as error:
                if not left:
                    raise DatasetError(
                        f"pipeline {pipeline.name!r}: the pictures keep changing ({error}); try again later"
                    ) from error
                supersede(job, tick, f"the pictures changed while the tick was at work ({error})")
            except VggrowError as error:
                fail(job, tick, error)
                raise
    raise AssertionError


def make_database(tracking: str, store: Store) -> None:
    """Makes MLflow's sqlite file, where it is to be one, whole or not at all and by one process alone.

    MLflow (3.17.2) makes it by dozens of migrations, outside any transaction: two pipelines that begin at once, or a kill in
    the middle, leave a file that no command can open any more ("duplicate column name").
    """
    if not tracking.startswith(SQLITE):
        return
    path = Path(tracking.removeprefix(SQLITE))
    with FileLock(store.locks / "mlflow.lock"):
        if path.exists():
            return
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        MlflowClient(f"{SQLITE}{part}").search_experiments(max_results=1)
        os.replace(part, path)


def begin(job: Job) -> Tick:
    """The unfinished tick, unless the recipe or the rules have changed since it decided; else a new one without records."""
    ticks = job.ticks.all()
    number_of_next = ticks[-1].number + 1 if ticks else 1
    if not ticks or ticks[-1].finished:
        return Tick(number_of_next)
    tick = ticks[-1]
    decided = tick.records.get("decide")
    if decided is None or decided["verdict"] != TRAIN or "register" in tick.records:
        return tick
    before = facts_of(tick)
    if (before.recipe, dict(before.rules)) == (recipe_digest(job.recipe), asdict(job.rules)):
        return tick
    supersede(job, tick, "the recipe or the gate rules changed before anything was registered")
    return Tick(number_of_next)


def walk(job: Job, tick: Tick) -> Tick:
    """Takes the steps that have no record yet, in order."""
    if "decide" not in tick.records:
        tick = scan_and_decide(job, tick)
    if tick.records["decide"]["verdict"] == TRAIN:
        if "register" not in tick.records:
            tick = run_schedule(job, tick)
        with job.signals.held_back():
            if "promote" not in tick.records:
                tick = ask_gate(job, tick)
    with job.signals.held_back():
        return tell(job, tick)


# scan, decide


def scan_and_decide(job: Job, tick: Tick) -> Tick:
    """The first two records. A scan that fails by the data's fault is a record too: the tick will stop."""
    scanned, facts = look(job)
    tick = job.write(tick, "scan", scanned)
    return job.write(tick, "decide", facts)


def look(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scans, and gives the records of `scan` and `decide`."""
    reference = last_trained(job.ticks.all())
    last = facts_of(reference) if reference is not None else None
    champion = find_champion(job.client, job.recipe.name)
    held = champion_json(champion)
    try:
        check_folders(job.pipeline)
        manifest = scan_data(job.recipe.data, job.store, threads=cores())
    except DatasetError as error:
        unknown = Facts("", recipe_digest(job.recipe), asdict(job.rules), number(champion))
        stop = {"verdict": STOP, "reasons": [], "problems": [str(error)], "facts": asdict(unknown), "champion": held}
        return {"problem": str(error), "summary": None, "drift": None}, stop

    now = Facts(manifest.fingerprint, recipe_digest(job.recipe), asdict(job.rules), number(champion))
    drift = drift_from(job, reference, manifest)
    age = None
    if reference is not None:
        age = job.clock() - datetime.datetime.fromisoformat(reference.records["train"]["trained_at"])
    max_age = job.pipeline.start.age
    reasons = news(last, now, age=age, max_age=max_age)
    problems = drift.problems if drift is not None else ()
    verdict = STOP if problems and job.accept is None else TRAIN if reasons else NOTHING_NEW
    known = list(drift.last.classes) if drift is not None else list(manifest.classes)
    decided: dict[str, Any] = {
        "verdict": verdict,
        "reasons": list(reasons),
        "problems": list(problems),
        "accepted": job.accept if problems else None,
        "new_classes": known != list(manifest.classes),
        "renewal": renewal(
            last,
            now,
            reference.records["decide"]["renewal"] if reference is not None else 0,
            too_old=age is not None and max_age is not None and age > max_age,
        ),
        "compared_with": reference.number if reference is not None else None,
        "facts": asdict(now),
        "champion": held,
    }
    scanned = {
        "problem": None,
        "summary": summarise(manifest).to_json(),
        "drift": drift.to_json() if drift is not None else None,
        "notes": list(manifest.notes),
    }
    return scanned, decided


def check_folders(pipeline: Pipeline) -> None:
    """DatasetError for a watched folder that is absent or holds no file: a share that is not mounted is no lost data."""
    for folder in pipeline.watch.folders:
        if not folder.is_dir():
            raise DatasetError(f"[watch] {folder}: no such folder; mount it, or mend [watch] folders")
        if not any(path.is_file() for path in folder.rglob("*")):
            raise DatasetError(f"[watch] {folder}: holds no file; is it mounted?")


def drift_from(job: Job, reference: Tick | None, manifest: Manifest) -> Drift | None:
    """How the data differ from those of the newest tick that trained; None: there was none."""
    if reference is None:
        return None
    last = Summary.from_json(reference.records["scan"]["summary"])
    try:
        contents = moved(read_manifest(job.store.data(last.fingerprint)), manifest)
    except StoreError:                  # deleted to free space, or broken: counts are in the record, pictures are not
        contents = None
    return compare(last, summarise(manifest), max_bad=job.recipe.data.max_bad, contents=contents)


def recipe_digest(recipe: Recipe) -> str:
    """16 hex characters for all that a recipe says; comments and order do not count."""
    return digest(recipe.model_dump(mode="json"), hex_characters=16)


def champion_json(champion: Any) -> dict[str, Any] | None:
    """A champion's version and its test top-1 accuracy, for the history."""
    if champion is None:
        return None
    top1 = champion.tags.get(TOP1_TAG)
    return {"version": str(champion.version), "test_top1_accuracy": None if top1 is None else float(top1)}


# train, evaluate, register


class Watcher(Listener):
    """Hears when the last stage is done."""

    def __init__(self, stages: Sequence[Stage], when_trained: Callable[[], None]) -> None:
        """when_trained: called at every run of the line once no stage is left."""
        self.left = {stage.name for stage in stages}
        self.when_trained = when_trained

    def stage_begins(self, stage: Stage, key: str, *, done: bool) -> None:
        if done:
            self.pass_over(stage)

    def stage_ends(self, stage: Stage, key: str, status: str) -> None:
        if status == "FINISHED":
            self.pass_over(stage)

    def pass_over(self, stage: Stage) -> None:
        """A stage less."""
        self.left.discard(stage.name)
        if not self.left:
            self.when_trained()


def run_schedule(job: Job, tick: Tick) -> Tick:
    """Trains, evaluates and registers by the same line as `vggrow train`, which passes over what was done before."""
    decided = tick.records["decide"]
    recipe, text = renewed(job.recipe, job.recipe_text, decided["renewal"], job.pipeline.recipe)

    def record_training() -> None:
        if "train" not in job.ticks.read(tick.number).records:
            now = job.clock()
            facts = {"seed": recipe.seed, "trained_at": trained_before(job, decided) or iso(now)}
            job.ticks.write(tick.number, "train", now, facts)

    def hear(manifest: Manifest, stages: Sequence[Stage]) -> Listener:
        if manifest.fingerprint != decided["facts"]["fingerprint"]:
            raise PicturesChanged(f"fingerprint {decided['facts']['fingerprint']} -> {manifest.fingerprint}")
        shown = Progress(job.console, pictures=len(manifest.split("train")), stages=len(stages))
        return Together(shown, Watcher(stages, record_training))

    where = Where(
        store=job.store,
        workers=job.pipeline.run.workers,
        threads=max(1, cores() // job.pipeline.run.workers),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    say = lambda words: job.console.print(words, markup=False, soft_wrap=True)  # noqa: E731
    line = run_line(recipe, text, where=where, tracking=job.tracking, hear=hear, say=say)
    tick = job.write(tick, "evaluate", {"stages": {name: figures(line, name) for name in line.evaluations}})
    return job.write(
        tick,
        "register",
        {
            "model": line.registered.name,
            "version": line.registered.version,
            "alias": line.registered.alias,
            "reason": line.registered.reason,
            "stage": line.registered_stage,
            "stage_key": line.keys[line.registered_stage],
            "schedule_key": line.schedule_key,
            **figures(line, line.registered_stage),
        },
    )


def trained_before(job: Job, decided: Mapping[str, Any]) -> str | None:
    """When these very pictures, recipe and seed were trained, where an earlier tick did; this one then trains nothing."""
    reference = last_trained(job.ticks.all())
    if reference is None:
        return None
    last = reference.records["decide"]
    names = ("fingerprint", "recipe")
    same = all(last["facts"][name] == decided["facts"][name] for name in names) and last["renewal"] == decided["renewal"]
    return str(reference.records["train"]["trained_at"]) if same else None


def renewed(recipe: Recipe, text: str, times: int, place: Path) -> tuple[Recipe, str]:
    """The recipe with its seed `times` higher, as a model and as the text that says so: the same key is never trained twice.

    Raises RecipeError where the seed cannot be set in the text.
    """
    if not times:
        return recipe, text
    wanted = recipe.model_copy(update={"seed": recipe.seed + times})
    head, tables = re.match(r"(.*?)(^\s*\[.*|\Z)", text, re.DOTALL | re.MULTILINE).groups()  # type: ignore[union-attr]
    head = re.sub(r"^\s*seed\s*=.*\n?", "", head, flags=re.MULTILINE)
    changed = f"{head.rstrip()}\nseed = {wanted.seed}   # {recipe.seed} + {times}: trained again for its age\n\n{tables}"
    if parse_recipe(changed, place=str(place), folder=place.parent) != wanted:
        raise RecipeError(
            f"{place}: its seed cannot be raised for max_age; write seed = ... on a line of its own, above the tables"
        )
    return wanted, changed


def figures(line: Line, stage: str) -> dict[str, Any]:
    """A stage's figures on test, 0..1."""
    facts = line.evaluations[stage].facts
    return {f"test_{name}": facts[name] for name in ("top1_accuracy", "balanced_accuracy")} | {"pictures": facts["pictures"]}


# gate, promote


def ask_gate(job: Job, tick: Tick) -> Tick:
    """Asks the gate and does what it says; both records. Asked again about the same two versions it is no second use."""
    registered, decided = tick.records["register"], tick.records["decide"]
    version, before = registered["version"], decided["facts"]["champion"]
    if registered["alias"] == CHAMPION:
        first = before != version
        facts = {"outcome": PROMOTED if first else KEPT, "reason": registered["reason"], "decision": None}
        if not first:
            facts["reason"] = f"version {version} is the champion already"
        tick = job.write(tick, "gate", facts)
        return job.write(tick, "promote", {"promoted": first, "version": version, "previous": None})
    found = promote(
        job.client,
        store=job.store,
        model=f"models:/{registered['model']}/{version}",
        rules=job.rules,
        floor=job.recipe.register_.floor,
        by=f"vggrow retrain {job.pipeline.name}",
    )
    found = recovered(job, found)
    tick = job.write(tick, "gate", {"outcome": gate_outcome(found), "reason": found.reason, "decision": found.decision})
    done = found.action == DID_PROMOTE
    previous = found.champion_before if done else None
    return job.write(tick, "promote", {"promoted": done, "version": version, "previous": previous})


def recovered(job: Job, found: Outcome) -> Outcome:
    """The promotion itself, where it was done by an attempt that was killed before it could record it."""
    if found.action != ALREADY:
        return found
    wanted = (DID_PROMOTE, found.version)
    lines = [line for line in history(job.store, found.model) if (line["action"], line["version"]) == wanted]
    if not lines:
        return found
    line = lines[-1]
    return Outcome(
        DID_PROMOTE, found.model, found.version, found.version, line["champion_before"], line["reason"], line["decision"]
    )


def gate_outcome(found: Outcome) -> str:
    """In the tick's words; what the gate was not asked about (other classes, no gate list, lineage) waits for a person."""
    if found.action == DID_PROMOTE:
        return PROMOTED
    if found.action == ALREADY:
        return KEPT
    if found.champion is None:
        return BELOW_FLOOR
    asked = found.decision is not None and found.decision.get("p_value") is not None
    return REFUSED if asked else WAITS


# notify


def tell(job: Job, tick: Tick) -> Tick:
    """Tells the webhook what came of the tick, once, and writes the last record. A receiver that is down holds up nothing."""
    outcome, reason = ending(tick)
    registered = tick.records.get("register", {})
    content = {
        "pipeline": job.pipeline.name,
        "model": job.recipe.name,
        "outcome": outcome,
        "reason": reason,
        "version": registered.get("version"),
        "previous": tick.records.get("promote", {}).get("previous"),
        "test_top1_accuracy": registered.get("test_top1_accuracy"),
        "fingerprint": tick.records["decide"]["facts"]["fingerprint"],
        "new_classes": tick.records["decide"].get("new_classes", False),
    }
    told_before = outcome in TOLD_ONCE and same_as_before(job, tick, content)
    event = digest([job.pipeline.name, tick.number, tick.began], hex_characters=32)
    delivery = None
    if job.pipeline.notify is not None and outcome in TOLD and not told_before:
        body = {"id": event, "tick": tick.number, "at": tick.began, **content}
        job.outbox.put(event, tick.number, body)
        tell_waiting(job)
        delivery = "sent" if (job.outbox.find(event) or {}).get("sent") else "waits"
    champion = champion_json(find_champion(job.client, job.recipe.name))
    facts = {
        "outcome": outcome,
        "reason": reason,
        "content": digest(content, hex_characters=32),
        "event": event if delivery else None,
        "delivery": "told before" if told_before else delivery,
        "champion": champion,
    }
    return job.write(tick, "notify", facts)


def ending(tick: Tick) -> tuple[str, str]:
    """The outcome of a tick whose steps are all done, and the reason in a sentence."""
    decided = tick.records["decide"]
    if decided["verdict"] == STOP:
        return STOPPED, "; ".join(decided["problems"])
    if decided["verdict"] == NOTHING_NEW:
        return UNCHANGED, f"the pictures, the recipe and the gate rules are those of tick {decided['compared_with']}"
    return tick.records["gate"]["outcome"], tick.records["gate"]["reason"]


def same_as_before(job: Job, tick: Tick, content: Mapping[str, Any]) -> bool:
    """Whether the tick before this one ended with the same words about the same things."""
    earlier = [one for one in job.ticks.all() if one.number < tick.number and one.finished]
    return bool(earlier) and earlier[-1].records["notify"].get("content") == digest(dict(content), hex_characters=32)


def tell_waiting(job: Job) -> None:
    """Sends what earlier attempts could not."""
    if job.pipeline.notify is not None and job.secret is not None:
        job.outbox.send_waiting(job.pipeline.notify, job.secret, first_wait_s=job.first_wait_s)


def supersede(job: Job, tick: Tick, reason: str) -> None:
    """Closes a tick whose question is no longer the question."""
    champion = champion_json(find_champion(job.client, job.recipe.name))
    facts = {"outcome": SUPERSEDED, "reason": reason, "content": None, "event": None, "delivery": None, "champion": champion}
    job.ticks.write(tick.number, "notify", job.clock(), facts)


def fail(job: Job, tick: Tick, error: VggrowError) -> None:
    """Notes what ended this attempt, and tells it once; the tick stays unfinished."""
    message = str(error)
    job.ticks.write(tick.number, "problem", job.clock(), {"message": message})
    if job.pipeline.notify is not None:
        event = digest([job.pipeline.name, tick.number, message], hex_characters=32)
        body = {
            "id": event,
            "tick": tick.number,
            "pipeline": job.pipeline.name,
            "model": job.recipe.name,
            "outcome": "failed",
            "reason": message,
        }
        job.outbox.put(event, tick.number, body)
        tell_waiting(job)


def rehearse(job: Job) -> Tick:
    """What a tick would do now: an unrecorded one, or the unfinished one as it stands."""
    ticks = job.ticks.all()
    if ticks and not ticks[-1].finished:
        return ticks[-1]
    scanned, decided = look(job)
    at = {"at": job.clock().isoformat()}
    return Tick(ticks[-1].number + 1 if ticks else 1, {"scan": at | scanned, "decide": at | decided})


class Signals:
    """SIGINT and SIGTERM while a tick is at work: they end it where nothing is half done; the next call goes on there."""

    def __init__(self) -> None:
        """Handlers are set on entry and put back on leaving."""
        self.came, self.holding = False, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        """Takes the signals; in another thread than the main one they stay with their owner."""
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self.before[name] = signal.signal(name, self.handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        """A signal came."""
        self.came = True
        self.check()

    def check(self) -> None:
        """Raises Interrupted after a signal, unless it is held back."""
        if self.came and not self.holding:
            raise Interrupted

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Promotion and notification take seconds: a signal waits for the end of them."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False


def tick_text(tick: Tick) -> list[str]:
    """A tick for a person, a line each."""
    lines = [f"tick {tick.number}: {tick.outcome} ({tick.reason})"]
    decided = tick.records.get("decide", {})
    if not tick.finished and decided:
        what = {TRAIN: "would train", NOTHING_NEW: "nothing new", STOP: "would stop"}[decided["verdict"]]
        lines = [f"tick {tick.number}: {what}"]
    lines += [f"new: {reason}" for reason in decided.get("reasons", ())]
    drift = tick.records.get("scan", {}).get("drift")
    if drift:
        lines += [f"note: {note}" for note in drift["notes"]]
    lines += [f"worse: {problem}" for problem in decided.get("problems", ())]
    registered = tick.records.get("register")
    if registered:
        accuracy = registered["test_top1_accuracy"]
        lines.append(f"version {registered['version']} of {registered['model']}: test top-1 accuracy {accuracy:.4f}")
    told = tick.records.get("notify", {}).get("delivery")
    if told == "waits":
        lines.append("the webhook does not answer; what it was to be told is sent with the next tick")
    return lines
