"""The options that many commands have, and how they print JSON."""

import json
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
        type=click.FloatRange(1),
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
