"""The registry's commands that decide: compare, promote, rollback, renew-gate; `register` adds them to `vggrow models`.

Exit 3 where the gate says no. Heavy imports stay inside the commands.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from deploy.options import FiniteRange, json_option, store_option, tracking_option

REFUSED_EXIT = 3


def gate_options(command: Any) -> Any:
    """What the gate asks for, each with the rule's default."""
    for option in reversed(
        [
            click.option(
                "--metric",
                type=click.Choice(["top1", "balanced"]),
                default="top1",
                show_default=True,
                help="What must be better: top-1 accuracy, or the mean of the classes' recalls.",
            ),
            click.option(
                "--alpha",
                type=FiniteRange(0, 0.5, min_open=True),
                default=0.05,
                show_default=True,
                help="Chance that a model no better is promoted, over all planned uses of one gate list.",
            ),
            click.option(
                "--planned-uses",
                type=click.IntRange(1),
                default=52,
                show_default=True,
                help="Decisions that one gate list is planned for.",
            ),
            click.option(
                "--min-gain",
                type=FiniteRange(0, 1, max_open=True),
                default=0.0,
                show_default=True,
                help="What the gain's lower bound must exceed, 0..1.",
            ),
            click.option(
                "--max-class-drop",
                type=FiniteRange(0, 1),
                default=0.05,
                show_default=True,
                help="How far a class's recall may fall, 0..1.",
            ),
            click.option("--max-size-mib", type=FiniteRange(0, min_open=True), help="Weights, MiB.  [default: any]"),
            click.option(
                "--max-latency-ms",
                type=FiniteRange(0, min_open=True),
                help="From a picture's file to the answer on this machine's CPU, ms.  [default: any]",
            ),
        ]
    ):
        command = option(command)
    return command


def rules_of(options: dict[str, Any]) -> Any:
    """GateRules from the options."""
    from deploy.gate import GateRules

    return GateRules(**options)


def opened(store: str, tracking: str | None) -> tuple[Any, Any]:
    """The store, and an MLflow client whose server was asked whether it answers."""
    from deploy.tracking_address import check_tracking, resolve_tracking
    from training.store import open_store

    found = open_store(store)
    uri = resolve_tracking(tracking, found.root)
    check_tracking(uri)
    from mlflow import MlflowClient

    return found, MlflowClient(uri)


@contextmanager
def server_may_go(tracking: str) -> Iterator[None]:
    """A server that stops answering in the middle, as one line: what it answers is our own matter and passes."""
    import requests
    from mlflow.exceptions import MlflowException, RestException

    from deploy.tracking_address import one_line, shown
    from vggcore.errors import TrackingError

    try:
        yield
    except (MlflowException, requests.ConnectionError, requests.Timeout) as error:
        if isinstance(error, RestException) or (isinstance(error, MlflowException) and "API request" not in str(error)):
            raise
        raise TrackingError(
            f"--tracking {shown(tracking)}: no longer answers ({one_line(error)}); the same command goes on where this one was"
        ) from error


def notify_option(command: Any) -> Any:
    """--notify, the webhook."""
    return click.option(
        "--notify",
        metavar="URL",
        envvar="VGGROW_WEBHOOK_URL",
        show_envvar=True,
        help="Webhook that is told of the decision, signed with the secret in VGGROW_WEBHOOK_SECRET.  [default: none is told]",
    )(command)


def webhook_of(url: str | None) -> tuple[Any, bytes] | None:
    """The webhook's address and the secret that signs, both checked before anything is decided."""
    if url is None:
        return None
    from pydantic import ValidationError

    from deploy.notify import read_secret
    from deploy.pipeline_file import Notify
    from vggcore.errors import RecipeError

    try:
        notify = Notify(url=url)
    except ValidationError as error:
        raise RecipeError(f"--notify: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    return notify, read_secret(notify, place="--notify")


def tell(webhook: tuple[Any, bytes] | None, store: Any, name: str) -> str | None:
    """Tells the webhook what it has not heard about model `name`; how that ended, None where none is to be told."""
    if webhook is None:
        return None
    from deploy.registry_webhook import tell_waiting

    return "waits" if tell_waiting(store, name, *webhook) else "told"


@click.command()
@click.argument("a")
@click.argument("b")
@gate_options
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the evidence as a PNG to this file.")
def compare(
    a: str, b: str, out: Path | None, store: str, tracking: str | None, as_json: bool, **options: Any
) -> None:
    """Show what the gate would say of model A in the place of B: counts, classes, each condition. Records nothing.

    A and B are models:/NAME@ALIAS, models:/NAME/VERSION, a package's folder, or a finished stage of the store; they are
    scored on the gate list of A's pictures. To look here until one passes is to test many times: decide by promote.

    \b
    Example:
        vggrow models compare models:/elpv@challenger models:/elpv@champion --out evidence.png
    """
    rules = rules_of(options)
    found, client = opened(store, tracking)
    from deploy.contenders import compare as compare_models
    from deploy.decision_page import decision_text
    from deploy.gate_chart import decision_figure
    from deploy.own_output import check_figure
    from vggcore.whole_file import whole_file

    if out is not None:
        check_figure(out)
    with server_may_go(client.tracking_uri):
        decision = compare_models(client, store=found, a=a, b=b, rules=rules)
    if out is not None:
        with whole_file(out) as part:
            part.write_bytes(decision_figure(decision))
    told = decision.to_json()
    click.echo(json.dumps(told, indent=2, ensure_ascii=False) if as_json else decision_text(told))


@click.command()
@click.argument("model")
@gate_options
@click.option(
    "--floor",
    type=FiniteRange(0, 1),
    default=0.0,
    show_default=True,
    help="Test top-1, 0..1, that a first version must reach where there is no champion.",
)
@click.option("--to", metavar="NAME", help="Copy the version into this production model, and move its champion.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; change nothing, count nothing.")
@click.option("--force", is_flag=True, help="Promote by hand, without asking the gate; needs --reason.")
@click.option("--reason", metavar="WORDS", help="Why it is forced; recorded.")
@notify_option
def promote(
    model: str,
    floor: float,
    to: str | None,
    dry_run: bool,
    force: bool,
    reason: str | None,
    notify: str | None,
    store: str,
    tracking: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make MODEL champion if the gate lets it; the decision is recorded either way. Exit 3 when it is refused.

    MODEL is a registered model's NAME (its challenger, else its newest version), models:/NAME@ALIAS or models:/NAME/VERSION.
    The champion before becomes `previous`. Each decision is one use of the gate list; the same question again is none.
    A webhook that does not answer undoes nothing: it is told by the next command that promotes or rolls back with --notify.

    \b
    Examples:
        vggrow models promote elpv
        vggrow models promote models:/elpv/3 --dry-run
        vggrow models promote elpv --notify https://example.org/hook
        vggrow models promote models:/elpv/3 --force --reason "the old one fails on wet cells"
    """
    if force and not (reason or "").strip():
        raise click.UsageError('--force needs --reason "WORDS", which is recorded')
    if reason is not None and not force:
        raise click.UsageError("--reason has no effect without --force; add --force, or remove --reason")
    rules = rules_of(options)
    webhook = None if dry_run else webhook_of(notify)
    found, client = opened(store, tracking)
    from deploy.decision_page import decision_text
    from deploy.decision_record import REFUSED
    from deploy.promote import outcome_text
    from deploy.promote import promote as promote_model

    with server_may_go(client.tracking_uri):
        outcome = promote_model(
            client,
            store=found,
            model=model,
            rules=rules,
            to=to,
            floor=floor,
            dry_run=dry_run,
            force=reason if force else None,
            tell=webhook is not None,
        )
    told = tell(webhook, found, to or outcome.model)
    if as_json:
        click.echo(json.dumps({**vars(outcome), "webhook": told}, indent=2, ensure_ascii=False))
    else:
        if outcome.decision is not None:
            click.echo(decision_text(outcome.decision) + "\n")
        click.echo(outcome_text(outcome))
    if outcome.action == REFUSED:
        sys.exit(REFUSED_EXIT)


@click.command()
@click.argument("name")
@click.option("--reason", metavar="WORDS", help="Why; recorded.")
@notify_option
def rollback(
    name: str, reason: str | None, notify: str | None, store: str, tracking: str | None, as_json: bool
) -> None:
    """Put the previous champion of model NAME back; the one rolled back returns by --force alone.

    \b
    Example:
        vggrow models rollback elpv --reason "complaints from the line"
    """
    webhook = webhook_of(notify)
    found, client = opened(store, tracking)
    from deploy.promote import outcome_text
    from deploy.promote import rollback as roll_back

    with server_may_go(client.tracking_uri):
        outcome = roll_back(client, store=found, name=name, reason=reason, tell=webhook is not None)
    told = {**vars(outcome), "webhook": tell(webhook, found, name)}
    click.echo(json.dumps(told, indent=2, ensure_ascii=False) if as_json else outcome_text(outcome))


@click.command("renew-gate")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def renew_gate(recipe: Path, store: str, as_json: bool) -> None:
    """Choose a new gate list for the pictures of RECIPE; the count of uses starts again.

    Taken from test pictures that were on no list before, so that models trained so far may still be judged by it. The
    pictures of the old list go to test. Champions are scored again at the next decision.

    \b
    Example:
        vggrow models renew-gate training/recipes/elpv.toml
    """
    from vggcore.recipe import load_recipe

    data = load_recipe(recipe).data
    from deploy.scans import scan_data
    from pipelines.scan import scan
    from training.store import open_store

    found, threads = open_store(store), len(os.sched_getaffinity(0))
    scan(data, found.root, threads=threads, renew_gate=True)
    manifest = scan_data(data, found, threads=threads)   # decodes nothing; `vggrow plan` asks for the last scan
    assert manifest.gate is not None
    gate, pictures = manifest.gate.digest, len(manifest.split("gate"))
    if as_json:
        click.echo(json.dumps({"gate_list": gate, "pictures": pictures, "fingerprint": manifest.fingerprint}, indent=2))
    else:
        click.echo(f"new gate list {gate}: {pictures:,} pictures; fingerprint: {manifest.fingerprint}")


def register(group: click.Group) -> None:
    """Adds the commands, with the options that all of the registry's have."""
    for command in (compare, promote, rollback):
        group.add_command(json_option(tracking_option(store_option(command))))
    group.add_command(json_option(store_option(renew_gate)))
