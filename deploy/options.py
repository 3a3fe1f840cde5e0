"""The options that many commands have, and how they print JSON."""

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from training.store import DEFAULT_STORE
from training.worker_count import WorkerCount, read_workers
from vggcore.recipe_checks import LARGEST_SIDE

MOST_CLASSES = 100_000      # of a net that is planned or summarised
MOST_PICTURES = 10**9
DIGITS = 7                  # of a number of pixels, and more than any has

Command = TypeVar("Command", bound=Callable[..., Any])


class WorkerRange(click.ParamType[WorkerCount]):
    """N or MIN:MAX, as training.worker_count has it."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> WorkerCount:
        """A default may come as it is used."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            return read_workers(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """What the help shows."""
        return "N|MIN:MAX"


class FiniteRange(click.FloatRange):
    """A range of numbers that nan, which is above and below nothing, and inf are not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value}", param, ctx)
        return number


class Scales(click.ParamType[tuple[int, ...]]):
    """'96,160'; other than `ascending` in any order."""

    name = "scales"

    def __init__(self, *, ascending: bool = True) -> None:
        """ascending: refuse another order."""
        self.ascending = ascending

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Numbers of pixels, each once."""
        parts = [part.strip() for part in str(value).split(",")]
        numbers = [int(part) for part in parts if part.isdecimal() and len(part) < DIGITS and 0 < int(part) <= LARGEST_SIDE]
        order = sorted(set(numbers)) if self.ascending else list(dict.fromkeys(numbers))
        if len(numbers) != len(parts) or numbers != order:
            how = "ascending" if self.ascending else "each once"
            wanted = f"expected numbers of pixels up to {LARGEST_SIDE:,}, {how}, with commas, such as 96,160"
            self.fail(f"{value!r}: {wanted}", param, ctx)
        return tuple(numbers)


def store_option(command: Command) -> Command:
    """--store, the folder that holds all results."""
    return click.option(
        "--store",
        default="vggrow-store",
        envvar="VGGROW_STORE",
        show_default=True,
        show_envvar=True,
        metavar="DIR",
        help="Folder that holds data, stages and results; on a cluster one that every node mounts at the same path.",
    )(command)


def tracking_option(command: Command) -> Command:
    """--tracking, the MLflow store."""
    return click.option(
        "--tracking",
        envvar="MLFLOW_TRACKING_URI",
        show_envvar=True,
        metavar="URI",
        help="MLflow server (http://HOST:PORT) or sqlite:///FILE.  [default: mlflow.db in the store]",
    )(command)


def stall_option(command: Command) -> Command:
    """--stall-limit, for workers that hang."""
    return click.option(
        "--stall-limit",
        type=FiniteRange(1),
        default=600.0,
        show_default=True,
        metavar="SECONDS",
        help="How long a worker may be silent, hung or waited for, before the stage's workers are started anew.",
    )(command)


def log_pictures_option(command: Command) -> Command:
    """--log-pictures, for who wants to check."""
    return click.option(
        "--log-pictures",
        is_flag=True,
        help="Keep which pictures each worker trained in each iteration, in the stage's folder; some bytes a picture.",
    )(command)


def json_option(command: Command) -> Command:
    """--json, for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def print_json(value: Any) -> None:
    """JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def command_name() -> str:
    """How this command is typed here: vggrow, or the path to it where it is not on PATH."""
    beside = Path(sys.executable).with_name("vggrow")
    return "vggrow" if shutil.which("vggrow") or not beside.exists() else os.path.relpath(beside)


def elsewhere(store: str) -> str:
    """The store as an option to append to a printed command, quoted; empty where it is the usual one."""
    return "" if store == DEFAULT_STORE else f" --store {shlex.quote(store)}"
