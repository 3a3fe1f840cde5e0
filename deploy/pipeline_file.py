"""The pipeline file: one TOML that says what is retrained, when, and what a new model must prove; refused when wrong."""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from deploy.tracking_address import shown
from training.worker_count import WorkerCount, read_workers
from vggcore.errors import RecipeError
from vggcore.home_path import at_home
from vggcore.recipe import (
    Count,
    Frozen,
    NewRows,
    Positive,
    Recipe,
    array,
    parse_toml,
    read_words,
)
from vggcore.recipe_checks import registrable, stage_settings
from vggcore.recipe_words import complaints

if TYPE_CHECKING:
    from deploy.gate import GateRules

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
AnyPath = Annotated[Path, Field(strict=False)]
UNITS = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days"}
SQLITE = "sqlite:///"


def parse_age(text: str) -> timedelta:
    """'30d', '12h', '90min' or '45s' as a time; ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,6})\s*(s|min|h|d)", text.strip())
    if not found or int(found[1]) == 0:
        raise ValueError(f"found {text!r}, wanted a time such as '30d', '12h', '90min' or '45s'")
    return timedelta(**{UNITS[found[2]]: int(found[1])})


class Watch(Frozen):
    """Folders that must be there and hold files before a tick reads any picture, such as a share that may not be mounted."""

    folders: Annotated[tuple[AnyPath, ...], BeforeValidator(array)] = ()


class Timetable(Frozen):
    """When `vggrow timetable run` starts a tick: five cron fields on the clocks of a time zone."""

    cron: str
    time_zone: str = "UTC"

    @field_validator("cron")
    @classmethod
    def cron_can_be_read(cls, cron: str) -> str:
        from deploy.cron import Cron

        Cron(cron, "UTC")
        return cron

    @field_validator("time_zone")
    @classmethod
    def time_zone_is_known(cls, time_zone: str) -> str:
        from deploy.cron import find_zone

        find_zone(time_zone)
        return time_zone


class Start(Frozen):
    """Where a retrained model's weights come from, and how old a model may become before it is trained again all the same."""

    warm: Literal["champion", "scratch"] = "scratch"   # "champion": its stage goes on from its weights
    learning_rate: Positive | None = None     # of a warm start; not given: a tenth of the stage's own
    new_rows: NewRows = "means"               # of a warm start: first weights of the last layer for classes that are new
    max_age: str | None = None                # '30d': then it is trained again with the next seed

    @model_validator(mode="after")
    def keys_of_a_warm_start_have_an_effect(self) -> Self:
        for name in ("learning_rate", "new_rows"):
            if name in self.model_fields_set and getattr(self, name) is not None and self.warm != "champion":
                raise ValueError(f'{name} has no effect without warm = "champion"; remove it, or set warm')
        return self

    @field_validator("max_age")
    @classmethod
    def max_age_parses(cls, text: str | None) -> str | None:
        if text is not None:
            parse_age(text)
        return text

    @property
    def age(self) -> timedelta | None:
        """max_age as a time; None: no age is too old."""
        return None if self.max_age is None else parse_age(self.max_age)


class Gate(Frozen):
    """What a challenger must prove to become champion: the rules of deploy/gate.py, with its defaults."""

    metric: Literal["top1", "balanced"] = "top1"
    alpha: float = 0.05
    planned_uses: int = 52
    min_gain: float = 0.0
    max_class_drop: float = 0.05
    max_size_mib: float | None = None
    max_latency_ms: float | None = None
    new_classes: Literal["person", "gate"] = "person"     # who decides about a challenger with classes new to the champion

    def rules(self) -> "GateRules":
        """The rules as the gate takes them. Raises RecipeError for numbers that cannot be."""
        from deploy.gate import GateRules

        return GateRules(**self.model_dump(exclude={"new_classes"}))


def worker_count(value: Any) -> Any:
    """2 or "1:3" as training.worker_count has it."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"found {value!r}, wanted a number of workers, or a range such as '1:3'")
    return read_workers(str(value))


class Run(Frozen):
    """Where ticks run, with how much, and where their results go; paths count from the pipeline file's own folder."""

    # Not given: this machine. "http://HEAD:8265": the whole tick is a job there. "auto", "HOST:PORT": its workers run there.
    address: str | None = None
    workers: Annotated[WorkerCount, BeforeValidator(worker_count)] = 1
    threads: Count | None = None              # a worker; not given: the cores of the tick's machine / workers
    device: Literal["cpu", "cuda"] | None = None         # not given: cuda where the tick's machine has a GPU
    store: AnyPath = Path("vggrow-store")
    tracking: str | None = None               # not given: mlflow.db in the store
    env: Annotated[tuple[str, ...], BeforeValidator(array)] = ()     # names of this shell's variables that a job gets

    @field_validator("address")
    @classmethod
    def address_can_be_reached(cls, address: str | None) -> str | None:
        if address is None or address == "auto":
            return address
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        try:
            good = parts.scheme in ("http", "https", "ray") and parts.hostname and (parts.port or parts.scheme != "ray")
        except ValueError:
            good = False
        if not good or parts.username or parts.password:
            raise ValueError(
                f"found {shown(address)!r}, wanted 'http://HOST:8265' (the whole tick is a job there), or 'auto' or 'HOST:6379'"
                " (its workers run there)"
            )
        return address.rstrip("/")

    @field_validator("env")
    @classmethod
    def env_has_names_alone(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not name.isidentifier():
                raise ValueError(f"found {name.partition('=')[0]!r}, wanted names of variables; their values stay in the shell")
        return names

    @property
    def is_job(self) -> bool:
        """Whether a tick is handed to a cluster as a whole."""
        return self.address is not None and self.address.startswith(("http://", "https://"))


class Notify(Frozen):
    """A webhook that hears of each decision; the secret that signs is read from an environment variable, never from a file."""

    url: str
    secret_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "VGGROW_WEBHOOK_SECRET"

    @field_validator("url")
    @classmethod
    def url_is_a_web_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"found {url!r}, wanted an address such as 'https://HOST/PATH'")
        if parts.username or parts.password:
            raise ValueError("holds a user or a password; the receiver knows us by the signature: remove them")
        return url


class Pipeline(Frozen):
    """A whole pipeline file, checked; after load_pipeline every path in it is absolute."""

    name: Name                                # also the folder of its records: STORE/retraining/<name>
    recipe: AnyPath
    watch: Watch = Watch()
    timetable: Timetable | None = None
    start: Start = Start()
    gate: Gate = Gate()
    run: Run = Run()
    notify: Notify | None = None


def load_pipeline(path: Path) -> Pipeline:
    """Reads and checks the pipeline file at `path`; relative paths in it count from its own folder.

    Raises RecipeError, one line that names the file, the place, what was found and what was wanted. The recipe is not read.
    """
    tables = parse_toml(read_words(path, "a pipeline file"), place=str(path))
    try:
        pipeline = Pipeline.model_validate(tables)
    except ValidationError as error:
        raise RecipeError(f"{path}: {complaints(error, tables, Pipeline)}") from error
    try:
        pipeline.gate.rules()
    except RecipeError as error:
        raise RecipeError(f"{path}: [gate] {str(error).removeprefix('gate: ')}") from error
    pipeline = with_absolute_paths(pipeline, path.absolute().parent, place=f"{path}: ")
    if not pipeline.recipe.is_file():
        found = str(pipeline.recipe)
        raise RecipeError(f"{path}: recipe: {found!r} is no file; name the recipe to train, from this file's folder")
    return pipeline


def check_start(pipeline: Pipeline, recipe: Recipe) -> None:
    """RecipeError for keys of [start] that no champion of `recipe` can use: a logistic fit has no rate and no first rows."""
    written = sorted({"learning_rate", "new_rows"} & pipeline.start.model_fields_set)
    if written and not any(stage_settings(recipe, table)["fit"] == "sgd" for table in registrable(recipe)):
        raise RecipeError(
            f"{pipeline.recipe}: [start] {written[0]} in the pipeline file has no effect: each stage that can become champion"
            ' has fit = "logistic"; remove it'
        )


def with_absolute_paths(pipeline: Pipeline, folder: Path, *, place: str) -> Pipeline:
    """The same pipeline, its relative paths counted from `folder`. Raises RecipeError, after `place`, for an unknown home."""

    def absolute(path: Path) -> Path:
        return Path(os.path.normpath(folder / at_home(path, RecipeError, place=place)))

    run = pipeline.run
    tracking = run.tracking
    if tracking is not None and tracking.startswith(SQLITE):
        tracking = f"{SQLITE}{absolute(Path(tracking.removeprefix(SQLITE)))}"
    return pipeline.model_copy(
        update={
            "recipe": absolute(pipeline.recipe),
            "watch": Watch(folders=tuple(map(absolute, pipeline.watch.folders))),
            "run": run.model_copy(update={"store": absolute(run.store), "tracking": tracking}),
        }
    )
