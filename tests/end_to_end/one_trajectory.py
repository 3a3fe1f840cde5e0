"""One trajectory: the same small recipe at 1, 2, 3 and 4 workers, and how far its losses drift apart.

    python -m tests.end_to_end.one_trajectory --iterations 1500 --out docs/images

Pictures, views, batches and dropout masks are the same bit by bit (tests/training/test_shares.py); what differs is the order
in which floats are summed: within a worker over its share of the batch, and between workers in the all-reduce.
"""

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from deploy.charts import INK, STYLE
from tests.end_to_end.conftest import RECIPE
from tests.end_to_end.kill_campaign import Typist, reached, result_is_there
from tests.end_to_end.test_resume import BATCHES, stage_folder
from tests.pipelines.photo_folders import make_photo_folder

WORKERS = (1, 2, 3, 4)
MARKS = {2: ("#0072B2", "-"), 3: ("#D55E00", "--"), 4: ("#009E73", ":")}   # Okabe and Ito's palette
SHOWN = (1, 3, 10, 30, 100, 300, 1000, 1500)      # iterations in the table


def losses(photos: Path, folder: Path, iterations: int, changes: dict[str, str] | None = None) -> dict[int, list[float]]:
    """The training loss of every iteration at each number of workers, fp32, one thread each; whole epochs are trained.

    changes: lines of the recipe by what stands in their place.
    """
    recipe = folder / "photos.toml"
    text = RECIPE.format(root=photos, epochs=-(-iterations // BATCHES), every="5min")
    for line, other in (changes or {}).items():
        assert line in text, line
        text = text.replace(line, other)
    recipe.write_text(text.replace("patience = 100\n", "patience = 100000\n"))      # one learning rate all the way
    found = {}
    for workers in WORKERS:
        store = folder / f"workers-{workers}"
        typist = Typist(recipe, store, workers)
        try:
            reached(typist, lambda store=store: result_is_there(store))      # what comes after has no part in this
        finally:
            typist.running.kill_everything()
        assert result_is_there(store), typist.running.output()
        rows = map(json.loads, (stage_folder(store) / "history.jsonl").read_text().splitlines())
        found[workers] = [row["train_loss"] for row in rows if "epoch" not in row][:iterations]
    return found


def differences(found: dict[int, list[float]]) -> dict[int, list[float]]:
    """|loss - loss of one worker| / loss of one worker, of every iteration, for each larger number of workers."""
    alone = found[1]
    return {
        workers: [abs(ours - theirs) / theirs for ours, theirs in zip(found[workers], alone, strict=True)]
        for workers in found
        if workers != 1
    }


def largest(values: list[float], iteration: int) -> float:
    """The largest of the first `iteration` values."""
    return max(values[:iteration])


def table(found: dict[int, list[float]]) -> str:
    """Markdown: the largest relative difference so far, and the loss itself."""
    apart = differences(found)
    lines = [
        "| Iteration | Loss, 1 worker | " + " | ".join(f"{workers} workers" for workers in apart) + " |",
        "|---|---|" + "---|" * len(apart),
    ]
    for iteration in (shown for shown in SHOWN if shown <= len(found[1])):
        cells = " | ".join(f"{largest(values, iteration):.1e}" for values in apart.values())
        lines.append(f"| {iteration:,} | {found[1][iteration - 1]:.4f} | {cells} |")
    return "\n".join(lines)


def drawn(iterations: int) -> list[int]:
    """The iterations whose points are drawn: all at first, then some 40 a factor of ten."""
    return sorted({round(10 ** (exponent / 40)) for exponent in range(200)} & set(range(1, iterations + 1)))


def draw(found: dict[int, list[float]]) -> Figure:
    """Both axes logarithmic: the largest difference so far, and where single iterations lie."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axes = figure.subplots()
        for workers, values in differences(found).items():
            colour, dash = MARKS[workers]
            steps = drawn(len(values))
            axes.plot(
                steps, [largest(values, step) for step in steps], color=colour, linestyle=dash, linewidth=1.4,
                label=f"{workers} workers",
            )   # fmt: skip
            seen = [(step, values[step - 1]) for step in steps if values[step - 1] > 0]
            axes.plot(*zip(*seen, strict=True), ".", color=colour, markersize=2, alpha=0.5)
        axes.axhline(2.0**-24, color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        half = "half a unit in the last place of fp32"
        axes.annotate(half, (1, 2.0**-24), xytext=(2, 3), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="iteration", ylabel="relative difference of the loss")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")      # no mathematical text: see STYLE
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title("Loss beside one worker's (line: the largest so far)", fontsize=9, loc="left")
        axes.legend(loc="upper left", fontsize=7.5)
        return figure


def write(found: dict[int, list[float]], path: Path) -> None:
    """The figure as an SVG file on white, the same bytes for the same losses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        draw(found).savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    """The command: see the module's words."""
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.one_trajectory", description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=1500, help="updates of the weights at each number of workers")
    parser.add_argument("--out", type=Path, required=True, help="folder for one-trajectory.svg")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="one-trajectory-") as name:
        folder = Path(name)
        photos = make_photo_folder(folder / "photos", per_class=20, split=True, size=(48, 72))
        found = losses(photos, folder, given.iterations)
    write(found, given.out / "one-trajectory.svg")
    print(table(found))


if __name__ == "__main__":
    main()
