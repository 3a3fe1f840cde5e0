"""Stages held against each other by what they cost: val accuracy and training loss over operations, a line a seed."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deploy.charts import DPI, STYLE, HistoryRow, finite
from deploy.own_output import CREATOR, check_figure
from deploy.plan_table import aligned, number
from deploy.report import find_schedule
from pipelines.manifest import Manifest, read_manifest
from pipelines.plan import batches_per_epoch
from training.features.cost import feature_macs
from training.freezing import usual_macs
from training.history import read_history
from training.store import read_json
from vggcore.errors import StoreError
from vggcore.nets import layer_table
from vggcore.schedule import Stage
from vggcore.whole_file import whole_file

POINTS_AN_EPOCH = 4       # of the training loss: enough to see the first iterations leave ln(classes), or not
FORMATS = (".svg", ".png")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")      # Okabe and Ito's palette
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
UNITS = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
STAGES = len(COLOURS)     # that one figure tells apart


@dataclass(frozen=True)
class Curve:
    """One stage of one schedule; operations count its parents' from the first one on, a multiply-add being two."""

    stage: str
    net: str
    init_from: str | None
    initialise: str
    key: str
    seed: int
    begins: float                              # operations of the stages it starts from
    accuracy: tuple[tuple[float, float], ...]  # (operations, top-1 on val 0..1) at each epoch's end
    loss: tuple[tuple[float, float], ...]      # (operations, mean training loss of the iterations since the point before)
    last_epoch_loss: float                     # mean training loss over the last epoch
    test_top1: float | None                    # as the schedule's [evaluate] measured it, and the AUC with it
    test_auc: float | None

    @property
    def ends(self) -> float:
        """Operations at its last epoch, those of the stages it starts from included."""
        return self.accuracy[-1][0]

    @property
    def best(self) -> float:
        """The highest top-1 on val of an epoch, 0..1: optimistic, as any maximum is."""
        return max(value for _, value in self.accuracy)


@dataclass(frozen=True)
class Comparison:
    """The curves of some schedules on the same pictures, with what a net knows that looks at none of them."""

    curves: tuple[Curve, ...]                  # in the recipe's order, then by seed
    uniform_loss: float                        # ln(classes): every class equally likely
    shares_loss: float                         # entropy of the training set's class shares
    left_out: tuple[str, ...] = ()             # logistic fits: they have no epochs, and so no curve

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages' names, each once, in the recipe's order."""
        return tuple(dict.fromkeys(curve.stage for curve in self.curves))

    def of(self, stage: str) -> tuple[Curve, ...]:
        """The curves of one stage, a seed each."""
        return tuple(curve for curve in self.curves if curve.stage == stage)


def compare(store: Path, wanted: Sequence[str]) -> Comparison:
    """The stages of the schedules `wanted`, keys or recipes' names; none: all of the newest schedule's recipe's name.

    A recipe's name stands for all its schedules, such as copies that differ in their seed. A stage that two of them share
    counts once. Raises StoreError for no such schedule, stages that have no finished epoch, schedules on other pictures,
    or more stages than one figure tells apart.
    """
    newest, others = find_schedule(store, None)
    chosen: list[dict[str, Any]] = []
    for word in wanted or [newest["name"]]:
        named = [one for one in (newest, *others) if one["name"] == word]
        chosen += named or [find_schedule(store, word)[0]]
    if len({one["fingerprint"] for one in chosen}) > 1:
        listed = ", ".join(f"{one['key']} ({one['fingerprint'][:8]})" for one in chosen[:8])
        raise StoreError(f"{store}: these schedules are on other pictures or splits (fingerprint); name some of one: {listed}")
    manifest = read_manifest(store / "data" / chosen[0]["fingerprint"])
    cost = Cost(store, manifest)
    found: dict[str, Curve] = {}
    for schedule in chosen:
        for entry in schedule["stages"]:
            curve = read_curve(store, entry, schedule, cost)
            if curve is not None:
                found.setdefault(curve.key, curve)
    if not found and all(is_fit(store, entry) for schedule in chosen for entry in schedule["stages"]):
        raise StoreError(
            f"{store}: the stages of {chosen[0]['name']} are logistic fits, which have no epochs to draw; see vggrow report"
        )
    if not found:
        raise StoreError(f"{store}: no stage of {chosen[0]['name']} has finished an epoch yet; let `vggrow train` go on")
    order = list(dict.fromkeys(entry["name"] for schedule in chosen for entry in schedule["stages"]))
    if len({curve.stage for curve in found.values()}) > STAGES:
        raise StoreError(f"{store}: {len(order)} stages, but one figure tells {STAGES} apart; name one schedule by its key")
    labels = manifest.split("train").labels.tolist()
    shares = [labels.count(label) / len(labels) for label in set(labels)]
    return Comparison(
        curves=tuple(sorted(found.values(), key=lambda curve: (order.index(curve.stage), curve.seed, curve.key))),
        uniform_loss=math.log(len(manifest.classes)),
        shares_loss=-sum(share * math.log(share) for share in shares),
        left_out=tuple(dict.fromkeys(entry["name"] for one in chosen for entry in one["stages"] if is_fit(store, entry))),
    )


def is_fit(store: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a stage of a schedule is a logistic fit."""
    about = read_json(store / "stages" / entry["key"] / "stage.json")
    return isinstance(about, dict) and about.get("stage", {}).get("fit") == "logistic"


def read_curve(store: Path, entry: Mapping[str, Any], schedule: Mapping[str, Any], cost: "Cost") -> Curve | None:
    """The curve of one stage of a schedule; None where it has no finished epoch."""
    key = entry["key"]
    history = read_history(store / "stages" / key / "history.jsonl")
    epochs = [row for row in history if "epoch" in row and finite(row, "val_top1_accuracy") and finite(row, "train_loss")]
    if not epochs:
        return None
    settings, begins = cost.settings(key), cost.before(key)
    place = (schedule.get("evaluations") or {}).get(entry["name"])
    facts = read_json(store / place / "evaluation.json") if place else None
    points = loss_points(history, cost.iterations_an_epoch(key))
    return Curve(
        stage=entry["name"],
        net=settings["net"],
        init_from=entry["init_from"],
        initialise=settings["initialise"],
        key=key,
        seed=settings["seed"],
        begins=begins,
        accuracy=tuple((begins + cost.within(key, row["iteration"]), float(row["val_top1_accuracy"])) for row in epochs),
        loss=tuple((begins + cost.within(key, iteration), value) for iteration, value in points),
        last_epoch_loss=float(epochs[-1]["train_loss"]),
        test_top1=facts["top1_accuracy"] if facts else None,
        test_auc=facts["auc"] if facts else None,
    )


def loss_points(history: Sequence[HistoryRow], iterations_an_epoch: int) -> list[tuple[float, float]]:
    """(middle iteration, mean loss) of POINTS_AN_EPOCH equal runs of iterations an epoch."""
    steps = [row for row in history if "epoch" not in row and finite(row, "train_loss")]
    size = max(1, round(iterations_an_epoch / POINTS_AN_EPOCH))
    runs = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [
        (mean((run[0]["iteration"] - 1, run[-1]["iteration"])), mean(row["train_loss"] for row in run)) for run in runs
    ]


class Cost:
    """What stages of a store cost in operations: forward and backward of every view trained on; val is not counted."""

    def __init__(self, store: Path, manifest: Manifest) -> None:
        """manifest: of the pictures that all of these stages learn from."""
        self.store = store
        self.classes, self.pictures = len(manifest.classes), len(manifest.split("train").labels)
        self.records: dict[str, dict[str, Any]] = {}       # stage.json by the stage's key
        self.a_view: dict[str, float] = {}                 # operations of one view, by the stage's key

    def record(self, key: str) -> dict[str, Any]:
        """A stage's stage.json. Raises StoreError where it is not there."""
        if key not in self.records:
            found = read_json(self.store / "stages" / key / "stage.json")
            if not isinstance(found, dict):
                raise StoreError(f"{self.store / 'stages' / key}: no stage.json, so its cost is not known; train it again")
            self.records[key] = found
        return self.records[key]

    def settings(self, key: str) -> dict[str, Any]:
        """A stage's settings as they were resolved."""
        found: dict[str, Any] = self.record(key)["stage"]
        return found

    def iterations_an_epoch(self, key: str) -> int:
        """How many batches an epoch of a stage has."""
        return batches_per_epoch(self.pictures, self.settings(key)["global_batch"])

    def within(self, key: str, iteration: float) -> float:
        """Operations of a stage's first iterations; an epoch's last batch may be short. A logistic fit's are its features'."""
        settings = self.settings(key)
        stage = Stage.model_validate_json(json.dumps(settings))
        if stage.fit == "logistic":
            return 2.0 * feature_macs(stage) * self.pictures
        if key not in self.a_view:
            table = layer_table(stage.net, classes=self.classes, **stage.net_settings)
            self.a_view[key] = 2.0 * usual_macs(stage, table)
        epochs, rest = divmod(iteration, self.iterations_an_epoch(key))
        views: float = epochs * self.pictures + min(rest * settings["global_batch"], self.pictures)
        return self.a_view[key] * views

    def before(self, key: str) -> float:
        """Operations of all the stages whose weights a stage starts from, each to its end."""
        parent = self.record(key)["parent"]
        if parent is None or parent["key"].startswith("weights:"):     # whoever published them trained them
            return 0.0
        history = read_history(self.store / "stages" / parent["key"] / "history.jsonl")
        return self.before(parent["key"]) + self.within(parent["key"], history[-1]["iteration"] if history else 0)


def comparison_json(found: Comparison) -> dict[str, Any]:
    """The comparison for programs: a row a stage, with every seed's figures."""
    return {
        "uniform_loss": found.uniform_loss,
        "class_shares_loss": found.shares_loss,
        "left_out": list(found.left_out),
        "stages": [
            {
                "stage": stage,
                "net": curves[0].net,
                "init_from": curves[0].init_from,
                "initialise": curves[0].initialise,
                "seeds": [curve.seed for curve in curves],
                "keys": [curve.key for curve in curves],
                "operations": [curve.ends for curve in curves],
                "val_top1_accuracy": [curve.accuracy[-1][1] for curve in curves],
                "best_val_top1_accuracy": [curve.best for curve in curves],
                "train_loss": [curve.last_epoch_loss for curve in curves],
                "test_top1_accuracy": [curve.test_top1 for curve in curves],
                "test_auc": [curve.test_auc for curve in curves],
            }
            for stage in found.stages
            for curves in [found.of(stage)]
        ],
    }


def comparison_text(found: Comparison) -> str:
    """The comparison for a terminal: a line a stage, mean and deviation over its seeds, and how figures are meant."""
    unit, size = unit_of(found)
    rows = []
    for stage in found.stages:
        curves = found.of(stage)
        rows.append(
            (
                stage,
                curves[0].init_from or f"random, {curves[0].initialise}",
                str(len(curves)),
                number(mean(curve.ends for curve in curves) / size),
                spread([100 * curve.accuracy[-1][1] for curve in curves], 1),
                spread([100 * curve.best for curve in curves], 1),
                spread([curve.last_epoch_loss for curve in curves], 3),
                spread([None if curve.test_top1 is None else 100 * curve.test_top1 for curve in curves], 1),
                spread([curve.test_auc for curve in curves], 3),
            )
        )
    titles = ("stage", "from", "seeds", unit, "val top-1 %", "best epoch %", "train loss", "test top-1 %", "AUC")
    return "\n".join(
        [
            *aligned(titles, rows, left=(0, 1)),
            "",
            f"note: mean ± standard deviation over seeds; {unit} are of training, those of the stages it starts from included",
            f"note: a net that looks at no picture has a loss of {found.uniform_loss:.3f} (all classes alike) or"
            f" {found.shares_loss:.3f} (the classes' shares)",
            *left_out_notes(found),
        ]
    )


def left_out_notes(found: Comparison) -> list[str]:
    """Which stages have no curve, and where their figures are."""
    if not found.left_out:
        return []
    have = "has" if len(found.left_out) == 1 else "have"
    return [
        f"note: {', '.join(found.left_out)} {have} no curve, being fitted without epochs (fit = \"logistic\"); figures:"
        " vggrow report, vggrow evaluate STAGE"
    ]


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and sample standard deviation: "82.1 ± 0.9"; the value alone where there is one; "-" while one is not there yet."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    text = f"{mean(known):.{digits}f}"
    return text if len(known) < 2 else f"{text} ± {stdev(known):.{digits}f}"


def unit_of(found: Comparison) -> tuple[str, float]:
    """The unit in which the largest number of operations reads well, and its size."""
    most = max(curve.ends for curve in found.curves)
    return next((unit for unit in UNITS if most >= unit[1]), UNITS[-1])


def write_figure(found: Comparison, out: Path) -> None:
    """Draws the comparison into `out`, whole or not at all. Raises StoreError for a name that is neither SVG nor PNG."""
    if out.suffix not in FORMATS:
        raise StoreError(f"{out}: no name of a figure; wanted one that ends in {' or '.join(FORMATS)}")
    check_figure(out)
    figure, content = draw_comparison(found), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        if out.suffix == ".svg":
            figure.savefig(content, format="svg", metadata={"Date": None, "Creator": CREATOR})
        else:
            FigureCanvasAgg(figure).print_png(content, metadata={"Software": CREATOR})
    with whole_file(out) as part:
        part.write_bytes(content.getvalue())


def draw_comparison(found: Comparison) -> Figure:
    """Two panels over operations: top-1 on val at the left, the training loss at the right; a thin line a seed."""
    unit, size = unit_of(found)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.6), dpi=DPI)
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.13, top=0.85, wspace=0.13)
        accuracy, loss = figure.subplots(1, 2)
        for place, stage in enumerate(found.stages):
            looks = {"color": COLOURS[place], "linestyle": LINES[place]}
            curves = found.of(stage)
            draw_seeds(accuracy, [[(x / size, 100 * y) for x, y in curve.accuracy] for curve in curves], stage, looks)
            draw_seeds(loss, [[(x / size, y) for x, y in curve.loss] for curve in curves], stage, looks)
        blind = [
            loss.axhline(value, color="black", linewidth=0.9, linestyle=line, label=f"{words}: {value:.3f}")
            for value, words, line in (
                (found.uniform_loss, "all classes alike", ":"),
                (found.shares_loss, "the classes' shares", "--"),
            )
        ]
        loss.legend(
            handles=blind, loc="upper right", fontsize=6.5, title="looking at no picture", title_fontsize=6.5, handlelength=3
        )
        accuracy.set(title="Top-1 accuracy on val, %", xlabel=f"training, {unit}, with the stages it starts from")
        loss.set(title="Training loss", xlabel=f"training, {unit}, with the stages it starts from")
        for axes in (accuracy, loss):
            axes.set_xlim(left=0)
        figure.legend(
            *accuracy.get_legend_handles_labels(), loc="upper center", ncols=STAGES, fontsize=8, handlelength=3,
            bbox_to_anchor=(0.5, 1.0),
        )   # fmt: skip
        return figure


def draw_seeds(
    axes: Axes, lines: Sequence[Sequence[tuple[float, float]]], label: str, looks: Mapping[str, Any]
) -> None:
    """A stage's curves: each seed thin, and over them their mean, as far as all of them go."""
    if len(lines) > 1:
        for line in lines:
            axes.plot(*zip(*line, strict=True), linewidth=0.5, alpha=0.5, **looks)
    together = list(zip(*lines, strict=False))
    points = [(mean(x for x, _ in group), mean(y for _, y in group)) for group in together]
    axes.plot(*zip(*points, strict=True), linewidth=1.6, label=label, **looks)
