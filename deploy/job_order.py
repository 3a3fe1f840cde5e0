"""What a job is to do: `vggrow train` of a recipe or a tick of a pipeline, with its key, its command and its variables."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.job_package import JobFiles, portable_text
from deploy.pipeline_file import Pipeline
from training.worker_count import WorkerCount, workers_text
from vggcore.digest import digest
from vggcore.errors import ClusterError
from vggcore.recipe import load_recipe, parse_toml, read_words
from vggcore.schedule import resolve_stages, schedule_key, stage_keys

STOP_S = 30                          # between SIGINT and SIGKILL; training takes at most 20 s to write its checkpoint

# Ray's own stop is SIGTERM and, 3 s later, SIGKILL.
CLEAN_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}


@dataclass(frozen=True)
class Order:
    """What is asked of the cluster: one command, and what it is known by."""

    recipe: str                      # its name
    pipeline: str                    # the name of the pipeline whose tick this is; "": a recipe's training
    key: str                         # 16 hex; see train_order and tick_order
    named: str                       # 16 hex: what the job is known by where the schedule's key is not known
    store: str
    workers: WorkerCount
    words: tuple[str, ...]           # after the interpreter
    env: Mapping[str, str]


def is_pipeline(path: Path) -> bool:
    """Whether a file is a pipeline, which names a recipe, and not a recipe. RecipeError when it is not TOML."""
    return "recipe" in parse_toml(read_words(path, "a recipe or a pipeline file"), place=str(path))


def train_order(
    recipe: Path,
    files: JobFiles,
    *,
    store: str,
    workers: WorkerCount,
    threads: int | None,
    device: str | None,
    tracking: str | None,
    env: Mapping[str, str],
    more: Sequence[str] = (),
) -> Order:
    """The job that runs `vggrow train`, with `more` options.

    Its key is the schedule's where it is known here, else the recipe's digest.

    Raises RecipeError for the recipe, ClusterError for a store that is no absolute path.
    """
    if not Path(store).is_absolute():
        raise ClusterError(f"--store {store}: wanted an absolute path, of a folder that every node of the cluster mounts there")
    loaded = load_recipe(recipe)
    words = ["-m", "deploy", "train", files.main, "--address", "auto", "--workers", workers_text(workers)]
    words += ["--threads", str(threads)] if threads else []
    words += ["--device", device] if device else []
    words += ["--store", store]
    words += ["--tracking", tracking] if tracking else []
    words += more
    named = digest({"name": loaded.name, "text": portable_text(recipe, loaded)}, hex_characters=16)
    return Order(
        recipe=loaded.name,
        pipeline="",
        key=known_schedule_key(recipe, Path(store)) or named,
        named=named,
        store=store,
        workers=workers,
        words=tuple(words),
        env={**env, **CLEAN_STOP},
    )


def tick_order(
    pipeline: Pipeline, files: JobFiles, *, dry_run: bool, accept: str | None, env: Mapping[str, str]
) -> Order:
    """The job that runs one tick of a pipeline, known by the pipeline's name, its store, and whether it is a dry run.

    Raises RecipeError for the pipeline's recipe.
    """
    name, store = pipeline.name, str(pipeline.run.store)
    words = ["-m", "deploy", "retrain", files.main]
    words += ["--dry-run"] if dry_run else []
    words += ["--accept", accept] if accept is not None else []
    key = digest({"pipeline": name, "store": store, "dry_run": dry_run}, hex_characters=16)
    return Order(
        recipe=load_recipe(pipeline.recipe).name,
        pipeline=name,
        key=key,
        named=key,
        store=store,
        workers=pipeline.run.workers,
        words=tuple(words),
        env={**env, **CLEAN_STOP},
    )


def known_schedule_key(recipe: Path, store: Path) -> str | None:
    """The schedule's key by the last scan of its pictures, where this machine sees the store and a scan is in it."""
    if not (store / "data").is_dir():
        return None
    from deploy.scans import known_manifest
    from training.parents import known_order, settle
    from training.store import Store

    loaded = load_recipe(recipe)
    manifest = known_manifest(loaded.data, Store(store))
    if manifest is None:
        return None
    manifest = manifest.in_order(known_order(resolve_stages(loaded), Store(store), loaded.data))
    stages = settle(resolve_stages(loaded), Store(store), manifest.fingerprint)
    keys = stage_keys(stages, classes=manifest.classes, fingerprint=manifest.fingerprint)
    return schedule_key(loaded.name, keys)


def read_env(pairs: Sequence[str], *, place: str = "--env") -> dict[str, str]:
    """["K=V", "NAME"] as variables; a name alone has its value in this shell. ClusterError for what is neither."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name.isidentifier():
            raise ClusterError(f"{place} {name}: wanted NAME=VALUE, or the NAME of a variable of this shell")
        if name in CLEAN_STOP:
            raise ClusterError(f"{place} {name}: is set by vggrow, so that a stopped job leaves a checkpoint; leave it out")
        if not equals and name not in os.environ:
            raise ClusterError(f"{place} {name}: no such variable in this shell; set it here first")
        found[name] = value if equals else os.environ[name]
    return found


def command_line(python: str, words: Sequence[str]) -> str:
    """What the head's shell runs. exec: the signal that stops a job goes to Python, not to a shell."""
    return f"exec {shlex.join([python, *words])}"
