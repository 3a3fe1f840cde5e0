"""The commands that look and measure: bench, curves, status, doctor; deploy/cli.py adds them by `register(vggrow)`."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.options import FiniteRange, json_option, print_json, store_option, tracking_option

if TYPE_CHECKING:
    from vggcore.recipe import Recipe
    from vggcore.schedule import Stage

RECIPE = click.Path(exists=True, dir_okay=False, path_type=Path)
WATCH_S = 2.0


def register(group: click.Group) -> None:
    """Adds the commands to the command line."""
    for command in (bench, curves, status, doctor):
        group.add_command(command)


@click.group()
def bench() -> None:
    """Measure this machine and this code, side by side with the alternative."""


@bench.command("train")
@click.argument("recipe", type=RECIPE)
@click.option("--stage", "name", metavar="NAME", help="Which stage.  [default: the first that trains by iterations]")
@click.option("--settings", is_flag=True, help="Bare training under each choice of speed instead, one changed at a time.")
@click.option("--layers", is_flag=True, help="Where bare training's time goes instead, layer by layer.")
@click.option("--batch", type=click.IntRange(1), help="Pictures an iteration.  [default: the recipe's global_batch]")
@click.option("--threads", type=click.IntRange(1), help="CPU threads, of torch and of each loader.  [default: all cores]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--seconds", type=FiniteRange(0.1), default=10.0, show_default=True, help="Of each figure in each turn.")
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True, help="The median of so many counts.")
@store_option
@json_option
def bench_train(
    recipe: Path,
    name: str | None,
    settings: bool,
    layers: bool,
    batch: int | None,
    threads: int | None,
    device: str,
    seconds: float,
    turns: int,
    store: str,
    as_json: bool,
) -> None:
    """Measure a stage of RECIPE: matrix multiplication, bare training, a plain PyTorch loop, and our whole stage.

    The four are measured in turns in one process. Trains nothing that is kept.

    \b
    Examples:
        vggrow bench train training/recipes/elpv-staged.toml --stage A-72
        vggrow bench train training/recipes/elpv-staged.toml --settings
        vggrow bench train paper.toml --stage D-256 --batch 4 --layers
    """
    from vggcore.errors import RecipeError
    from vggcore.recipe import load_recipe

    loaded = load_recipe(recipe)
    stage = named_stage(loaded, name, recipe)
    if settings and layers:
        raise RecipeError("--settings --layers: each is a measurement of its own; ask for one")
    if batch is not None:
        stage = stage.model_copy(update={"global_batch": batch})
    from deploy.scans import scan_data
    from training.bench import bench_job, measure, speeds_text
    from training.bench_layers import layers_text, measure_layers
    from training.bench_settings import measure_settings, settings_text
    from training.store import open_store
    from training.where import Where, check_where, cores

    opened = open_store(store)
    check_where(Where(store=opened, device=device), [stage])
    manifest = scan_data(loaded.data, opened, threads=cores())
    job = bench_job(stage, manifest, opened.root, threads=threads or cores(), device=device)
    if settings:
        choices = measure_settings(job, manifest, seconds=seconds, turns=turns)
        told, text = choices.to_json(), settings_text(choices)
    elif layers:
        times = measure_layers(job, manifest, seconds=seconds)
        told, text = times.to_json(), layers_text(times)
    else:
        speeds = measure(stage, manifest, opened, threads=job.threads, device=device, seconds=seconds, turns=turns)
        told, text = speeds.to_json(), speeds_text(speeds)
    if as_json:
        print_json(told)
    else:
        click.echo(text)


@bench.command("recovery")
@click.argument("recipe", type=RECIPE)
@click.option("--stage", "name", metavar="NAME", help="Which stage.  [default: the first that trains by iterations]")
@click.option("--workers", type=click.IntRange(2), default=2, show_default=True, help="Ray Train workers on this machine.")
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True, help="The median of so many counts.")
@json_option
def bench_recovery(recipe: Path, name: str | None, workers: int, turns: int, as_json: bool) -> None:
    """Measure how soon `vggrow train RECIPE` trains, and trains again after a kill, beside bare Ray Train.

    Starts and kills real processes, for about four minutes a turn on two cores. Nothing is kept.

    \b
    Example:
        vggrow bench recovery training/recipes/elpv-staged.toml --stage A-72
    """
    from vggcore.recipe import load_recipe

    loaded = load_recipe(recipe)
    stage = named_stage(loaded, name, recipe)
    from deploy.signals import Signals
    from training.bench_recovery import measure, recovery_text
    from training.stop_switch import Interrupted
    from training.store import Store
    from training.where import Where, check_where, threads_for

    threads = threads_for(workers)
    check_where(Where(store=Store(Path.cwd()), workers=workers, threads=threads), [stage])
    try:
        with Signals():
            found = measure(
                loaded,
                stage,
                command=[sys.executable, "-m", "deploy"],
                workers=workers,
                threads=threads,
                turns=turns,
                say=lambda words: click.echo(words, err=True),
            )
    except Interrupted:
        raise click.Abort from None
    if as_json:
        print_json(found.to_json())
    else:
        click.echo(recovery_text(found))


def named_stage(recipe: "Recipe", name: str | None, place: Path) -> "Stage":
    """The stage of that name, or the first that is trained by SGD. Raises RecipeError where there is none."""
    from vggcore.errors import RecipeError
    from vggcore.recipe import nearest
    from vggcore.schedule import resolve_stages

    stages = {stage.name: stage for stage in resolve_stages(recipe)}
    if name is not None and name not in stages:
        raise RecipeError(f"--stage {name}: no such stage in {place}{nearest(name, list(stages))}")
    trained = [stage for stage in stages.values() if stage.fit == "sgd"]
    wanted = trained[:1] if name is None else [stage for stage in trained if stage.name == name]
    if not wanted:
        which = name or next(iter(stages))
        raise RecipeError(f'--stage {which}: expected a stage that trains by iterations, got fit = "logistic" in {place}')
    return wanted[0]


@click.command()
@click.argument("schedules", nargs=-1, metavar="[SCHEDULE]...")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Figure to write, .svg or .png.")
@store_option
@json_option
def curves(schedules: tuple[str, ...], out: Path | None, store: str, as_json: bool) -> None:
    """Hold stages against each other by what they cost: val accuracy and training loss over operations.

    SCHEDULE is a schedule's key, or a recipe's name for all schedules of that name, such as copies with other seeds; none
    means the newest one's name. A stage is charged with the stages that it starts from.

    \b
    Examples:
        vggrow curves
        vggrow curves staged-or-direct --out staged-or-direct.svg
    """
    from deploy.compute_curves import compare, comparison_json, comparison_text, write_figure
    from training.store import store_to_read

    found = compare(store_to_read(store).root, schedules)
    if out is not None:
        write_figure(found, out)
    if as_json:
        print_json(comparison_json(found))
    else:
        click.echo(comparison_text(found))


@click.command()
@click.argument("what", required=False, metavar="[STORE]", type=click.Path(file_okay=False, path_type=Path))
@click.option("--watch", is_flag=True, help="Again every two seconds, until Ctrl-C.")
@store_option
@json_option
def status(what: Path | None, watch: bool, store: str, as_json: bool) -> None:
    """Say what the schedules of STORE are doing now: stages, epochs, loss, speed, who trains them. From any terminal.

    Reads the store's files; a run on another machine is seen as well, where the store is shared.

    \b
    Examples:
        vggrow status
        vggrow status /mnt/vggrow/store --watch
    """
    from deploy.status import status_json, status_text, store_status
    from training.store import store_to_read

    opened = store_to_read(what or store)
    while True:
        found = store_status(opened)
        if watch:
            click.clear()
        if as_json:
            print_json(status_json(found))
        else:
            click.echo(status_text(found))
        if not watch:
            return
        time.sleep(WATCH_S)


@click.command()
@store_option
@tracking_option
@json_option
def doctor(store: str, tracking: str | None, as_json: bool) -> None:
    """Say what this machine can do: versions, cores, memory, GPU, bf16, disk, DALI, tracking. Exit 2 on a problem.

    \b
    Example:
        vggrow doctor
    """
    from deploy.doctor import as_json as findings_json
    from deploy.doctor import as_text, examine, exit_code
    from deploy.tracking_address import resolve_tracking

    root = Path(store).absolute()
    findings = examine(root, resolve_tracking(tracking, root))
    if as_json:
        print_json(findings_json(findings))
    else:
        click.echo(as_text(findings))
    sys.exit(exit_code(findings))
