"""The pictures that the report and the tracked runs share: learning curves, confusion matrices, sheets of views."""

import base64
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from deploy.own_output import CREATOR

HistoryRow = Mapping[str, Any]

# Okabe and Ito's palette: told apart with any of the common colour blindnesses; lines differ in dash and marker too.
TRAIN_COLOUR = "#0072B2"
VAL_COLOUR = "#D55E00"
INK = "#010203"   # text and axes: a colour nothing else has, so that the page can put its own ink in its place
DPI = 144
MOST_POINTS = 400                # of a curve: the paper's 370,000 iterations would be 20 MB of page
MOST_CLASSES_WITH_NUMBERS = 24   # a larger confusion matrix has shades only: its numbers would not be readable

STYLE = {
    "font.size": 9.0,
    "font.family": ["DejaVu Sans"],
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,   # a class may be called "$x$"
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "vggrow",   # the same page for the same store, byte by byte
}


def learning_curves(history: Sequence[HistoryRow]) -> bytes:
    """PNG of a stage's curves: loss on train and val, top-1 accuracy on val, learning-rate drops marked.

    history: the lines of history.jsonl; those with "epoch" carry val's numbers. An empty history gives empty axes.
    """
    return png(draw_learning_curves(history))


def confusion_figure(matrix: NDArray[np.integer], classes: Sequence[str]) -> bytes:
    """PNG of a confusion matrix, true classes in rows, predicted in columns; shades are shares of a row."""
    return png(draw_confusion(matrix, classes))


def view_sheet(images: NDArray[np.floating], titles: Sequence[str]) -> bytes:
    """PNG of training views side by side, `images` (n, 3, h, w) in levels 0..255 with the mean added back, n >= 1.

    Levels outside 0..255 (the colour shift reaches there) are clipped for the eye.
    """
    return png(draw_views(images, titles))


def draw_learning_curves(history: Sequence[HistoryRow]) -> Figure:
    """The figure of learning_curves; x is the iteration, of a logistic fit the penalty's C."""
    if any("C" in row for row in history):
        return draw_penalties(history)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.7))
        figure.subplots_adjust(left=0.055, right=0.99, bottom=0.17, top=0.9, wspace=0.13)   # half the time of "constrained"
        loss, accuracy = figure.subplots(1, 2)
        steps = thinned([row for row in history if "epoch" not in row and finite(row, "train_loss")])
        epochs = [row for row in history if "epoch" in row]
        if steps:
            plot(loss, steps, "train_loss", color=TRAIN_COLOUR, linewidth=0.6, alpha=0.45)
        plot(loss, epochs, "train_loss", color=TRAIN_COLOUR, marker="o", label="train")
        plot(loss, epochs, "val_loss", color=VAL_COLOUR, marker="s", linestyle="--", label="val")
        plot(accuracy, epochs, "val_top1_accuracy", percent=True, color=VAL_COLOUR, marker="s", linestyle="--")
        loss.set(title="Loss", xlabel="iteration")
        accuracy.set(title="Top-1 accuracy on val, %", xlabel="iteration")
        for axes in (loss, accuracy):
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.set_xlim(left=0)
        for iteration, rate in rate_drops(epochs):
            for axes in (loss, accuracy):
                axes.axvline(iteration, color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
            accuracy.annotate(
                f"rate {rate:g}", (iteration, 0.0), xycoords=("data", "axes fraction"), xytext=(2, 3),
                textcoords="offset points", va="bottom", rotation=90, fontsize=6.5, alpha=0.8,
            )   # fmt: skip
        if loss.get_legend_handles_labels()[0]:
            loss.legend(loc="upper right", fontsize=7.5)
        return figure


def draw_penalties(history: Sequence[HistoryRow]) -> Figure:
    """The losses and the accuracy on val at each penalty that a logistic fit tried."""
    rows = [row for row in history if finite(row, "C") and finite(row, "val_loss")]
    best = min(rows, key=lambda row: (row["val_loss"], row["C"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.7))
        figure.subplots_adjust(left=0.055, right=0.99, bottom=0.17, top=0.9, wspace=0.13)
        loss, accuracy = figure.subplots(1, 2)
        for axes, name, factor, looks in (
            (loss, "train_loss", 1, {"color": TRAIN_COLOUR, "marker": "o", "label": "train"}),
            (loss, "val_loss", 1, {"color": VAL_COLOUR, "marker": "s", "linestyle": "--", "label": "val"}),
            (accuracy, "val_top1_accuracy", 100, {"color": VAL_COLOUR, "marker": "s", "linestyle": "--"}),
        ):
            axes.plot([row["C"] for row in rows], [factor * row[name] for row in rows], markersize=3, linewidth=1.2, **looks)
        loss.set(title="Loss", xlabel="C: a larger one is a weaker penalty")
        accuracy.set(title="Top-1 accuracy on val, %", xlabel="C")
        for axes in (loss, accuracy):
            axes.set_xscale("log")
            axes.axvline(best["C"], color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        loss.legend(loc="upper right", fontsize=7.5)
        return figure


def plot(axes: Axes, rows: Sequence[HistoryRow], name: str, *, percent: bool = False, **looks: Any) -> None:
    """One curve of the finite values of `name`; none where no row has one."""
    points = [(row["iteration"], row[name] * (100 if percent else 1)) for row in rows if finite(row, name)]
    if points:
        iterations, values = zip(*points, strict=True)
        axes.plot(iterations, values, markersize=3 if len(points) <= 40 else 0, **{"linewidth": 1.2, **looks})


def thinned(steps: Sequence[HistoryRow]) -> list[HistoryRow]:
    """At most MOST_POINTS rows: the mean loss of equal runs of iterations, each at its last one."""
    size = -(-len(steps) // MOST_POINTS)
    if size <= 1:
        return list(steps)
    runs = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [
        {"iteration": run[-1]["iteration"], "train_loss": sum(row["train_loss"] for row in run) / len(run)} for run in runs
    ]


def finite(row: HistoryRow, name: str) -> bool:
    """Whether the row has a number by this name that can be drawn, and its iteration."""
    value = row.get(name)
    return isinstance(value, int | float) and bool(np.isfinite(value)) and "iteration" in row


def rate_drops(epochs: Sequence[HistoryRow]) -> list[tuple[int, float]]:
    """(iteration, new rate) where the plateau rule divided the rate by 10: the end of the last epoch at the old one.

    A rate that falls with every iteration has no such places.
    """
    known = [row for row in epochs if finite(row, "learning_rate")]
    return [
        (int(before["iteration"]), float(after["learning_rate"]))
        for before, after in itertools.pairwise(known)
        if math.isclose(10 * after["learning_rate"], before["learning_rate"], rel_tol=1e-9)
    ]


def draw_confusion(matrix: NDArray[np.integer], classes: Sequence[str]) -> Figure:
    """The figure of confusion_figure."""
    count = len(classes)
    rows = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(9.0, 2.2 + 0.35 * count)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        shares = matrix / rows
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted class", ylabel="true class")
        if count <= 60:
            names = [shortened(name) for name in classes]
            axes.set_xticks(range(count), names, rotation=0 if count <= 3 else 90)
            axes.set_yticks(range(count), names)
        if count <= MOST_CLASSES_WITH_NUMBERS:
            for true, predicted in np.ndindex(count, count):
                ink = "white" if shares[true, predicted] > 0.5 else "black"
                axes.text(predicted, true, f"{matrix[true, predicted]}", ha="center", va="center", color=ink, fontsize=8)
        return figure


def draw_views(images: NDArray[np.floating], titles: Sequence[str]) -> Figure:
    """The figure of view_sheet: up to eight views a row."""
    columns = min(8, len(images))
    lines = -(-len(images) // columns)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.3 * columns, 1.55 * lines))
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - 0.22 / (1.55 * lines), wspace=0.06, hspace=0.22)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, image, title in zip(grid.flat, images, titles, strict=False):
            axes.imshow(np.clip(np.rint(image), 0, 255).astype(np.uint8).transpose(1, 2, 0))
            axes.set_title(shortened(title, 24), fontsize=6.5)
        return figure


def shortened(name: str, most: int = 18) -> str:
    """A name that fits a label: its first characters and an ellipsis when it is longer than `most`."""
    return name if len(name) <= most else name[: most - 1] + "…"


def png(figure: Figure) -> bytes:
    """The figure as PNG on white."""
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": CREATOR})
    return out.getvalue()


def svg(figure: Figure, *, name: str, label: str) -> str:
    """The figure as an <svg> element to stand in a page, its ink the page's own (`currentColor`), background clear.

    name: a word before each id inside, so that several figures on one page do not share ids; label: what a screen
    reader says. Both must be safe in an attribute.
    """
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "inherit")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    head = re.search(r'viewBox="[^"]*"', text)
    assert head is not None
    return f'<svg role="img" aria-label="{label}" {head[0]}>' + text[text.index(">") + 1 :]


def data_uri(content: bytes, kind: str) -> str:
    """`content` as a data: URI of MIME type `kind`, for the src of an image inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
