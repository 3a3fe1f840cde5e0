"""`vggrow init`: a recipe for a folder of pictures; `register` adds it. Heavy imports stay inside the command."""

import shlex
from pathlib import Path

import click

from deploy.options import command_name, elsewhere, store_option


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--from", "weights", metavar="weights:NAME", help="Published weights of the store to start from.")
@click.option("--pipeline", is_flag=True, help="Also write a pipeline file, RECIPE-pipeline.toml, for `vggrow retrain`.")
@click.option("--out", type=click.Path(path_type=Path), metavar="RECIPE.toml", help="[default: FOLDER's name.toml, here]")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@store_option
def init(folder: Path, weights: str | None, pipeline: bool, out: Path | None, force: bool, store: str) -> None:
    """Write a recipe for the pictures in FOLDER (a folder a class), each line with its reason.

    Splits, views, net and schedule are chosen by the number of pictures, their sizes, and this machine's cores, memory and
    GPU. File names are listed and the headers of up to 400 pictures are read; nothing is decoded, and FOLDER is not changed.
    The recipe can be planned and trained at once, and edited.

    \b
    Examples:
        vggrow init pictures/
        vggrow init pictures/ --from weights:keras/vgg16_notop --out pets.toml
        vggrow init pictures/ --pipeline
    """
    from deploy.init_recipe import Asked, init_recipe

    written = init_recipe(Asked(folder, weights, pipeline, out, force, store))
    for line in written.notes:
        click.echo(f"note: {line}", err=True)
    if written.suggestion:
        click.echo(f"note: {written.suggestion}", err=True)
    click.echo(f"looked at: {written.looked}")
    for path in written.files:
        click.echo(f"written: {path}")
    train = shlex.join(["train", str(written.files[0]), "--yardsticks"])
    click.echo(f"next: {command_name()} {train}{elsewhere(store)}")


def register(group: click.Group) -> None:
    """Adds the command."""
    group.add_command(init)
