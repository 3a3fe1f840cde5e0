"""A tick's middle: the line from a schedule to a registered version, as `vggrow train` runs it."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.line import Line, Together, run_line
from deploy.pipeline_file import Pipeline
from deploy.progress import Progress
from deploy.tick_work import Work
from deploy.ticks import Tick, iso, last_trained
from deploy.warm_start import Beginning, in_known_order, warm_recipe
from pipelines.manifest import Manifest
from training.listener import Listener
from training.store import Store
from training.where import Where, default_device, threads_for
from vggcore.errors import RecipeError
from vggcore.recipe import Recipe, parse_recipe
from vggcore.schedule import Stage


class PicturesChanged(Exception):
    """The pictures are not those that this tick decided about."""


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


def run_schedule(work: Work, tick: Tick) -> Tick:
    """Trains, evaluates and registers by the same line as `vggrow train`, which passes over what was done before."""
    decided = tick.records["decide"]
    recipe, text = recipe_to_train(work, decided)

    def record_training() -> None:
        if "train" not in work.ticks.read(tick.number).records:
            now = work.clock()
            facts = {"seed": recipe.seed, "trained_at": trained_before(work, decided) or iso(now)}
            work.ticks.write(tick.number, "train", now, facts)

    def hear(manifest: Manifest, stages: Sequence[Stage]) -> Listener:
        if manifest.fingerprint != decided["facts"]["fingerprint"]:
            raise PicturesChanged(f"fingerprint {decided['facts']['fingerprint']} -> {manifest.fingerprint}")
        shown = Progress(work.console, pictures=len(manifest.split("train")), stages=len(stages))
        return Together(shown, Watcher(stages, record_training))

    where = where_of(work.pipeline, work.store)
    say = lambda words: work.console.print(words, markup=False, soft_wrap=True)  # noqa: E731
    line = run_line(recipe, text, where=where, tracking=work.tracking, hear=hear, say=say)
    tick = work.write(tick, "evaluate", {"stages": {name: figures(line, name) for name in line.evaluations}})
    return work.write(
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


def where_of(pipeline: Pipeline, store: Store) -> Where:
    """Where a pipeline's ticks train, by its [run]."""
    run = pipeline.run
    return Where(
        store=store,
        workers=run.workers,
        threads=run.threads or threads_for(run.workers),
        address=run.address,
        device=run.device or default_device(),
    )


def recipe_to_train(work: Work, decided: Mapping[str, Any]) -> tuple[Recipe, str]:
    """The pipeline's recipe as the tick has decided to train it, and its text: from the champion, or with a raised seed."""
    place, start = work.pipeline.recipe, Beginning.from_json(decided.get("start"))
    known = decided.get("known_classes", ())
    if not start.warm:
        recipe, text = renewed(work.recipe, work.recipe_text, decided["renewal"], place)
        return in_known_order(recipe, text, known, place)
    return warm_recipe(
        work.recipe,
        start,
        learning_rate=work.pipeline.start.learning_rate,
        seed=work.recipe.seed + decided["renewal"],
        place=place,
        classes=known,
        new_rows=work.pipeline.start.new_rows,
    )


def trained_before(work: Work, decided: Mapping[str, Any]) -> str | None:
    """When these very pictures, recipe and seed were trained, where an earlier tick did; this one then trains nothing."""
    reference = last_trained(work.ticks.all())
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
