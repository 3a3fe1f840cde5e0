"""The whole line for one recipe: scan, train, evaluate, package, register; every step is skipped when it was done before."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deploy.feature_yardstick import with_features
from deploy.package import log_package, write_package
from deploy.registry import WEIGHTS_DIGEST_TAG, WEIGHTS_TAG, Registered, register_candidate
from deploy.scans import scan_data
from deploy.tracking_address import artifact_location, check_tracking, make_database, resolve_tracking
from deploy.yardsticks import Measured, read_measured, read_yardsticks, require_scikit, write_yardsticks, yardsticks
from pipelines.cache import DecodedCache, make_cache
from pipelines.colour import Colour
from pipelines.loader import Batch, TrainLoader
from pipelines.manifest import Manifest, manifest_json
from training.evaluate import Evaluation, evaluate_stage
from training.history import read_history
from training.listener import Listener
from training.losses import check_class_weights
from training.parents import (
    check_named,
    check_parents,
    is_done,
    known_order,
    recorded_colour,
    result_entry,
    result_weights,
    settle,
    weights_digest,
)
from training.ray_address import check_address
from training.run import train_schedule
from training.stage_job import view_rule
from training.stop_switch import Interrupted
from training.store import Store, hold, read_json
from training.system_metrics import sampling_interval_s
from training.track import Tracker, open_tracker
from training.where import Where, check_where, cores
from vggcore.errors import TrackingError
from vggcore.recipe import BEST_ON_VAL, Recipe, ResultWeights
from vggcore.schedule import Stage, evaluated_stages, parent_key, resolve_stages, schedule_key, stage_keys
from vggcore.view_average import effective_views
from vggcore.weights import load_weights
from vggcore.whole_file import write_json, write_text

logger = logging.getLogger(__name__)

LIBRARIES = ("vggrow", "torch", "nvidia-dali-cuda130", "ray", "mlflow", "numpy")
SHEET_VIEWS = 24      # training views on the sheet that each stage's run shows


@dataclass(frozen=True)
class Line:
    """What one run of the line left: where it stands in the store and in MLflow, and what it reached."""

    schedule_key: str
    stages: tuple[Stage, ...]
    keys: dict[str, str]
    evaluations: dict[str, Evaluation]      # by stage name
    registered_stage: str
    registered: Registered
    tracking: str
    experiment_id: str
    parent_run_id: str
    report: Path
    measured: Measured                      # the registered stage's posteriors
    val_pictures: int


def run_line(
    recipe: Recipe,
    recipe_text: str,
    *,
    where: Where,
    tracking: str | None,
    hear: Callable[[Manifest, Sequence[Stage]], Listener],
    with_yardsticks: bool = False,
    say: Callable[[str], None] = logger.info,
) -> Line:
    """Runs the line for `recipe`; what is finished is not run again.

    hear: makes the listener that shows progress. Raises VggrowError for what the user can mend, Interrupted after a
    signal: both leave a store from which the same call goes on.
    """
    store = where.store
    check_where(where, resolve_stages(recipe))
    check_named(resolve_stages(recipe), store)
    address = where.address or os.environ.get("RAY_ADDRESS")
    if address not in (None, "local"):
        check_address(address)
    if with_yardsticks:
        require_scikit()
    uri = resolve_tracking(tracking, store.root)
    check_tracking(uri)
    sampling_interval_s()      # read where a stage begins; what is wrong with it is said here
    manifest = scan_data(recipe.data, store, threads=cores())
    known = known_order(resolve_stages(recipe), store, recipe.data)
    manifest = manifest.in_order(known)
    stages = settle(resolve_stages(recipe), store, manifest.fingerprint)
    check_parents(stages, store, manifest.classes)
    check_class_weights(stages, manifest.classes, manifest.split("train").labels)
    keys = stage_keys(stages, classes=manifest.classes, fingerprint=manifest.fingerprint)
    key = schedule_key(recipe.name, keys)
    with hold(store, f"schedule-{key}", what=f"the schedule of recipe {recipe.name!r} ({key})"):
        tags = {"vggrow.recipe": recipe.name, "vggrow.fingerprint": manifest.fingerprint}
        make_database(uri)
        tracker = open_tracker(
            uri,
            store,
            recipe_name=recipe.name,
            schedule_key=key,
            tags=tags,
            artifact_location=artifact_location(uri, store.root),
        )
        record = record_schedule(store, key, recipe, recipe_text, manifest, known, stages, keys, tracker, uri)
        with truthful_end(tracker):
            listener = Together(hear(manifest, stages), tracker)
            tracker.batches = {keys[stage.name]: batches(stage, manifest) for stage in stages}
            cache = cache_for(keys, manifest, where, say)
            train_schedule(stages, keys, manifest, where, listener)
            evaluations = evaluate_all(recipe, stages, keys, manifest, where, tracker, say, cache)
            chosen = registered_stage(recipe, stages, keys, store)
            registered = register(recipe, chosen, keys, manifest, evaluations[chosen.name], tracker, uri, store)
            if with_yardsticks:
                measure_yardsticks(store, key, recipe, stages, manifest, threads=cores(), say=say)
            record = record | {
                "evaluations": {
                    name: str(found.folder.relative_to(store.root)) for name, found in evaluations.items()
                },
                "runs": {stage.name: tracker.runs[keys[stage.name]].run_id for stage in stages},
                "registered": {
                    "stage": chosen.name,
                    "name": registered.name,
                    "version": registered.version,
                    "alias": registered.alias,
                    "uri": registered.uri,
                },
            }
            write_json(store.schedule(key) / "stages.json", record)
            from deploy.report import write_report  # matplotlib: a second that no first step waits for

            report = write_report(store.root, key, store.schedule(key) / "report.html")
            tracker.log_results(tracker.parent_run_id, {}, [(report, "")])
    return Line(
        schedule_key=key,
        stages=stages,
        keys=keys,
        evaluations=evaluations,
        registered_stage=chosen.name,
        registered=registered,
        tracking=uri,
        experiment_id=tracker.experiment_id,
        parent_run_id=tracker.parent_run_id,
        report=report,
        measured=read_measured(evaluations[chosen.name].folder),
        val_pictures=len(manifest.split("val")),
    )


def cache_for(
    keys: dict[str, str], manifest: Manifest, where: Where, say: Callable[[str], None]
) -> DecodedCache | None:
    """The decoded cache, where there is something to train and it is within what was allowed."""
    if not where.cache_gib or all(is_done(where.store, key) for key in keys.values()):
        return None
    return make_cache(
        manifest, where.store.root, budget_bytes=int(where.cache_gib * 2**30), threads=cores(), say=say
    )


class Together(Listener):
    """Two listeners as one: what a person sees, and what MLflow gets."""

    def __init__(self, *listeners: Listener) -> None:
        """They hear everything in this order."""
        self.listeners = listeners

    def stage_begins(self, stage: Stage, key: str, *, done: bool) -> None:
        for listener in self.listeners:
            listener.stage_begins(stage, key, done=done)

    def rows(self, stage: Stage, key: str, rows: list[dict[str, Any]]) -> None:
        for listener in self.listeners:
            listener.rows(stage, key, rows)

    def features(self, stage: Stage, key: str, split: str, done: int, total: int) -> None:
        for listener in self.listeners:
            listener.features(stage, key, split, done, total)

    def workers_restarted(self, stage: Stage, key: str, iteration: int) -> None:
        for listener in self.listeners:
            listener.workers_restarted(stage, key, iteration)

    def node_leaves(self, stage: Stage, key: str, iteration: int, every_s: float) -> None:
        for listener in self.listeners:
            listener.node_leaves(stage, key, iteration, every_s)

    def checkpoint_passed_over(self, stage: Stage, key: str, words: str) -> None:
        for listener in self.listeners:
            listener.checkpoint_passed_over(stage, key, words)

    def stage_left_out(self, stage: Stage, key: str, reason: str) -> None:
        for listener in self.listeners:
            listener.stage_left_out(stage, key, reason)

    def stage_ends(self, stage: Stage, key: str, status: str) -> None:
        for listener in self.listeners:
            listener.stage_ends(stage, key, status)


@contextmanager
def truthful_end(tracker: Tracker) -> Iterator[None]:
    """The parent run ends as what happened: FINISHED, KILLED by a signal, or FAILED; an error of MLflow hides no other."""
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "FAILED"
        try:
            tracker.insist(lambda: tracker.end(tracker.parent_run_id, status))
        except TrackingError as further:
            logger.warning("%s", further)
        raise
    tracker.insist(lambda: tracker.end(tracker.parent_run_id, "FINISHED"))


def batches(stage: Stage, manifest: Manifest) -> int:
    """Iterations an epoch."""
    return -(-len(manifest.split("train")) // stage.global_batch)


def record_schedule(
    store: Store,
    key: str,
    recipe: Recipe,
    recipe_text: str,
    manifest: Manifest,
    known_classes: Sequence[str],
    stages: Sequence[Stage],
    keys: dict[str, str],
    tracker: Tracker,
    uri: str,
) -> dict[str, Any]:
    """Writes recipe.toml and stages.json before anything is trained, and logs the recipe and the manifest's summary.

    known_classes: those whose order was known before; the others are recorded as new, where there are such.
    """
    folder = store.schedule(key)
    record: dict[str, Any] = {
        "name": recipe.name,
        "key": key,
        "fingerprint": manifest.fingerprint,
        "classes": list(manifest.classes),
        "new_classes": [name for name in manifest.classes if known_classes and name not in known_classes],
        "stages": [
            {
                "name": stage.name,
                "key": keys[stage.name],
                "net": stage.net,
                "scale": list(stage.scale),
                "init_from": stage.init_from,
                "parent_key": parent_key(stage, keys),
                "mean": stage.mean,
                **({"test_scales": list(stage.default_test_scales)} if stage.fit == "logistic" else {}),
            }
            for stage in stages
        ],
        "evaluations": {},
        "tracking": uri,
        "experiment_id": tracker.experiment_id,
        "parent_run_id": tracker.parent_run_id,
        "runs": {},
        "registered": None,
        "versions": {name: version(name) for name in LIBRARIES},
    }
    known = read_json(folder / "stages.json")
    if known is not None:                       # keep what an earlier run found until this one finds it again
        record |= {name: known.get(name, record[name]) for name in ("evaluations", "runs", "registered")}
    write_text(folder / "recipe.toml", recipe_text)
    write_json(folder / "stages.json", record)
    write_json(folder / "manifest.json", manifest_json(manifest))
    tracker.log_results(tracker.parent_run_id, {}, [(folder / "recipe.toml", ""), (folder / "manifest.json", "")])
    return record


def evaluate_all(
    recipe: Recipe,
    stages: Sequence[Stage],
    keys: dict[str, str],
    manifest: Manifest,
    where: Where,
    tracker: Tracker,
    say: Callable[[str], None],
    cache: DecodedCache | None,
) -> dict[str, Evaluation]:
    """Evaluates on test what the recipe asks for and what may be registered; figures and pictures go to the stages' runs."""
    from deploy import charts  # see write_report

    store = where.store
    wanted = {*evaluated_stages(recipe), registered_stage(recipe, stages, keys, store).name}
    found = {}
    for stage in stages:
        key, folder = keys[stage.name], store.stage(keys[stage.name])
        run = tracker.runs[key].run_id
        history = read_history(folder / "history.jsonl")
        tracker.log_bytes(run, charts.learning_curves(history), "learning_curves.png", store.scratch)
        if stage.fit == "sgd":
            sheet = view_sheet(stage, manifest, recorded_colour(store, key))
            tracker.log_bytes(run, sheet, "training_views.png", store.scratch)
        if stage.name not in wanted:
            continue
        protocol = "pooled" if stage.head == "linear" else recipe.evaluate.protocol
        which, views = weights_of(recipe, stage), effective_views(recipe.evaluate.views, protocol, stage)
        more = ([views] if views != "none" else []) + ([f"weights {which}"] if which != "last" else [])
        say(f"{stage.name}: evaluating on test, {', '.join([protocol, *more])}")
        evaluation = evaluate_stage(
            store,
            stage,
            key,
            result_weights(store, key, which),
            manifest,
            protocol=recipe.evaluate.protocol,
            scales=recipe.evaluate.scales,
            views=views,
            weights_digest=weights_digest(store, key, which) if which != "last" else None,
            device=where.device_here,
            threads=cores(),
            cache=cache,
        )
        found[stage.name] = evaluation
        names = ("top1_accuracy", "top5_accuracy", "balanced_accuracy", "auc", "loss")
        figures = {f"test_{name}": evaluation.facts[name] for name in names if evaluation.facts.get(name) is not None}
        tracker.log_results(run, figures, [(evaluation.folder / "posteriors.parquet", "test")])
        told = {"protocol": evaluation.facts["protocol"], "views": evaluation.facts.get("views", "none"), "weights": which}
        tracker.tag(run, {f"vggrow.{name}": value for name, value in told.items()})
        confusion = charts.confusion_figure(np.array(evaluation.facts["confusion"]), manifest.classes)
        tracker.log_bytes(run, confusion, "test/confusion.png", store.scratch)
    return found


def view_sheet(stage: Stage, manifest: Manifest, colour: Colour) -> bytes:
    """PNG of the first training views of a stage, as the net sees them but for the mean."""
    from deploy import charts  # see write_report

    train = manifest.split("train")
    rule = view_rule(stage)
    loader = TrainLoader(
        train, colour, rule, standardise=False, rank=0, world_size=1, device="cpu", threads=cores()
    )
    images, titles = [], []
    try:
        for batch in loader.epoch(0):
            images.append(batch.images.numpy() + np.array(colour.mean, np.float32)[:, None, None])
            titles += batch_titles(batch, manifest.classes)
            if len(titles) >= SHEET_VIEWS:
                break
    finally:
        loader.close()
    return charts.view_sheet(np.concatenate(images)[:SHEET_VIEWS], titles[:SHEET_VIEWS])


def batch_titles(batch: Batch, classes: Sequence[str]) -> list[str]:
    """Each view's class; with mixup both, and the first one's share in percent."""
    titles = [classes[label] for label in batch.labels.tolist()]
    if batch.mix is None or batch.partner_labels is None:
        return titles
    others = [classes[label] for label in batch.partner_labels.tolist()]
    return [f"{100 * mix:.0f} % {one} + {other}" for mix, one, other in zip(batch.mix.tolist(), titles, others, strict=True)]


def weights_of(recipe: Recipe, stage: Stage) -> ResultWeights:
    """Which of a stage's weights are measured and registered: those that the recipe asks for, where the stage has them."""
    which = recipe.register_.weights
    absent = stage.fit == "logistic" or (which == "average" and not stage.average)
    return "last" if absent else which


def more_tags(which: ResultWeights, facts: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a run or version for weights and views that are not the usual ones."""
    views = {"vggrow.views": str(facts["views"])} if "views" in facts else {}
    return views | ({WEIGHTS_TAG: which, WEIGHTS_DIGEST_TAG: str(facts["weights"])} if which != "last" else {})


def registered_stage(recipe: Recipe, stages: Sequence[Stage], keys: dict[str, str], store: Store) -> Stage:
    """The stage whose result becomes a candidate; "best on val": of equal ones the later."""
    wanted = recipe.register_.stage or stages[-1].name
    if wanted != BEST_ON_VAL:
        return next(stage for stage in stages if stage.name == wanted)
    reached = [val_top1(store, keys[stage.name], weights_of(recipe, stage)) for stage in stages]
    best = max(range(len(stages)), key=lambda place: (reached[place], place))
    return stages[best]


def val_top1(store: Store, key: str, which: ResultWeights) -> float:
    """Top-1 accuracy (0..1) on val of some of a finished stage's weights."""
    if which == "last":
        return float(read_json(store.stage(key) / "result.json")["val_top1_accuracy"])
    return float(result_entry(store, key, which)["val_top1_accuracy"])


def register(
    recipe: Recipe,
    stage: Stage,
    keys: dict[str, str],
    manifest: Manifest,
    evaluation: Evaluation,
    tracker: Tracker,
    uri: str,
    store: Store,
) -> Registered:
    """Packages a stage's weights, logs them on its run, and registers the version; again is harmless."""
    key = keys[stage.name]
    run = tracker.runs[key].run_id
    facts, which = evaluation.facts, weights_of(recipe, stage)
    lineage = {
        "recipe": recipe.name,
        "stage": stage.name,
        "stage_key": key,
        "parent_key": parent_key(stage, keys),
        "fingerprint": manifest.fingerprint,
        "run_id": run,
        **({"weights": which, "weights_digest": facts["weights"]} if which != "last" else {}),
    }
    folder = store.root / "packages" / key
    write_package(
        folder,
        state=load_weights(result_weights(store, key, which)),
        settings=stage.model_dump(mode="json"),
        classes=manifest.classes,
        colour=recorded_colour(store, key),
        protocol=facts["protocol"],
        scales=facts["scales"],
        views=facts.get("views", "none"),
        lineage=lineage,
    )
    model_uri = log_package(tracking=uri, run_id=run, folder=folder)
    tags = {
        "vggrow.net": stage.net,
        "vggrow.recipe": recipe.name,
        "vggrow.fingerprint": manifest.fingerprint,
        "vggrow.stage": stage.name,
        "vggrow.test_top1_accuracy": f"{facts['top1_accuracy']:.6f}",
        "vggrow.test_balanced_accuracy": f"{facts['balanced_accuracy']:.6f}",
        "vggrow.protocol": facts["protocol"],
        **more_tags(which, facts),
    }
    return register_candidate(
        tracker.client,
        store=store.root,
        name=recipe.name,
        model_uri=model_uri,
        run_id=run,
        stage_key=key,
        tags=tags,
        test_top1=evaluation.top1,
        floor=recipe.register_.floor,
    )


def measure_yardsticks(
    store: Store,
    key: str,
    recipe: Recipe,
    stages: Sequence[Stage],
    manifest: Manifest,
    *,
    threads: int,
    say: Callable[[str], None],
) -> None:
    """Fits plain classifiers on the same split, once a schedule; the one on published weights when the store has some."""
    path = store.schedule(key) / "yardsticks.json"
    known = read_yardsticks(path) if path.exists() else None
    if known is None:
        say("yardsticks: plain classifiers on the same pictures")
        found = yardsticks(manifest.split("train"), manifest.split("test"), recipe.seed, threads=threads)
    else:
        found = known
    found = with_features(found, store, manifest, stages, key, recipe.seed, threads=threads, say=say)
    if found is not known:
        write_yardsticks(path, found)
