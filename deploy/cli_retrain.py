"""The commands of retraining: retrain, history, timetable; deploy/cli.py adds them by `register(vggrow)`."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.options import print_json
from vggcore.errors import DatasetError

if TYPE_CHECKING:
    from deploy.pipeline_file import Pipeline
    from deploy.ticks import Tick

PIPELINE = click.Path(exists=True, dir_okay=False, path_type=Path)


def register(group: click.Group) -> None:
    """Adds the commands to the command line."""
    for command in (retrain, history, timetable):
        group.add_command(command)


@click.command()
@click.argument("pipeline", type=PIPELINE, metavar="PIPELINE.toml")
@click.option("--dry-run", is_flag=True, help="Scan and decide only: say what a tick would do; record and train nothing.")
@click.option("--accept", metavar="REASON", help="Train although the data got worse; the reason is recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def retrain(pipeline: Path, dry_run: bool, accept: str | None, as_json: bool) -> None:
    """Run one tick of a pipeline: if anything is new, train, evaluate, register, ask the gate, promote, notify.

    Nothing new: says so, exit 0. A refusal by the gate is a finished tick: exit 0. Data that got worse stop the tick before
    any training: exit 2. A tick that was killed anywhere is taken up by the same command.

    With [run] address = "http://HEAD:8265" the tick is a job on that cluster: its words come on stderr, its exit code is
    this command's, and Ctrl-C leaves it running; the same command then follows it again.

    \b
    Examples:
        vggrow retrain pipeline.toml
        vggrow retrain pipeline.toml --dry-run
        vggrow retrain pipeline.toml --accept "class 'scratched' is no longer made"
    """
    from deploy.pipeline_file import check_start, load_pipeline

    loaded = load_pipeline(pipeline)
    if accept is not None and not accept.strip():
        raise click.UsageError('--accept needs a REASON, which is recorded; it is empty')
    if loaded.run.is_job:
        sys.exit(run_as_job(pipeline, loaded, dry_run=dry_run, accept=accept, as_json=as_json))
    from deploy.notify import read_secret
    from deploy.tracking_address import check_tracking, resolve_tracking
    from training.ray_address import check_address
    from vggcore.recipe import load_recipe

    check_start(loaded, load_recipe(loaded.recipe))     # all answer at once; the tick itself loads torch first
    if loaded.notify is not None:
        read_secret(loaded.notify)
    if loaded.run.address is not None:
        check_address(loaded.run.address)
    check_tracking(resolve_tracking(loaded.run.tracking, loaded.run.store), before_store=True)
    from deploy.retrain import retrain as run_tick
    from deploy.retrain import tick_text
    from deploy.ticks import stop_problem
    from training.stop_switch import Interrupted

    try:
        tick = run_tick(loaded, dry_run=dry_run, accept=accept)
    except Interrupted:
        click.echo("interrupted; the same command goes on where this tick was", err=True)
        sys.exit(130)
    problem = stop_problem(tick)
    if as_json:
        print_json(tick.to_json())
    elif problem is None:
        click.echo("\n".join(tick_text(tick)))
    if problem is not None:
        may = ", or train on them by --accept REASON" if tick.records["scan"]["problem"] is None else ""
        raise DatasetError(f"{pipeline}: {problem}; mend the pictures{may}")


def run_as_job(path: Path, pipeline: "Pipeline", *, dry_run: bool, accept: str | None, as_json: bool) -> int:
    """Hands the tick to the cluster, or finds it there, and follows it to its end: its exit code; 130 when we are stopped."""
    from deploy.cli_jobs import as_dict, follow_job, tell
    from deploy.job_request import hand_over, tick_request

    signal.signal(signal.SIGTERM, signal.default_int_handler)        # as Ctrl-C: the job goes on
    request = tick_request(path, pipeline, dry_run=dry_run, accept=accept)
    assert pipeline.run.address is not None
    handed = hand_over(request, pipeline.run.address, python=os.environ.get("VGGROW_CLUSTER_PYTHON"))
    tell(handed)
    if not as_json:
        click.echo(handed.words)
    job, code = follow_job(handed.cluster, handed.job.id, to_stderr=True)
    if as_json:
        tick = None if dry_run else last_tick(pipeline)
        print_json(tick.to_json() if tick is not None else as_dict(job))
    return code


def last_tick(pipeline: "Pipeline") -> "Tick | None":
    """The newest tick in the store; None where this machine does not see the store."""
    from deploy.ticks import Ticks
    from training.store import Store

    ticks = Ticks.of(Store(pipeline.run.store), pipeline.name).all()
    return ticks[-1] if ticks else None


@click.command()
@click.argument("pipeline", type=PIPELINE, metavar="PIPELINE.toml")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Also write the page to this HTML file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def history(pipeline: Path, out: Path | None, as_json: bool) -> None:
    """List the ticks of a pipeline: when, what was decided and why, which version was champion; and decisions by hand.

    \b
    Examples:
        vggrow history pipeline.toml
        vggrow history pipeline.toml --out history.html
    """
    from deploy.pipeline_file import load_pipeline

    loaded = load_pipeline(pipeline)
    from deploy.history_page import by_hand, history_text, write_page
    from deploy.ticks import Ticks
    from training.store import Store

    ticks, decisions = Ticks.of(Store(loaded.run.store), loaded.name).all(), by_hand(loaded)
    if out is not None:
        write_page(loaded, ticks, decisions, out)
    if as_json:
        print_json([tick.to_json() for tick in ticks])
    else:
        click.echo(history_text(ticks, decisions))
        if out is not None:
            click.echo(f"page: {out}")


@click.group()
def timetable() -> None:
    """When pipelines are retrained, and the process that does it."""


@timetable.command("run")
@click.argument("pipelines", nargs=-1, required=True, type=PIPELINE, metavar="PIPELINE.toml...")
def timetable_run(pipelines: tuple[Path, ...]) -> None:
    """Start ticks of each PIPELINE at the times of its [timetable], until Ctrl-C or SIGTERM.

    Each tick is a process of its own. A time that was missed is caught up once. On SIGTERM a tick that runs stops where
    nothing is half done; the next start goes on there.

    \b
    Example:
        vggrow timetable run solar.toml pets.toml
    """
    from deploy.timetable import run_timetable

    run_timetable(pipelines, lambda words: click.echo(words, err=True))


@timetable.command("next")
@click.argument("pipelines", nargs=-1, required=True, type=PIPELINE, metavar="PIPELINE.toml...")
@click.option("--count", type=click.IntRange(1, 1000), default=3, show_default=True, help="Times a pipeline.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def timetable_next(pipelines: tuple[Path, ...], count: int, as_json: bool) -> None:
    """Say when each PIPELINE is next, on the clocks of its time zone. Starts nothing.

    \b
    Example:
        vggrow timetable next pipeline.toml --count 5
    """
    import datetime

    from deploy.timetable import load_entries, next_text

    found = [entry.to_json(count, datetime.datetime.now(datetime.UTC)) for entry in load_entries(pipelines)]
    if as_json:
        print_json([{"name": entry["name"], "next": entry["next"]} for entry in found])
    else:
        click.echo(next_text(found))


@timetable.command("list")
@click.argument("pipelines", nargs=-1, required=True, type=PIPELINE, metavar="PIPELINE.toml...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def timetable_list(pipelines: tuple[Path, ...], as_json: bool) -> None:
    """List each PIPELINE with its timetable, its store, its last tick and its next time. Starts nothing.

    \b
    Example:
        vggrow timetable list solar.toml pets.toml
    """
    import datetime

    from deploy.timetable import list_text, load_entries

    found = [entry.to_json(1, datetime.datetime.now(datetime.UTC)) for entry in load_entries(pipelines)]
    if as_json:
        print_json(found)
    else:
        click.echo(list_text(found))
