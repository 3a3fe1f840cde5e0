"""What is wanted of a cluster, made of a recipe's or a pipeline's file, and handed over: packed, or in a container."""

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.job_container import container, container_command, mounted_folders
from deploy.job_order import Order, command_line, read_env, tick_order, train_order
from deploy.job_package import JobFiles, pack, pipeline_files, recipe_files
from deploy.jobs import Job, Jobs
from deploy.pipeline_file import Pipeline, load_pipeline
from deploy.tracking_address import resolve_tracking
from training.worker_count import WorkerCount
from vggcore.recipe import load_recipe


@dataclass(frozen=True)
class Request:
    """What a person wants of a cluster: the order and its files, and what a container of it must see."""

    order: Order
    files: JobFiles
    mounts: list[str]


def train_request(
    recipe: Path,
    *,
    store: str,
    workers: WorkerCount,
    threads: int | None,
    device: str | None,
    tracking: str | None,
    env: Mapping[str, str],
    working_dir: Path | None,
    more: Sequence[str] = (),
) -> Request:
    """The training of a recipe; more: further options of `vggrow train`. Raises VggrowError for what is wrong with it."""
    load_recipe(recipe)
    files = recipe_files(recipe, working_dir)
    order = train_order(
        recipe,
        files,
        store=store,
        workers=workers,
        threads=threads,
        device=device,
        tracking=resolve_tracking(tracking, Path(store)) if tracking else None,
        env=env,
        more=more,
    )
    return Request(order, files, mounted_folders(recipe, store, None))


def load_pipeline_for(
    path: Path, *, workers: WorkerCount | None, threads: int | None, device: Literal["cpu", "cuda"] | None
) -> Pipeline:
    """The pipeline of a file, with what was given in place of its own."""
    loaded = load_pipeline(path)
    given = {"workers": workers, "threads": threads, "device": device}
    changes = {name: value for name, value in given.items() if value is not None}
    return loaded.model_copy(update={"run": loaded.run.model_copy(update=changes)})


def tick_request(
    path: Path,
    pipeline: Pipeline,
    *,
    env: Mapping[str, str] | None = None,
    working_dir: Path | None = None,
    dry_run: bool = False,
    accept: str | None = None,
) -> Request:
    """A tick of a pipeline; `env` comes on top of what its [run] env names. Raises VggrowError for what is wrong with it."""
    variables = read_env(pipeline.run.env, place=f"{path}: [run] env") | dict(env or {})
    files = pipeline_files(path, pipeline, working_dir)
    order = tick_order(pipeline, files, dry_run=dry_run, accept=accept, env=variables)
    return Request(order, files, mounted_folders(pipeline.recipe, order.store, pipeline))


@dataclass(frozen=True)
class Handed:
    """A job that does what was asked for: a new one, or one that was running already."""

    cluster: Jobs
    job: Job
    fresh: bool
    before: Job | None               # the newest earlier attempt of a new one
    files: int                       # how many were packed
    size: int                        # bytes that travel for a new one
    other_accept: bool               # the job that was running has not the reason that --accept gives

    @property
    def words(self) -> str:
        """The line on stdout."""
        return f"{'submitted' if self.fresh else 'running'} {self.job.id}"


def hand_over(
    request: Request,
    address: str,
    *,
    python: str | None = None,
    working_dir: Path | None = None,
    installed: bool = False,
    image: str | None = None,
) -> Handed:
    """Hands a request to the cluster at `address`, unless a job that serves it runs there. Raises VggrowError."""
    order = request.order
    cluster = Jobs(address)
    with tempfile.TemporaryDirectory() as folder:
        runtime_env: dict[str, Any]
        if image is not None:
            entrypoint = container_command(request.files, order.words, python=python)
            runtime_env = container(image, request.mounts, order.env)
            size, files = len(entrypoint.encode()), len(request.files.texts)
        else:
            package = pack(request.files, Path(folder), working_dir=working_dir, installed=installed)
            entrypoint = command_line(python or cluster.python(), order.words)
            runtime_env = {"working_dir": str(package.path)}
            size, files = package.bytes, package.files
        found = cluster.submit(order, entrypoint=entrypoint, runtime_env=runtime_env)
    accepts = "--accept" in order.words
    return Handed(
        cluster=cluster,
        job=found.job,
        fresh=found.fresh,
        before=found.before,
        files=files,
        size=size,
        other_accept=accepts and order.words[-1] not in shlex.split(found.job.command),
    )
