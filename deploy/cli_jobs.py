"""`vggrow submit` and `vggrow jobs`: a recipe or a pipeline's tick as a job on a Ray cluster, and what became of it."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from deploy.options import Command, WorkerRange, json_option, log_pictures_option, print_json, stall_option
from training.worker_count import WorkerCount, workers_text

if TYPE_CHECKING:
    from deploy.job_request import Handed
    from deploy.jobs import Job, Jobs


def address_option(command: Command) -> Command:
    """--address, the head's dashboard."""
    return click.option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        show_envvar=True,
        required=True,
        metavar="URL",
        help="The Ray head's dashboard, http://HOST:8265. The token is RAY_AUTH_TOKEN, or in the file RAY_AUTH_TOKEN_PATH.",
    )(command)


def register(group: click.Group) -> None:
    """Adds the commands to the main group."""
    group.add_command(submit)
    group.add_command(jobs)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="RECIPE|PIPELINE")
@address_option
@click.option("--follow", is_flag=True, help="Show the job's progress and end with its exit code. Ctrl-C leaves it running.")
@click.option("--workers", type=WorkerRange(), help="Ray Train workers.  [default: 1, or the pipeline's]")
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads a worker.  [default: the pipeline's, else the head's cores / workers]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="[default: the pipeline's, else cuda where the head has a GPU, else cpu]",
)
@click.option(
    "--store",
    envvar="VGGROW_STORE",
    show_envvar=True,
    metavar="DIR",
    help="Folder that every node mounts at the same absolute path; needed for a recipe. A pipeline names its own.",
)
@click.option(
    "--tracking",
    envvar="MLFLOW_TRACKING_URI",
    show_envvar=True,
    metavar="URI",
    help="MLflow server, as the head reaches it.  [default: mlflow.db in the store] A pipeline names its own.",
)
@click.option(
    "--env",
    "pairs",
    multiple=True,
    metavar="K=V",
    help="A variable for the job; K alone takes its value from this shell. Who has the token can read it. May be repeated.",
)
@click.option(
    "--python",
    envvar="VGGROW_CLUSTER_PYTHON",
    show_envvar=True,
    metavar="PATH",
    help="The interpreter that runs the job, by its absolute path on the head.  [default: the head's own]",
)
@click.option(
    "--working-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Pack this folder, less its .gitignore and .rayignore, in place of the file and vggrow's packages.",
)
@click.option("--installed", is_flag=True, help="vggrow is installed on the cluster: pack the file alone.")
@click.option(
    "--image",
    metavar="IMAGE",
    help="Run the job and its workers in containers of this image, which has vggrow; needs podman on every node.",
)
@stall_option
@log_pictures_option
@json_option
@click.pass_context
def submit(
    context: click.Context,
    file: Path,
    address: str,
    follow: bool,
    workers: WorkerCount | None,
    threads: int | None,
    device: Literal["cpu", "cuda"] | None,
    store: str | None,
    tracking: str | None,
    pairs: tuple[str, ...],
    python: str | None,
    working_dir: Path | None,
    installed: bool,
    image: str | None,
    stall_limit: float,
    log_pictures: bool,
    as_json: bool,
) -> None:
    """Run `vggrow train RECIPE`, or a tick of PIPELINE, as a job on a Ray cluster, and come back at once.

    Submitting again goes on where an earlier attempt ended. While one runs, no other is started: --follow then follows
    that one.

    \b
    Examples:
        vggrow submit pets.toml --address http://head:8265 --store /mnt/vggrow/store --workers 4 --follow
        vggrow submit pets.toml --address http://head:8265 --store /mnt/vggrow/store --env MLFLOW_TRACKING_PASSWORD
        vggrow submit pipeline.toml --address http://head:8265 --workers 1:4
    """
    given = [name for name, is_given in (("working-dir", working_dir), ("installed", installed), ("image", image)) if is_given]
    if len(given) > 1:
        raise click.UsageError(f"--{given[1]} has no effect with --{given[0]}; leave one of the two out")
    from deploy.job_order import is_pipeline, read_env
    from deploy.job_request import hand_over, load_pipeline_for, tick_request, train_request

    env = read_env(pairs)
    if is_pipeline(file):
        typed = click.core.ParameterSource.COMMANDLINE
        for name in ("store", "tracking"):
            if context.get_parameter_source(name) is typed:
                raise click.UsageError(f"--{name} is for a recipe; {file} is a pipeline: set [run] {name} in it")
        for name in ("stall_limit", "log_pictures"):
            if context.get_parameter_source(name) is typed:
                raise click.UsageError(f"--{name.replace('_', '-')} is for a recipe; {file} is a pipeline: leave it out")
        pipeline = load_pipeline_for(file, workers=workers, threads=threads, device=device)
        request = tick_request(file, pipeline, env=env, working_dir=working_dir)
    else:
        if store is None:
            raise click.UsageError("--store (or VGGROW_STORE) is needed: a folder that every node of the cluster mounts there")
        request = train_request(
            file, store=store, workers=workers or 1, threads=threads, device=device, tracking=tracking, env=env,
            more=(f"--stall-limit={stall_limit:g}", *(["--log-pictures"] if log_pictures else [])),
            working_dir=working_dir,
        )  # fmt: skip
    handed = hand_over(request, address, python=python, working_dir=working_dir, installed=installed, image=image)
    tell(handed)
    job, code = handed.job, 0
    if not as_json:
        click.echo(handed.words)
    if follow:
        job, code = follow_job(handed.cluster, job.id, to_stderr=True)
    elif not as_json:
        click.echo(how_to_come_back(handed.cluster, job.id), err=True)
    if as_json:
        print_json(as_dict(job) | {"fresh": handed.fresh, "package_bytes": handed.size if handed.fresh else None})
    sys.exit(code)


def tell(handed: "Handed") -> None:
    """What came of handing over, on stderr."""
    job = handed.job
    if not handed.fresh:
        click.echo(f"{job.id} is {job.status.lower()} already, since {clock(job.started)}: nothing was submitted", err=True)
        if handed.other_accept:
            click.echo("it was started without this --accept; give the command again when it has ended", err=True)
        return
    click.echo(f"packed {handed.files} file{'s' * (handed.files > 1)}, {handed.size / 2**10:,.0f} KiB", err=True)
    if handed.before is not None:
        click.echo(f"goes on from {handed.before.id} ({words_of(handed.before)})", err=True)


@click.group()
def jobs() -> None:
    """The jobs of a Ray cluster: list, look, follow, stop."""


@jobs.command("list")
@address_option
@json_option
def jobs_list(address: str, as_json: bool) -> None:
    """List the jobs that the head remembers, oldest first.

    \b
    Example:
        vggrow jobs list --address http://head:8265
    """
    from deploy.jobs import Jobs

    found = Jobs(address).list()
    if as_json:
        print_json([as_dict(job) for job in found])
        return
    rows = [("job", "runs", "workers", "started", "took", "status")]
    for job in found:
        rows.append((job.id, what_of(job), team_of(job), clock(job.started), took(job), words_of(job)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


@jobs.command("show")
@click.argument("job_id", metavar="JOB")
@address_option
@json_option
def jobs_show(job_id: str, address: str, as_json: bool) -> None:
    """Show one job: its command, state, exit code, store. Values of its variables are not shown.

    \b
    Example:
        vggrow jobs show 3f0c6a52b1d94e77-1 --address http://head:8265
    """
    from deploy.jobs import Jobs

    job = Jobs(address).get(job_id)
    if as_json:
        print_json(as_dict(job))
        return
    for name, value in (
        ("job", job.id),
        ("runs", what_of(job)),
        ("status", words_of(job)),
        ("started", clock(job.started)),
        ("took", took(job)),
        ("workers", team_of(job)),
        ("store", job.store or "-"),
        *([("image", job.image)] if job.image else []),
        ("command", job.command),
        ("variables", ", ".join(job.env) or "-"),
    ):
        click.echo(f"{name:<10}{value}")


@jobs.command("logs")
@click.argument("job_id", metavar="JOB")
@address_option
@click.option("-f", "--follow", is_flag=True, help="Go on until the job is over, and end with its exit code.")
def jobs_logs(job_id: str, address: str, follow: bool) -> None:
    """Print what a job has said. With -f, Ctrl-C leaves the job running.

    \b
    Example:
        vggrow jobs logs 3f0c6a52b1d94e77-1 -f --address http://head:8265
    """
    from deploy.jobs import Jobs

    cluster = Jobs(address)
    if follow:
        sys.exit(follow_job(cluster, job_id, to_stderr=False)[1])
    click.echo(cluster.logs(job_id), nl=False)


@jobs.command("stop")
@click.argument("job_id", metavar="JOB")
@address_option
@json_option
def jobs_stop(job_id: str, address: str, as_json: bool) -> None:
    """Stop a job: it writes a checkpoint first (up to 30 s). Submitting the same again goes on from there.

    \b
    Example:
        vggrow jobs stop 3f0c6a52b1d94e77-1 --address http://head:8265
    """
    from deploy.jobs import Jobs

    job = Jobs(address).stop(job_id)
    if as_json:
        print_json(as_dict(job))
    else:
        click.echo(f"{job.id}: {words_of(job)}")


def follow_job(cluster: "Jobs", job_id: str, *, to_stderr: bool) -> tuple["Job", int]:
    """Shows the job's words until it is over: the job and its exit code. Exit 130 on Ctrl-C, and the job goes on."""
    from deploy.jobs import outcome

    try:
        job = cluster.follow(job_id, lambda words: click.echo(words, nl=False, err=to_stderr))
    except KeyboardInterrupt:
        click.echo(f"\n{job_id} goes on without us\n{how_to_come_back(cluster, job_id)}", err=True)
        sys.exit(130)
    code = outcome(job)
    click.echo(f"{job.id}: {words_of(job)}", err=True)
    return job, code


def how_to_come_back(cluster: "Jobs", job_id: str) -> str:
    """The commands that follow and that stop a job."""
    from deploy.options import command_name

    vggrow, where = command_name(), f"--address {cluster.address}"
    return f"follow    {vggrow} jobs logs {job_id} -f {where}\nstop      {vggrow} jobs stop {job_id} {where}"


def words_of(job: "Job") -> str:
    """A job's state in words."""
    if job.status == "FAILED" and job.exit_code is not None:
        return f"failed (exit {job.exit_code})"
    return job.status.lower()


def what_of(job: "Job") -> str:
    """What a job is: the training of a recipe, a tick of a pipeline, or nothing of ours."""
    if job.pipeline:
        return f"tick of {job.pipeline}"
    return f"train {job.recipe}" if job.recipe else "-"


def team_of(job: "Job") -> str:
    """A job's workers as they are written."""
    return workers_text(job.workers) if job.workers is not None else "-"


def clock(moment: float | None) -> str:
    """Seconds since 1970 as this machine's local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment)) if moment is not None else "-"


def took(job: "Job") -> str:
    """How long a job has run, as m:ss or h:mm:ss."""
    if job.started is None:
        return "-"
    minutes, seconds = divmod(round((job.ended or time.time()) - job.started), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def as_dict(job: "Job") -> dict[str, Any]:
    """A job for programs."""
    return asdict(job) | {"env": list(job.env), "attempt": job.attempt, "command": job.command}
