"""`vggrow features`; `register` adds it. Heavy imports stay inside the command."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click

from deploy.options import Scales, json_option, print_json, store_option, tracking_option

FC = "fc"


class Groups(click.ParamType[tuple[int, ...] | str]):
    """'3,4', or 'fc'."""

    name = "groups"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...] | str:
        """Ascending numbers of conv groups, or the word."""
        if value == FC:
            return FC
        parts = str(value).split(",")
        numbers = [int(part) for part in parts if part in {"1", "2", "3", "4", "5"}]
        if len(numbers) != len(parts) or numbers != sorted(set(numbers)):
            self.fail(f"{value!r}: expected conv groups 1 to 5, ascending, with commas, such as 3,4; or fc", param, ctx)
        return tuple(numbers)


@click.command()
@click.argument("weights", metavar="WEIGHTS|MODEL")
@click.argument("source", type=click.Path(exists=True, path_type=Path), metavar="RECIPE|FOLDER")
@click.option(
    "--groups",
    type=Groups(),
    metavar="N,N...|fc",
    help="Conv groups whose outputs are pooled, or fc: the units of the last hidden FC layer, as in Appendix B.  [default: a"
    " linear model's own, else 3,4]",
)
@click.option(
    "--pool",
    type=click.Choice(["average", "maximum", "both"]),
    help="Over the places of a group's output.  [default: a linear model's own, else both]",
)
@click.option(
    "--scales",
    type=Scales(),
    metavar="Q,Q...",
    help="Shorter sides of the whole pictures, pixels; the values of all follow one another.  [default: a model's own, 224 for"
    " published weights]",
)
@click.option("--flip", is_flag=True, help="The mean of the picture's values and its mirror image's; twice the time.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="auto: bf16 where the hardware has it.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of parallel Ray tasks; 1 on this machine runs without Ray.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads a worker.  [default: this machine's cores / workers]")
@click.option("--address", metavar="HOST:PORT", help="Ray head to run on.  [default: RAY_ADDRESS, else this machine]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where torch finds a GPU here, else cpu]")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="F.parquet", help="File to write.")
@store_option
@tracking_option
@json_option
def features(
    weights: str,
    source: Path,
    groups: tuple[int, ...] | str | None,
    pool: str | None,
    scales: tuple[int, ...] | None,
    flip: bool,
    precision: str,
    workers: int,
    threads: int | None,
    address: str | None,
    device: str | None,
    out: Path,
    store: str,
    tracking: str | None,
    as_json: bool,
) -> None:
    """Write features of the pictures of RECIPE or FOLDER: outputs of a net's layers, a row a picture.

    WEIGHTS are published weights of the store (weights:NAME), MODEL as in `vggrow predict`. Features are kept in the store
    by the pictures' content: a picture is computed once, and a command that was stopped or killed resumes.

    \b
    Examples:
        vggrow features weights:keras/vgg16_notop pictures/ --scales 96,160 --out features.parquet
        vggrow features weights:torchvision/vgg16 pets.toml --groups fc --workers 2 --out fc.parquet
    """
    from deploy.tracking_address import check_tracking, resolve_tracking
    from training.store import open_store

    opened = open_store(store)
    uri = resolve_tracking(tracking, opened.root)
    if weights.startswith(("models:", "runs:")):
        check_tracking(uri)
    head = address or os.environ.get("RAY_ADDRESS", "local")
    if head != "local":
        from training.ray_address import check_address

        check_address(head)
    from deploy.feature_table import Asked, write_features
    from training.where import Where, default_device, threads_for

    where = Where(
        store=opened,
        workers=workers,
        threads=threads or threads_for(workers),
        address=address,
        device=device or default_device(),
    )
    asked = Asked(
        groups=groups if isinstance(groups, tuple) else None,
        fc=groups == FC,
        pool=pool,  # type: ignore[arg-type]
        scales=scales,
        flip=flip,
        precision=precision,
    )
    with moving_line() as (progress, say):
        found = write_features(
            weights, source, out, asked, where=where, tracking=uri, progress=progress, say=say
        )
    if as_json:
        print_json(asdict(found) | {"out": str(found.out)})
        return
    known = found.pictures - found.computed
    click.echo(
        f"{found.out}: {found.pictures:,} pictures, {found.values:,} values each ({found.computed:,} computed, {known:,} from"
        " the store)"
    )


@contextmanager
def moving_line() -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Pictures done, rate and time left, on stderr: a moving line on a terminal, a plain one now and then elsewhere."""
    from rich.console import Console

    from deploy.feature_progress import FeatureProgress

    console = Console(stderr=True, highlight=False)
    with FeatureProgress(console) as shown:
        yield shown.advance, shown.say


def register(group: click.Group) -> None:
    """Adds the command."""
    group.add_command(features)
