"""A pipeline's history: its ticks in a table for the terminal, and one HTML page with the champion's accuracy over time."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from deploy.decision_history import history
from deploy.gate import bare
from deploy.gate_classes import new_class_text
from deploy.own_output import check_page
from deploy.pipeline_file import Pipeline
from deploy.ticks import PROMOTED, REFUSED, STEPS, STOPPED, UNCHANGED, WAITS, Tick, ticks_name
from training.store import Store
from vggcore.recipe import load_recipe
from vggcore.whole_file import write_text

WIDTH, HEIGHT = 720.0, 240.0                        # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52.0, 16.0, 20.0, 34.0   # room for the axes
SIGNS = {PROMOTED: "▲", REFUSED: "✕", WAITS: "?", STOPPED: "■", UNCHANGED: "·"}      # shape, never colour alone


@dataclass(frozen=True)
class Dot:
    """A tick on the drawing: its place, its sign, and what it says."""

    x: float
    y: float
    sign: str
    words: str


@dataclass(frozen=True)
class Drawing:
    """The champion's accuracy over time as a line of steps, in the drawing's own units."""

    line: str                            # an SVG path
    dots: tuple[Dot, ...]
    levels: tuple[tuple[float, str], ...]     # y and its label
    days: tuple[tuple[float, str], ...]       # x and its label


def moment(tick: Tick) -> datetime.datetime:
    """When a tick began."""
    return datetime.datetime.fromisoformat(tick.began)


def champion_of(tick: Tick) -> dict[str, Any] | None:
    """The champion after a tick."""
    found: dict[str, Any] | None = tick.records.get("notify", {}).get("champion")
    return found


def draw(ticks: Sequence[Tick]) -> Drawing | None:
    """The drawing of ticks that have begun; None where no champion's accuracy is known."""
    known = [(tick, champion_of(tick)) for tick in ticks if tick.began]
    champions = [found for _, found in known if found is not None]
    values: list[float] = [one["test_top1_accuracy"] for one in champions if one["test_top1_accuracy"] is not None]
    if not values:
        return None
    low, high = max(0.0, min(values) - 0.02), min(1.0, max(values) + 0.02)
    first, last = moment(known[0][0]), moment(known[-1][0])
    span = max((last - first).total_seconds(), 1.0)

    def across(tick: Tick) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (moment(tick) - first).total_seconds() / span

    def down(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    steps, dots, level = "", [], None
    for tick, found in known:
        value = found["test_top1_accuracy"] if found else None
        if value is not None:
            steps += f"M{across(tick):.1f} {down(value):.1f}" if level is None else f"H{across(tick):.1f}V{down(value):.1f}"
        elif level is not None:
            steps += f"H{across(tick):.1f}"
        level = value
        y = down(value) if value is not None else HEIGHT - BOTTOM
        dots.append(Dot(across(tick), y, SIGNS.get(tick.outcome, "○"), f"tick {tick.number}, {tick.outcome}"))
    levels = [low + (high - low) * share for share in (0.0, 0.5, 1.0)]
    ends = [known[0][0]] if span == 1.0 else [known[0][0], known[-1][0]]
    return Drawing(
        line=steps,
        dots=tuple(dots),
        levels=tuple((down(value), f"{value:.1%}") for value in levels),
        days=tuple((across(tick), tick.began[:10]) for tick in ends),
    )


def what_by_hand(one: dict[str, Any]) -> str:
    """A decision in words: which version was promoted, refused, or rolled back, and to which."""
    if one["action"] == "rolled back":
        return f"version {one['champion_before']} rolled back, version {one['version']} champion again"
    return f"version {one['version']} {one['action']}"


def by_hand(pipeline: Pipeline) -> list[dict[str, Any]]:
    """What people decided about the pipeline's model, outside its ticks, the oldest first: lines of the registry's history."""
    lines = history(Store(pipeline.run.store), load_recipe(pipeline.recipe).name)
    return [line for line in lines if line["by"] != ticks_name(pipeline.name)]


def write_page(pipeline: Pipeline, ticks: Sequence[Tick], decisions: Sequence[dict[str, Any]], out: Path) -> None:
    """Writes the page to `out`, whole or not at all; it needs no network and no other file. StoreError if it cannot be.

    decisions: those taken by hand, see by_hand.
    """
    check_page(out)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deploy", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["percent"] = lambda share: "–" if share is None else f"{share:.2%}"
    environment.filters["by_hand"] = what_by_hand
    environment.filters["new_class"] = new_class_text
    environment.filters["when"] = lambda text: text[:16].replace("T", " ") if text else "–"
    page = environment.get_template("history.html.j2").render(
        pipeline=pipeline,
        ticks=list(reversed(ticks)),
        decisions=list(reversed(decisions)),
        champion=next((champion_of(tick) for tick in reversed(ticks) if tick.finished), None),
        promotions=sum(tick.outcome == PROMOTED for tick in ticks),
        drawing=draw(ticks),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        signs=SIGNS,
        steps=STEPS,
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_text(out, page)


def history_text(ticks: Sequence[Tick], decisions: Sequence[dict[str, Any]]) -> str:
    """The ticks for a terminal, a line each, the oldest first; then what people decided by hand."""
    if not ticks:
        return "no tick yet; run one with vggrow retrain"
    rows = [("tick", "began (UTC)", "outcome", "version", "champion", "why")]
    for tick in ticks:
        champion = champion_of(tick)
        held = "–"
        if champion is not None:
            accuracy = champion["test_top1_accuracy"]
            held = f"{champion['version']}" + (f" ({accuracy:.4f})" if accuracy is not None else "")
        version = tick.records.get("register", {}).get("version", "–")
        began = tick.began[:16].replace("T", " ") or "–"
        rows.append((str(tick.number), began, tick.outcome, version, held, tick.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    new = [[], *([new_class_text(one) for one in tick.new_classes] for tick in ticks)]
    lines = []
    for row, texts in zip(rows, new, strict=True):
        lines.append([*(cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)), row[5]])
        lines += [[" " * widths[0], text] for text in texts]
    lines += [[""]] if decisions else []
    for one in decisions:
        moment_of = one["at"][:16].replace("T", " ")
        lines.append([f"by hand, {moment_of}: {what_by_hand(one)} by {one['by']} ({bare(one['reason'])})"])
        lines += [[" " * 7, new_class_text(its)] for its in (one.get("decision") or {}).get("new_classes", ())]
    return "\n".join("  ".join(line) for line in lines)
