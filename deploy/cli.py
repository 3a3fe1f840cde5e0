"""The command line: each command checks its words, calls one function and prints its result.

Results go to stdout, progress and logs to stderr. Exit: 0 done, 2 the user can mend it, 1 our own fault, 130 interrupted.
Heavy imports stay inside the commands, so that --help and a typing error in a recipe answer at once.
"""

import atexit
import gc
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from deploy import cli_features, cli_init, cli_jobs, cli_machine, cli_models, cli_retrain, cli_weights
from deploy.options import (
    MOST_CLASSES,
    MOST_PICTURES,
    FiniteRange,
    Scales,
    WorkerRange,
    command_name,
    json_option,
    log_pictures_option,
    print_json,
    stall_option,
    store_option,
    tracking_option,
)
from training.worker_count import WorkerCount
from vggcore.errors import VggrowError
from vggcore.recipe_checks import LARGEST_SIDE

if TYPE_CHECKING:
    from training.store import Store

RECIPE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="vggrow")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens in detail, on stderr.")
def vggrow(verbose: bool) -> None:
    """Train VGG image classifiers on your own pictures, by the paper's schedule, and keep them in MLflow's registry."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)


@vggrow.group()
def data() -> None:
    """Look at pictures before training on them."""


@data.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path), metavar="FOLDER|RECIPE")
@store_option
@json_option
def scan(source: Path, store: str, as_json: bool) -> None:
    """Decode every picture of FOLDER, or of the [data] of RECIPE, and write the manifest.

    A folder holds a folder a class, with or without train/ val/ test/ above them. What does not decode is listed in
    quarantine.csv; nothing is changed in FOLDER. A scan that is stopped goes on where it was.

    \b
    Examples:
        vggrow data scan pictures/
        vggrow data scan training/recipes/elpv.toml --json
    """
    from deploy.scans import scan_data
    from pipelines.manifest import manifest_json, scan_summary
    from training.store import open_store
    from vggcore.recipe import Data, load_recipe

    settings = Data(root=source.absolute()) if source.is_dir() else load_recipe(source).data
    opened = open_store(store)
    with click.progressbar(length=1, label="decoding", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def progress(done: int, files: int) -> None:
            bar.length = files
            bar.update(done - bar.pos)

        manifest = scan_data(settings, opened, threads=len(os.sched_getaffinity(0)), progress=progress)
    folder = opened.data(manifest.fingerprint)
    if as_json:
        print_json(manifest_json(manifest) | {"folder": str(folder)})
        return
    for line in scan_summary(manifest):
        click.echo(line)
    click.echo(f"written: {folder}")


@vggrow.command()
@click.argument("recipe", type=RECIPE)
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Workers to plan for.")
@click.option("--pictures", type=click.IntRange(1, MOST_PICTURES), help="Training pictures to plan for, before a scan.")
@click.option(
    "--classes",
    type=click.IntRange(2, MOST_CLASSES),
    help="Classes to plan for, before a scan.  [default: 1000; 2 for elpv]",
)
@store_option
@json_option
def plan(recipe: Path, workers: int, pictures: int | None, classes: int | None, store: str, as_json: bool) -> None:
    """Say what `vggrow train RECIPE` would do: stages in order, parameters, memory, operations. Starts nothing.

    \b
    Examples:
        vggrow plan training/recipes/elpv.toml
        vggrow plan training/recipes/imagenet-paper.toml --pictures 1281167 --workers 8
    """
    from vggcore.recipe import load_recipe

    loaded = load_recipe(recipe)
    from dataclasses import asdict

    from deploy.plan_table import plan as plan_schedule
    from deploy.plan_table import plan_text
    from deploy.scans import known_manifest
    from training.store import Store

    opened = Store(Path(store).absolute())
    manifest = known_manifest(loaded.data, opened)
    found = plan_schedule(loaded, manifest, workers, opened.root, pictures=pictures, classes=classes)
    if as_json:
        print_json(asdict(found))
    else:
        click.echo(plan_text(found))


@vggrow.command()
@click.argument("recipe", type=RECIPE)
@click.option(
    "--workers",
    type=WorkerRange(),
    default="1",
    show_default=True,
    help="Ray Train workers; the global batch is split over them. 1 on this machine: no Ray processes. MIN:MAX on a cluster:"
    " as many as there is room for, while nodes come and go.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads a worker.  [default: this machine's cores / workers]")
@click.option("--address", metavar="HOST:PORT", help="Ray head to run on.  [default: RAY_ADDRESS, else Ray on this machine]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where torch finds a GPU here, else cpu]")
@click.option(
    "--cache-gib",
    type=FiniteRange(0),
    default=2.0,
    show_default=True,
    help="Sets whose decoded pictures take no more are kept decoded in the store; 0: none.",
)
@click.option("--yardsticks", is_flag=True, help="Also fit plain scikit-learn classifiers on the same pictures.")
@stall_option
@log_pictures_option
@store_option
@tracking_option
def train(
    recipe: Path,
    workers: WorkerCount,
    threads: int | None,
    address: str | None,
    device: str | None,
    cache_gib: float,
    yardsticks: bool,
    stall_limit: float,
    log_pictures: bool,
    store: str,
    tracking: str | None,
) -> None:
    """Run every stage of RECIPE that has not finished yet; evaluate and register the result.

    The same command goes on where an interrupted one was. Ctrl-C writes a checkpoint first.

    \b
    Examples:
        vggrow train training/recipes/elpv.toml
        vggrow train pets.toml --workers 4 --tracking http://mlflow:5000
    """
    from vggcore.recipe import load_recipe

    loaded = load_recipe(recipe)
    from training.store import open_store

    opened = open_store(store)
    answering(tracking, opened.root)
    head = address or os.environ.get("RAY_ADDRESS", "local")
    if head != "local":
        from training.ray_address import check_address

        check_address(head)
    from rich.console import Console

    from deploy.line import run_line
    from deploy.progress import Progress
    from training.stop_switch import Interrupted
    from training.where import Where, default_device, threads_for

    console = Console(stderr=True, highlight=False)
    where = Where(
        store=opened,
        workers=workers,
        threads=threads or threads_for(workers),
        address=address,
        device=device or default_device(),
        cache_gib=cache_gib,
        stall_s=stall_limit,
        log_pictures=log_pictures,
    )
    try:
        line = run_line(
            loaded,
            recipe.read_text(encoding="utf-8"),
            where=where,
            tracking=tracking,
            hear=lambda manifest, stages: Progress(
                console, pictures=len(manifest.split("train")), stages=len(stages)
            ),
            with_yardsticks=yardsticks,
            say=lambda words: console.print(words, markup=False, soft_wrap=True),
        )
    except Interrupted:
        click.echo("interrupted; the same command goes on where this one was", err=True)
        sys.exit(130)
    from deploy.last_words import last_words

    click.echo(last_words(line, command=command_name(), store=store, pictures=loaded.data.root))


def reading(store: str, tracking: str | None) -> "Store":
    """The store for a command that only reads; it need not exist where a tracking server is named."""
    from training.store import Store, store_to_read

    return store_to_read(store) if tracking is None else Store(Path(store).absolute())


def answering(tracking: str | None, store: Path) -> str:
    """The tracking URI, asked before torch and MLflow are loaded: so a silent server is named within 10 s."""
    from deploy.tracking_address import check_tracking, resolve_tracking

    uri = resolve_tracking(tracking, store)
    check_tracking(uri)
    return uri


def tracking_of(model: str, tracking: str | None, store: Path) -> str:
    """As `answering`, where MODEL is one that the server must be asked for."""
    from deploy.tracking_address import resolve_tracking

    return answering(tracking, store) if model.startswith(("models:", "runs:")) else resolve_tracking(tracking, store)


@vggrow.command()
@click.argument("model")
@click.option(
    "--data",
    "source",
    type=click.Path(exists=True, path_type=Path),
    metavar="FOLDER|RECIPE",
    help="Pictures to evaluate on.  [default: those the model was trained on, from this store]",
)
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--protocol", type=click.Choice(["centre", "dense"]), help="[default: the model's own]")
@click.option(
    "--scales",
    type=Scales(ascending=False),
    metavar="Q,Q,...",
    help="Test scales, pixels of the shorter side.  [default: the model's own]",
)
@click.option(
    "--views",
    type=click.Choice(["none", "flips", "turns"]),
    help="Average posteriors over mirrored views, or over turned ones too.  [default: the model's own]",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@store_option
@tracking_option
@json_option
def evaluate(
    model: str,
    source: Path | None,
    split: str,
    protocol: Literal["centre", "dense"] | None,
    scales: tuple[int, ...] | None,
    views: Literal["none", "flips", "turns"] | None,
    device: str,
    store: str,
    tracking: str | None,
    as_json: bool,
) -> None:
    """Measure MODEL on a split by one of the paper's test protocols (Sec. 3.2).

    MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, runs:/..., a package's folder, or a finished stage of the store.

    \b
    Examples:
        vggrow evaluate models:/elpv@champion
        vggrow evaluate D-64 --protocol centre --scales 64 --views flips
    """
    opened = reading(store, tracking)
    uri = tracking_of(model, tracking, opened.root)
    from deploy.judge import evaluation_text, judge

    found = judge(
        model,
        source=source,
        split=split,
        protocol=protocol,
        scales=scales,
        views=views,
        device=device,
        store=opened,
        tracking=uri,
    )
    if as_json:
        print_json(found)
    else:
        click.echo(evaluation_text(found))


@vggrow.command()
@click.argument("model")
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PICTURE...")
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes a picture.")
@store_option
@tracking_option
@json_option
def predict(model: str, pictures: tuple[Path, ...], top_k: int, store: str, tracking: str | None, as_json: bool) -> None:
    """Say what MODEL sees in each PICTURE: the most probable classes with their probabilities.

    MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, runs:/..., a package's folder, or a finished stage of the store.

    \b
    Example:
        vggrow predict models:/elpv@champion cell.png
    """
    opened = reading(store, tracking)
    uri = tracking_of(model, tracking, opened.root)
    from deploy.predict import open_model

    answers = open_model(model, store=opened.root, tracking=uri).predict(pictures, top_k)
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        best = ", ".join(f"{one['class']} {one['probability']:.4f}" for one in answer["top"])
        click.echo(f"{answer['path']}: {best}")


@vggrow.command()
@click.argument("net", metavar="NET|weights:NAME")
@click.option("--classes", type=click.IntRange(2, MOST_CLASSES), default=1000, show_default=True)
@click.option("--head", type=click.Choice(["paper", "compact"]), default="paper", show_default=True)
@click.option("--width", type=FiniteRange(0, 4, min_open=True), default=1.0, show_default=True)
@click.option("--crop", type=click.IntRange(32, LARGEST_SIDE), default=224, show_default=True, help="Pixels, a multiple of 32.")
@store_option
@json_option
@click.pass_context
def summary(
    context: click.Context, net: str, classes: int, head: str, width: float, crop: int, store: str, as_json: bool
) -> None:
    """Print layers with output shapes, parameters and multiply-adds (MACs) for one picture.

    NET is A, A-LRN, B, C, D or E; weights:NAME are published weights of the store, with their mean, origin and licence.

    \b
    Examples:
        vggrow summary D
        vggrow summary A --width 0.125 --crop 64 --classes 2
        vggrow summary weights:keras/vgg16_notop
    """
    from typing import get_args

    from vggcore.recipe import NetName

    if crop % 32:
        raise click.BadParameter(f"{crop} is no multiple of 32", param_hint="--crop")
    if net.startswith("weights:"):
        cli_weights.check_summary_options(context)
        click.echo(cli_weights.summary_of(net.removeprefix("weights:"), store, crop=crop, as_json=as_json))
        return
    if net not in get_args(NetName):
        raise click.BadParameter(f"{net!r} is not one of {', '.join(get_args(NetName))} or weights:NAME", param_hint="NET")
    if context.get_parameter_source("store") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--store has no effect on net {net}: only weights:NAME are in a store; leave it out")
    from dataclasses import asdict

    from deploy.plan_table import layer_text
    from vggcore.nets import layer_table

    rows = layer_table(net, classes=classes, head=head, width=width, crop=crop)  # type: ignore[arg-type]
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        click.echo(layer_text(rows))


@vggrow.group()
def models() -> None:
    """The registry: registered models, their versions and aliases."""


@models.command("list")
@store_option
@tracking_option
@json_option
def models_list(store: str, tracking: str | None, as_json: bool) -> None:
    """List the registered models with their aliases.

    \b
    Example:
        vggrow models list
    """
    from dataclasses import asdict

    client = registry_client(store, tracking)
    from deploy.registry import list_models, models_text

    found = list_models(client)
    if as_json:
        print_json([asdict(model) for model in found])
    else:
        click.echo(models_text(found))


@models.command("show")
@click.argument("name")
@store_option
@tracking_option
@json_option
def models_show(name: str, store: str, tracking: str | None, as_json: bool) -> None:
    """Show the versions of model NAME: aliases, net, stage, test figures, lineage.

    \b
    Example:
        vggrow models show elpv
    """
    from dataclasses import asdict

    client = registry_client(store, tracking)
    from deploy.registry import model_text, show_model

    found = show_model(client, name, reading(store, tracking))
    if as_json:
        print_json(asdict(found))
    else:
        click.echo(model_text(found))


def registry_client(store: str, tracking: str | None) -> Any:
    """An MLflow client whose server was asked whether it answers."""
    uri = answering(tracking, reading(store, tracking).root)
    from mlflow import MlflowClient

    return MlflowClient(uri)


@vggrow.command()
@click.argument("what", required=False, metavar="[SCHEDULE|STORE]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="[default: report.html of the schedule]")
@store_option
def report(what: str | None, out: Path | None, store: str) -> None:
    """Write one HTML page about a schedule: what was trained, curves, confusion, worst pictures, lineage.

    SCHEDULE is a schedule's key; a STORE, or nothing, means the newest schedule there.

    \b
    Examples:
        vggrow report
        vggrow report vggrow-store --out report.html
    """
    from deploy.report import write_report

    key = None
    if what is not None and Path(what).is_dir():
        store = what
    else:
        key = what
    click.echo(str(write_report(Path(store).absolute(), key, out)))


cli_features.register(vggrow)
cli_init.register(vggrow)
cli_jobs.register(vggrow)
cli_machine.register(vggrow)
cli_models.register(models)
cli_retrain.register(vggrow)
cli_weights.register(vggrow)


def main() -> None:
    """The entry point: turns errors into one line and an exit code."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")   # no word goes anywhere unasked
    atexit.register(gc.freeze)    # Python's last collection would walk all of torch and MLflow: 1.9 s of 7.4 (measured)
    try:
        vggrow(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except VggrowError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
