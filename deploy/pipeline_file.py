"""The pipeline file: one TOML that says what is retrained, when, and what a new model must prove; refused when wrong."""

import os
import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from vggcore.errors import RecipeError
from vggcore.recipe import Count, Frozen, array, describe, nearest, place_name

if TYPE_CHECKING:
    from deploy.gate import GateRules

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
AnyPath = Annotated[Path, Field(strict=False)]
UNITS = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days"}
SQLITE = "sqlite:///"


def parse_age(text: str) -> timedelta:
    """'30d', '12h', '90min' or '45s' as a time; ValueError for anything else."""
    found = re.fullmatch(r"(\d+)\s*(s|min|h|d)", text.strip())
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

    warm: Literal["champion", "scratch"] = "scratch"
    max_age: str | None = None                # '30d': then the schedule is trained again with the next seed

    @field_validator("warm")
    @classmethod
    def warm_can_be_had(cls, warm: str) -> str:
        if warm == "champion":
            raise ValueError(
                "found 'champion', which cannot be had yet: a schedule's first stage starts from random weights;"
                ' set warm = "scratch"'
            )
        return warm

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

    def rules(self) -> "GateRules":
        """The rules as the gate takes them. Raises RecipeError for numbers that cannot be."""
        from deploy.gate import GateRules

        return GateRules(**self.model_dump())


class Run(Frozen):
    """Where ticks run and where their results go; paths count from the pipeline file's own folder."""

    workers: Count = 1
    store: AnyPath = Path("vggrow-store")
    tracking: str | None = None               # not given: mlflow.db in the store


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


TABLES: dict[str, type[BaseModel]] = {
    "watch": Watch,
    "timetable": Timetable,
    "start": Start,
    "gate": Gate,
    "run": Run,
    "notify": Notify,
}


def load_pipeline(path: Path) -> Pipeline:
    """Reads and checks the pipeline file at `path`; relative paths in it count from its own folder.

    Raises RecipeError, one line that names the file, the place, what was found and what was wanted. The recipe is not read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a pipeline file: {error}") from error
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error
    try:
        pipeline = Pipeline.model_validate(tables)
    except ValidationError as error:
        raise RecipeError(f"{path}: {'; '.join(complaint(detail, tables) for detail in error.errors())}") from error
    try:
        pipeline.gate.rules()
    except RecipeError as error:
        raise RecipeError(f"{path}: [gate] {str(error).removeprefix('gate: ')}") from error
    pipeline = with_absolute_paths(pipeline, path.absolute().parent)
    if not pipeline.recipe.is_file():
        found = str(pipeline.recipe)
        raise RecipeError(f"{path}: recipe: {found!r} is no file; name the recipe to train, from this file's folder")
    return pipeline


def with_absolute_paths(pipeline: Pipeline, folder: Path) -> Pipeline:
    """The same pipeline, its relative paths counted from `folder`."""

    def absolute(path: Path) -> Path:
        return Path(os.path.normpath(folder / path.expanduser()))

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


def complaint(detail: ErrorDetails, tables: dict[str, Any]) -> str:
    """One pydantic complaint in the recipe's words; an unknown key names the nearest of this file's own."""
    at = detail["loc"]
    if detail["type"] != "extra_forbidden":
        return describe(detail, tables)
    return f"{place_name(at[:-1], tables)}unknown key {str(at[-1])!r}{nearest(str(at[-1]), known_keys(at[:-1]))}"


def known_keys(at: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at this place may have."""
    model = TABLES[str(at[0])] if at else Pipeline
    return list(model.model_fields)
