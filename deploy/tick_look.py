"""A tick's first two steps: scan the pictures, and decide whether there is anything to do; they change nothing else."""

import datetime
from dataclasses import asdict
from typing import Any

from deploy.drift import Drift, Summary, compare, moved, summarise
from deploy.pipeline_file import Pipeline
from deploy.registry import STAGE_KEY_TAG
from deploy.registry_versions import find_champion, number
from deploy.scans import scan_data
from deploy.tick_work import Work, champion_json
from deploy.ticks import NOTHING_NEW, STOP, TRAIN, Facts, Tick, facts_of, last_trained, news, renewal
from deploy.warm_start import Beginning, choose_beginning
from pipelines.manifest import Manifest, read_manifest
from training.store import read_json
from training.where import cores
from vggcore.digest import digest
from vggcore.errors import DatasetError, StoreError
from vggcore.recipe import Recipe


def scan_and_decide(work: Work, tick: Tick) -> Tick:
    """The first two records. A scan that fails by the data's fault is a record too: the tick will stop."""
    scanned, facts = look(work)
    tick = work.write(tick, "scan", scanned)
    return work.write(tick, "decide", facts)


def look(work: Work) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scans, and gives the records of `scan` and `decide`."""
    reference = last_trained(work.ticks.all())
    last = facts_of(reference) if reference is not None else None
    champion = find_champion(work.client, work.recipe.name)
    held = champion_json(champion)
    try:
        check_folders(work.pipeline)
        manifest = scan_data(work.recipe.data, work.store, threads=cores())
    except DatasetError as error:
        unknown = Facts("", recipe_digest(work.recipe), work.rule_facts, number(champion))
        stop = {"verdict": STOP, "reasons": [], "problems": [str(error)], "facts": asdict(unknown), "champion": held}
        return {"problem": str(error), "summary": None, "drift": None}, stop

    now = Facts(manifest.fingerprint, recipe_digest(work.recipe), work.rule_facts, number(champion))
    drift = drift_from(work, reference, manifest)
    age, max_age = None, work.pipeline.start.age
    if reference is not None:
        age = work.clock() - datetime.datetime.fromisoformat(reference.records["train"]["trained_at"])
    too_old = age is not None and max_age is not None and age > max_age
    order = known_classes(work, reference, now, champion, too_old=too_old)
    manifest = manifest.in_order(order)
    kept = [name for name in order if name in manifest.classes]       # a class that is gone is a matter of --accept
    reasons = news(last, now, age=age, max_age=max_age)
    problems = drift.problems if drift is not None else ()
    verdict = STOP if problems and work.accept is None else TRAIN if reasons else NOTHING_NEW
    trained = set(drift.last.classes) if drift is not None else set(manifest.classes)
    decided: dict[str, Any] = {
        "verdict": verdict,
        "reasons": list(reasons),
        "problems": list(problems),
        "accepted": work.accept if problems else None,
        "new_classes": trained != set(manifest.classes),
        "known_classes": kept if manifest.classes != tuple(sorted(kept)) else [],
        "renewal": renewal(
            last, now, reference.records["decide"]["renewal"] if reference is not None else 0, too_old=too_old
        ),
        "start": asdict(beginning(work, reference, now, manifest, champion, too_old=too_old)),
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


def known_classes(work: Work, reference: Tick | None, now: Facts, champion: Any, *, too_old: bool) -> list[str]:
    """The order of the classes that are known already: the recipe's, else the champion's, where this store trained it.

    About the pictures and recipe of the last training it is what it was then, so that nothing runs twice.
    """
    if work.recipe.data.classes is not None:
        return list(work.recipe.data.classes)
    if reference is not None and same_as_trained(reference, now) and not too_old:
        return list(reference.records["decide"].get("known_classes", ()))
    key = champion.tags.get(STAGE_KEY_TAG) if champion is not None else None
    about = read_json(work.store.stage(key) / "stage.json") if key else None
    return list(about["classes"]) if about is not None else []


def same_as_trained(reference: Tick, now: Facts) -> bool:
    """Whether the last training was about these pictures and this recipe."""
    last = facts_of(reference)
    return (last.fingerprint, last.recipe) == (now.fingerprint, now.recipe)


def beginning(
    work: Work, reference: Tick | None, now: Facts, manifest: Manifest, champion: Any, *, too_old: bool
) -> Beginning:
    """Where training would start; about the pictures and recipe of the last training as it did, so that nothing runs twice."""
    last = facts_of(reference) if reference is not None else None
    if reference is not None and same_as_trained(reference, now) and not too_old:
        return Beginning.from_json(reference.records["decide"].get("start"))
    return choose_beginning(
        work.pipeline.start.warm,
        work.recipe,
        champion,
        work.store,
        manifest.classes,
        recipe_changed=last is not None and last.recipe != now.recipe,
    )


def check_folders(pipeline: Pipeline) -> None:
    """DatasetError for a watched folder that is absent or holds no file: a share that is not mounted is no lost data."""
    for folder in pipeline.watch.folders:
        if not folder.is_dir():
            raise DatasetError(f"[watch] {folder}: no such folder; mount it, or mend [watch] folders")
        if not any(path.is_file() for path in folder.rglob("*")):
            raise DatasetError(f"[watch] {folder}: holds no file; is it mounted?")


def drift_from(work: Work, reference: Tick | None, manifest: Manifest) -> Drift | None:
    """How the data differ from those of the newest tick that trained; None: there was none."""
    if reference is None:
        return None
    last = Summary.from_json(reference.records["scan"]["summary"])
    try:
        contents = moved(read_manifest(work.store.data(last.fingerprint)), manifest)
    except StoreError:                  # deleted to free space, or broken: counts are in the record, pictures are not
        contents = None
    return compare(last, summarise(manifest), max_bad=work.recipe.data.max_bad, contents=contents)


def recipe_digest(recipe: Recipe) -> str:
    """16 hex characters for all that a recipe says; comments, order and keys at their defaults do not count."""
    return digest(recipe.model_dump(mode="json", exclude_defaults=True), hex_characters=16)
