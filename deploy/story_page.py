"""The story's page: seven days, what happened on each, what Vggrow decided and why; charts and words, and not one picture."""

import base64
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from deploy.decision_page import decision_of_json
from deploy.gate import GateRules
from deploy.gate_chart import decision_figure
from deploy.history_page import SIGNS
from deploy.story_pictures import DELIVERIES, SIDE
from deploy.ticks import STEPS, Tick
from vggcore.paired import alpha_of_use, power
from vggcore.whole_file import write_text

ROLLED_BACK = "rolled back"
DAY_SIGNS = {**SIGNS, ROLLED_BACK: "↺"}
WIDTH, HEIGHT = 760.0, 270.0                        # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 56.0, 24.0, 14.0, 40.0   # room for the axes
STEP = 0.05                                         # of accuracy, between two lines of the drawing

# How the gate was sized, before any model had seen a gate picture: net A by the story's recipe, trained on the cells of the
# first delivery and on those of the first two, measured on the 500 cells of the third and fourth (no gate picture among them).
TRIAL_CELLS = 500
TRIAL_TOP1 = (0.682, 0.808)      # the first called every cell functional
TRIAL_DISCORDANCE = 0.29
MORE_CELLS, MORE_TOP1 = 60, 0.778   # a larger first delivery, tried and left (its learning rate was 1e-2)
SIZES = (100, 200, 333, 500, 1000)


@dataclass(frozen=True)
class Mark:
    """A point of the drawing: a model at the gate, with its sign, label and words for a pointer."""

    x: float
    y: float
    sign: str
    label: str
    words: str
    champion: bool
    below: bool                                  # its label, where the line comes from above


@dataclass(frozen=True)
class Drawing:
    """Accuracy on the gate pictures over the days, in the drawing's own units."""

    line: str                                    # SVG path of the champion
    marks: tuple[Mark, ...]
    levels: tuple[tuple[float, str], ...]        # y and its label
    days: tuple[tuple[float, str], ...]          # x and its label
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT


@dataclass(frozen=True)
class DayView:
    """A day with the ticks that it had."""

    facts: Mapping[str, Any]
    reason: str                                  # why the tick ended as it did
    when: datetime.datetime
    tick: Tick
    decision: Mapping[str, Any] | None           # of a gate that looked at pictures
    picture: str                                 # the decision's, a data: URI; "" without one
    classes: tuple[tuple[str, int, int | None], ...]      # name, pictures, how many more than at the last training

    @property
    def steps(self) -> list[str]:
        """The steps that the tick took."""
        return [step for step in STEPS if step in self.tick.records]


def write_page(folder: Path, found: Sequence[Tick], out: Path) -> None:
    """Writes the page about the story in `folder`, with its ticks, to `out`, whole; it needs no network and no other file."""
    story = json.loads((folder / "story.json").read_text(encoding="utf-8"))
    ticks = {tick.number: tick for tick in found}
    days = [view(day, ticks[day["ticks"][-1]], folder) for day in story["days"]]
    rules = GateRules()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deploy", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["percent"] = lambda share: "–" if share is None else f"{share:.1%}"
    environment.filters["points"] = lambda share: "–" if share is None else f"{100 * share:+.1f}"
    environment.filters["chance"] = lambda share: f"{share:.2g}"
    page = environment.get_template("story.html.j2").render(
        days=days,
        minutes=story["took_s"] / 60,
        signs=DAY_SIGNS,
        drawing=draw(days),
        gate=DELIVERIES["first"]["gate"],
        side=SIDE,
        learnt=(DELIVERIES["first"]["train"], DELIVERIES["first"]["train"] + DELIVERIES["second"]["train"]),
        alpha=rules.alpha,
        uses=rules.planned_uses,
        alpha_k=alpha_of_use(rules.alpha, rules.planned_uses, 1),
        trial_cells=TRIAL_CELLS,
        trial=TRIAL_TOP1,
        discordance=TRIAL_DISCORDANCE,
        more_cells=MORE_CELLS,
        more_top1=MORE_TOP1,
        powers=gate_sizes(rules),
        champion=days[-1].tick.records["notify"]["champion"],
        told=sum(len(day["messages"]) for day in story["days"]),
        trained=sum("register" in tick.records for tick in ticks.values()),
    )
    write_text(out, page)


def gate_sizes(rules: GateRules) -> list[tuple[int, float]]:
    """How often gates of several sizes would see the gain that was expected of day 3, at the alpha of one use."""
    alpha_k = alpha_of_use(rules.alpha, rules.planned_uses, 1)
    gain = TRIAL_TOP1[1] - TRIAL_TOP1[0]
    return [(pictures, power(pictures, TRIAL_DISCORDANCE, gain, alpha_k)) for pictures in SIZES]


def view(day: Mapping[str, Any], tick: Tick, folder: Path) -> DayView:
    """A day as the page shows it; paths count from the story's folder."""
    decision = tick.records.get("gate", {}).get("decision")
    asked = decision if decision is not None and decision.get("counts") else None
    picture = ""
    if asked is not None:
        encoded = base64.b64encode(decision_figure(decision_of_json(asked))).decode()
        picture = f"data:image/png;base64,{encoded}"
    words = tick.reason.removeprefix(f"{tick.outcome}: ").replace(f"{folder}/", "")
    return DayView(
        facts=day,
        reason=f"{words[0].upper()}{words[1:]}.",
        when=datetime.datetime.fromisoformat(day["when"]),
        tick=tick,
        decision=asked,
        picture=picture,
        classes=class_counts(tick),
    )


def class_counts(tick: Tick) -> tuple[tuple[str, int, int | None], ...]:
    """The pictures of each class that the scan found, and how many more than at the last training; () for a failed scan."""
    summary, drift = (tick.records["scan"].get(name) for name in ("summary", "drift"))
    if not summary:
        return ()
    before = drift["last"]["classes"] if drift else {}
    return tuple((name, count, count - before[name] if name in before else None) for name, count in summary["classes"].items())


def gate_accuracies(days: Sequence[DayView]) -> dict[str, float]:
    """Each version's accuracy on the gate pictures, 0..1, from the decisions that it was part of."""
    found: dict[str, float] = {}
    for day in days:
        if day.decision is not None:
            counts = day.decision["counts"]
            pictures = sum(counts.values())
            for name, alone in (("challenger", "only_challenger"), ("champion", "only_champion")):
                found[version_of(day.decision[name])] = (counts["both_right"] + counts[alone]) / pictures
    return found


def version_of(model: str) -> str:
    """The version in a model's name, such as models:/cells/2."""
    return model.rsplit("/", 1)[-1]


def draw(days: Sequence[DayView]) -> Drawing:
    """The champion's accuracy on the gate pictures as a line of steps, and each challenger's where it was judged."""
    accuracy = gate_accuracies(days)
    steps = range(math.floor(min(accuracy.values()) / STEP - 0.3), math.ceil(max(accuracy.values()) / STEP + 0.5) + 1)
    low, high = steps[0] * STEP, steps[-1] * STEP
    gap = (WIDTH - LEFT - RIGHT) / len(days)

    def down(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    line, marks = "", []
    for place, day in enumerate(days):
        x = LEFT + gap * (place + 0.5)
        champion = day.tick.records["notify"]["champion"]["version"]
        y = down(accuracy[champion])
        line += f"H{x:.1f}V{y:.1f}" if line else f"M{x:.1f} {y:.1f}"
        judged = version_of(day.decision["challenger"]) if day.decision is not None else champion
        sign, outcome = DAY_SIGNS[day.facts["outcome"]], day.facts["outcome"]
        words = f"day {day.facts['number']}, {outcome}: version {judged}, {accuracy[judged]:.1%} of the gate pictures right"
        moved = judged != champion or outcome in ("promoted", ROLLED_BACK)
        label = f"v{judged} {accuracy[judged]:.1%}" if moved else ""
        marks.append(Mark(x, down(accuracy[judged]), sign, label, words, judged == champion, outcome == ROLLED_BACK))
    line += f"H{WIDTH - RIGHT:.1f}"
    return Drawing(
        line=line,
        marks=tuple(marks),
        levels=tuple((down(step * STEP), f"{step * STEP:.0%}") for step in steps),
        days=tuple((LEFT + gap * (place + 0.5), f"Day {day.facts['number']}") for place, day in enumerate(days)),
    )
