"""The options that many commands have, and how they print JSON."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


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


def json_option(command: Command) -> Command:
    """--json, for programs."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def print_json(value: Any) -> None:
    """JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
