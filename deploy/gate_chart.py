"""The pictures of the gate: one decision with its evidence, and what gate lists of several sizes can show."""

import io
import re
import textwrap
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deploy.charts import DPI, INK, STYLE, TRAIN_COLOUR, VAL_COLOUR, png, shortened
from deploy.gate import METRIC_NAMES, ClassChange, Decision
from vggcore.paired import powers

MOST_CLASSES = 12                            # of a decision's figure: those that fell furthest
POWER_PICTURES = (100, 333, 1000, 3000)      # sizes of gate list in the power figure
POWER_DISCORDANCE = 0.10                     # as of two VGG nets of one schedule on 333 pictures
POWER_GAINS = np.linspace(0.0, 0.10, 41)   # one model alone is right on no more pictures than they differ on
POWER_LEVELS = ((0.05, "one use at 0.05"), (0.05 / 52, "each of 52 uses, 0.05 / 52"))
LINES = ("-", "--", "-.", ":")
COLOURS = (TRAIN_COLOUR, VAL_COLOUR, "#009E73", "#CC79A7")   # Okabe and Ito's palette


def decision_figure(decision: Decision) -> bytes:
    """PNG of a decision: its reason in words, how the models differ, the gain with its bound, each class's change."""
    lines = textwrap.wrap("".join(one if one.isprintable() else " " for one in decision.reason), 118)
    words = 0.3 + 0.16 * len(lines)
    shown = sorted(decision.classes, key=lambda one: (one.change, one.name))[:MOST_CLASSES]
    body = max(2.3, 0.7 + 0.24 * len(shown)) if decision.counts else 0.1
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)   # scripts the font lacks: decision.json has the words
        figure = Figure(figsize=(7.6, words + body), dpi=DPI)
        height = words + body
        verdict, colour = ("Promoted", TRAIN_COLOUR) if decision.promote else ("Refused", VAL_COLOUR)
        figure.text(0.02, 1 - 0.05 / height, verdict, color=colour, fontsize=11, weight="bold", va="top")
        figure.text(0.02, 1 - 0.26 / height, "\n".join(lines), fontsize=7.5, va="top", linespacing=1.35)
        if decision.counts:
            grid = figure.add_gridspec(
                2, 2, left=0.17, right=0.98, bottom=0.42 / height, top=1 - (words + 0.25) / height,
                hspace=1.1, wspace=0.55, width_ratios=(1, 1.1),
            )   # fmt: skip
            draw_counts(figure.add_subplot(grid[0, 0]), decision.counts)
            draw_gain(figure.add_subplot(grid[1, 0]), decision)
            draw_classes(figure.add_subplot(grid[:, 1]), shown, len(decision.classes))
        return png(figure)


def draw_counts(axes: Axes, counts: dict[str, int]) -> None:
    """The two kinds of picture on which the models differ, with their numbers."""
    values = [counts["only_champion"], counts["only_challenger"]]
    axes.barh(["only champion", "only challenger"], values, color=(VAL_COLOUR, TRAIN_COLOUR), height=0.6)
    for place, value in enumerate(values):
        axes.annotate(str(value), (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_title(f"Right, of {sum(counts.values())} pictures", fontsize=8.5)
    axes.set_xlim(0, 1.15 * max(1, *values))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(visible=False, axis="y")


def draw_gain(axes: Axes, decision: Decision) -> None:
    """The gain with its lower bound, and the gain that was needed, in points."""
    assert decision.gain is not None and decision.gain_low is not None
    gain, low = 100 * decision.gain, 100 * decision.gain_low
    axes.plot([low, gain], [0, 0], color=INK, linewidth=1.5)
    axes.plot([gain], [0], "o", color=TRAIN_COLOUR if decision.promote else VAL_COLOUR, markersize=6)
    axes.plot([low], [0], "|", color=INK, markersize=9)
    if decision.needed_gain is not None and decision.needed_gain <= 1:
        needed = 100 * decision.needed_gain
        axes.axvline(needed, color=INK, linestyle="--", linewidth=1)
        axes.annotate(
            f"needed {needed:.1f}", (needed, 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
            textcoords="offset points", va="top", fontsize=7,
        )   # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks([0], ["gain"])
    axes.margins(x=0.35)
    axes.set_title(f"Gain in {METRIC_NAMES[decision.metric]}, points", fontsize=8.5)


def draw_classes(axes: Axes, changes: Sequence[ClassChange], classes: int) -> None:
    """Each class's change of recall with its interval, the furthest fall on top."""
    places = np.arange(len(changes))
    for place, one in zip(places, changes, strict=True):
        axes.plot([100 * one.low, 100 * one.high], [place, place], color=INK, linewidth=1)
    axes.plot([100 * one.change for one in changes], places, "s", color=TRAIN_COLOUR, markersize=4)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(places, [f"{shortened(one.name, 14)} ({one.pictures})" for one in changes], fontsize=7.5)
    axes.set_ylim(len(changes) - 0.4, -0.6)
    which = "of each class" if len(changes) == classes else f"of the lowest {len(changes)} of {classes} classes"
    axes.set_title(f"Change of recall {which}, points", fontsize=8.5, loc="right")


def power_figure() -> str:
    """SVG of the power of McNemar's exact test against the true gain, for several sizes of gate list and two alphas."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        for axes, (alpha, name) in zip(figure.subplots(1, 2, sharey=True), POWER_LEVELS, strict=True):
            for pictures, line, colour in zip(POWER_PICTURES, LINES, COLOURS, strict=True):
                chances = powers(pictures, POWER_DISCORDANCE, POWER_GAINS, alpha)
                axes.plot(100 * POWER_GAINS, 100 * chances, line, color=colour, label=f"{pictures} pictures")
            axes.axhline(80, color=INK, linewidth=0.7, linestyle=":", alpha=0.6)
            axes.set(title=name, xlabel="true gain in top-1 accuracy, points", xlim=(0, 10), ylim=(0, 101))
        figure.axes[0].set_ylabel("promoted, times in 100")
        figure.legend(handles=figure.axes[0].get_lines()[: len(POWER_PICTURES)], loc="outside right center", fontsize=7.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", out.getvalue(), flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
