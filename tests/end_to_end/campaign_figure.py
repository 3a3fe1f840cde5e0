"""The figure of a kill campaign, from its record: a row a run, a mark a kill, and how each run ended.

    python -m tests.end_to_end.campaign_figure docs/images/kill-campaign.json
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from deploy.charts import INK, STYLE

MARKS = {"worker": ("o", "#0072B2"), "driver": ("s", "#D55E00"), "both": ("D", "#009E73")}   # Okabe and Ito's palette
LABELS = {"worker": "a worker", "driver": "the command", "both": "both at once"}


def draw(records: list[dict[str, Any]]) -> Figure:
    """The figure of these campaigns' records, in their order."""
    rows = [row for record in records for row in rows_of(record)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.25 + 0.34 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (_, seconds, kills, ending) in enumerate(rows):
            axes.plot([0, seconds], [place, place], color=INK, linewidth=0.9, alpha=0.45)
            axes.annotate(ending, (seconds, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)
            for kill in kills:
                marker, colour = MARKS[kill["kind"]]
                inside = colour if kill["phase"] == "training" else "white"
                axes.plot(kill["second"], place, marker=marker, color=colour, markerfacecolor=inside, markersize=5.5)
                axes.annotate(
                    f"{kill['iteration']}", (kill["second"], place), xytext=(0, 4.5), textcoords="offset points",
                    ha="center", va="bottom", fontsize=5.5, alpha=0.8,
                )   # fmt: skip
        for kind, (marker, colour) in MARKS.items():
            axes.plot([], [], marker=marker, color=colour, markersize=5.5, linestyle="none", label=LABELS[kind])
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=7.5)
        axes.set_ylim(len(rows) - 0.4, -0.8)
        axes.set_xlim(0, 1.12 * max(seconds for _, seconds, *_ in rows))
        axes.set_xlabel("seconds since the run's first command; number: iteration reached; hollow: not in training")
        axes.set_title(title(records), fontsize=9, loc="left")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=len(MARKS), fontsize=7.5, title="SIGKILL to", title_fontsize=7.5)
        return figure


def rows_of(record: dict[str, Any]) -> list[tuple[str, float, list[dict[str, Any]], str]]:
    """(name, seconds, kills, ending) of a campaign's runs, the undisturbed one first."""
    undisturbed = sum(record["undisturbed"].values())
    rows: list[tuple[str, float, list[dict[str, Any]], str]] = [
        (f"{record['workers']} workers, undisturbed", undisturbed, [], f"{record['iterations']} iterations")
    ]
    for number, (run, equal) in enumerate(zip(record["runs"], record["equal"], strict=True), 1):
        rows.append((f"run {number}", run["seconds"], run["kills"], "same bits" if equal else "DIFFERS"))
    return rows


def title(records: list[dict[str, Any]]) -> str:
    """What the campaigns came to, with its numbers."""
    kinds = Counter(kill["kind"] for record in records for run in record["runs"] for kill in run["kills"])
    equal = [one for record in records for one in record["equal"]]
    numbers = " and ".join(str(record["workers"]) for record in records)
    counts = ", ".join(f"{kinds[kind]} of {LABELS[kind]}" for kind in MARKS if kinds[kind])
    return (
        f"{kinds.total()} kills at {numbers} workers ({counts}):\n"
        f"{sum(equal)} of {len(equal)} runs end with the undisturbed run's weights and history, bit by bit"
    )


def write_figure(records: list[dict[str, Any]], path: Path) -> None:
    """The figure as an SVG file on white, the same bytes for the same record."""
    with matplotlib.rc_context(STYLE):
        draw(records).savefig(path, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    record_path = Path(sys.argv[1])
    write_figure(json.loads(record_path.read_text()), record_path.with_suffix(".svg"))
