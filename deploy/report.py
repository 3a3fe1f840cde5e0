"""One HTML page about a schedule: what was trained, on what, how it went, where it errs, where it came from, how to use it."""

import difflib
import hashlib
import html
import importlib.metadata
import io
import os
import platform
import shlex
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pyarrow import ArrowException, parquet

from deploy import charts
from deploy.decision_history import last_decisions
from deploy.doctor import without_secrets
from deploy.gate_classes import new_class_figures, new_class_text
from deploy.own_output import check_page
from deploy.yardsticks import (
    BOOTSTRAP_SEED,
    Measured,
    ResultRow,
    gain_text,
    read_measured,
    read_yardsticks,
    result_rows,
    share_right,
)
from pipelines.manifest import Manifest, read_manifest, split_counts
from training.features.suspects import FILE as SUSPECTS_FILE
from training.history import read_history
from training.store import Store, read_json
from vggcore.errors import StoreError
from vggcore.metrics import bootstrap_interval
from vggcore.whole_file import write_text

MOST_CELLS = 12            # classes up to which a confusion matrix is a table that can be read aloud; beyond, a picture
MOST_WORST = 12            # worst pictures shown a stage
THUMBNAIL_SIDE = 160       # pixels of the longer side
MOST_BOOTSTRAPPED = 10_000   # test pictures up to which a stage's interval is computed: 2,000 resamples take seconds there
LIBRARIES = ("torch", "nvidia-dali-cuda130", "ray", "mlflow", "numpy", "pillow", "scikit-learn", "scikit-image")


@dataclass(frozen=True)
class WrongPicture:
    """A test picture that the net takes for another class, with how sure it is of that."""

    path: str
    true: str
    predicted: str
    probability: float         # of the predicted class
    true_probability: float
    thumbnail: str             # a data: URI; empty when the picture cannot be shown
    problem: str               # why it cannot, or what is odd about it; empty when all is well


@dataclass(frozen=True)
class Suspect:
    """A picture of train or val whose nearest neighbours in feature space have another label."""

    path: str
    label: str
    neighbours_label: str
    neighbours: int            # how many have it
    nearest: str               # the path of the nearest of these
    thumbnail: str             # as in WrongPicture
    problem: str


@dataclass(frozen=True)
class Suspects:
    """The suspected labels of a schedule, and what they were looked for in; rows is None where there were too many."""

    source: str                # whose features
    pictures: int
    neighbours: int
    rows: tuple[Suspect, ...] | None


@dataclass(frozen=True)
class StageView:
    """All that the page says of one stage; None and "" stand for what is not there, `missing` says so in words."""

    place: int                 # 1, 2, ... in the schedule's order
    entry: Mapping[str, Any]   # its entry in stages.json
    run_id: str | None
    parent_key: str | None
    status: str
    result: Mapping[str, Any]
    curves: Markup | None = None
    curves_title: str = ""
    curves_in_words: str = ""
    evaluation: Mapping[str, Any] | None = None
    others: tuple[Mapping[str, Any], ...] = ()           # evaluations of this stage by other protocols
    interval: tuple[float, float] | None = None          # of top-1 on test, 95 %
    measured: Measured | None = None
    confusion: NDArray[np.int64] | None = None
    confusion_picture: Markup | None = None
    confused_pairs: tuple[tuple[str, str, int], ...] = ()
    wrong: tuple[WrongPicture, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The stage's name in the recipe."""
        return str(self.entry["name"])

    @property
    def logistic(self) -> bool:
        """Whether its last layer alone was fitted: it has penalties, no epochs."""
        return bool(self.result.get("fit") == "logistic")

    @property
    def scale(self) -> str:
        """The shorter sides that it saw, pixels."""
        given = self.entry.get("test_scales")
        return ", ".join(map(str, given)) if given else scale_text(self.entry["scale"])


def write_report(store: Path, schedule_key: str | None, out: Path | None = None) -> Path:
    """Writes the page about a schedule of `store` to the file `out`, whole or not at all, and returns its path.

    schedule_key: a schedule's key, the beginning of one, or a recipe's name; None: the schedule that was written last.
    out: None for report.html in the schedule's own folder.
    The page needs no network and no other file. What the store lacks (a stage that has not finished, a picture that was
    moved) is said on the page. Raises StoreError for no store, no schedule, no such schedule, or an `out` that is a folder.
    """
    if out is not None and os.path.isdir(out):  # noqa: PTH112 (a name too long is no folder, and no error yet)
        raise StoreError(f"{out}: a folder, wanted the name of the page to write, such as {out / 'report.html'}")
    if out is not None:
        check_page(out)
    schedule, others = find_schedule(store, schedule_key)
    if out is None:
        out = store / "schedules" / schedule["key"] / "report.html"
    page = render(store.absolute(), schedule, others)
    write_text(out, page)
    return out


def find_schedule(store: Path, wanted: str | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The schedule asked for, as its stages.json has it, and the store's others, the newest first."""
    if not store.is_dir():
        raise StoreError(f"{store}: no store here; name one by --store, or make one with `vggrow train RECIPE`")
    files = sorted((store / "schedules").glob("*/stages.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    schedules = [read_json(file) for file in files]
    for file, schedule in zip(files, schedules, strict=True):
        if not isinstance(schedule, dict) or not {"name", "key", "fingerprint", "classes", "stages"} <= schedule.keys():
            raise StoreError(f"{file}: not a schedule's record; move it away and start `vggrow train` again")
    if not schedules:
        raise StoreError(f"{store}: no schedule here yet; `vggrow train RECIPE --store {store}` makes one")
    if wanted is None:
        return schedules[0], schedules[1:]
    chosen = next((found for found in schedules if wanted in (found["key"], found["name"])), None)
    if chosen is None:
        beginning = [found for found in schedules if wanted and found["key"].startswith(wanted)]
        chosen = beginning[0] if len(beginning) == 1 else None
    if chosen is None:
        known = [word for found in schedules for word in (found["key"], found["name"])]
        close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
        listed = ", ".join(f"{found['key']} ({found['name']})" for found in schedules[:8])
        hint = f"did you mean {close[0]!r}?" if close else f"there are {listed}"
        raise StoreError(f"{store}: no schedule {wanted!r}; {hint}")
    return chosen, [found for found in schedules if found is not chosen]


def render(store: Path, schedule: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The page as text; `store` is absolute."""
    missing: list[str] = []
    manifest = read_or_say(
        missing, lambda: read_manifest(store / "data" / schedule["fingerprint"]).in_order(schedule["classes"])
    )
    stages = [stage_view(store, schedule, place, manifest) for place in range(len(schedule["stages"]))]
    folder = store / "schedules" / schedule["key"]
    found = None
    if (folder / "yardsticks.json").exists():
        found = read_or_say(missing, lambda: read_yardsticks(folder / "yardsticks.json"))
    registered = schedule.get("registered")
    chosen = chosen_stage(stages, registered)
    rows: list[ResultRow] = []
    if found:
        evaluations = {stage.name: stage.evaluation for stage in stages if stage.evaluation}
        rows = result_rows(evaluations, found, chosen.measured if chosen else None)
    counts = split_counts(manifest) if manifest else {}
    file = folder / "recipe.toml"
    recipe = file.read_text(encoding="utf-8") if file.exists() else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )   # fmt: skip
    environment.filters.update(
        percent=percent, scale=scale_text, duration=duration, gain=gain_text, count=lambda number: f"{number:,}"
    )
    return environment.get_template("report.html.j2").render(
        schedule=schedule,
        others=others,
        stages=stages,
        steered=[stage.name for stage in stages if steered(store, stage.entry["key"])],
        finished=[stage for stage in stages if stage.result],
        chosen=chosen,
        manifest=manifest,
        counts=counts,
        splits=tuple(counts),
        totals={label: sum(by_class[label] for by_class in counts.values()) for label in manifest.classes} if manifest else {},
        recipe=recipe,
        yardsticks=found,
        rows=rows,
        suspects=read_or_say(missing, lambda: suspects_of(store, schedule, manifest)),
        bars=gain_bars(rows),
        registered=registered,
        new_classes=new_classes(schedule, chosen),
        decisions=last_decisions(Store(store), registered["name"], str(registered["version"])) if registered else [],
        model=model_name(registered),
        commands=commands(store, schedule, chosen, recipe),
        tracking=without_secrets(schedule.get("tracking") or ""),
        libraries=libraries(schedule),
        missing=missing,
        most_cells=MOST_CELLS,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def steered(store: Path, key: str) -> bool:
    """Whether val steers the learning rate of a stage."""
    about = read_json(store / "stages" / key / "stage.json")
    settings = about.get("stage", {}) if isinstance(about, dict) else {}
    return bool(settings) and (settings.get("fit", "sgd"), settings.get("rule", "plateau")) == ("sgd", "plateau")


def new_classes(schedule: Mapping[str, Any], chosen: StageView | None) -> list[str]:
    """How the registered stage does on test with the classes that came last, a sentence each."""
    if chosen is None or chosen.confusion is None or chosen.evaluation is None:
        return []
    added = schedule.get("new_classes", ())
    return [new_class_text(asdict(one)) for one in new_class_figures(chosen.evaluation["classes"], chosen.confusion, added)]


def read_or_say(missing: list[str], read: Callable[[], Any]) -> Any:
    """What `read` gives, or None, its complaint added to `missing`."""
    try:
        return read()
    except StoreError as error:
        missing.append(str(error))
        return None


def stage_view(store: Path, schedule: Mapping[str, Any], place: int, manifest: Manifest | None) -> StageView:
    """One stage as far as it has come."""
    entry = schedule["stages"][place]
    name, folder = entry["name"], store / "stages" / entry["key"]
    missing: list[str] = []
    result = read_or_say(missing, lambda: read_json(folder / "result.json")) or {}
    history = read_history(folder / "history.jsonl")
    epochs = [row for row in history if "epoch" in row]
    keys = {other["name"]: other["key"] for other in schedule["stages"]}
    status = "finished" if result else begun_text(history) if history else "not begun"
    view = StageView(
        place=place + 1,
        entry=entry,
        run_id=(schedule.get("runs") or {}).get(name),
        parent_key=entry.get("parent_key") or keys.get(entry.get("init_from")),     # older records have names alone
        status=status,
        result=result,
    )
    if history:
        logistic = any("C" in row for row in history)
        title, words = ("Penalties", penalties_in_words(history)) if logistic else ("Learning curves", curves_in_words(epochs))
        label = html.escape(f"{title} of {name}. {words}")
        drawing = charts.svg(charts.draw_learning_curves(history), name=f"curves-{place + 1}", label=label)
        view = replace(view, curves=Markup(drawing), curves_title=title, curves_in_words=words)
    elif result:
        missing.append("its history.jsonl is not in the store, so there are no learning curves")
    where = (schedule.get("evaluations") or {}).get(name)
    if where is None:
        if result:
            reason = "[evaluate] does not name it" if schedule.get("evaluations") else "the schedule has not come to that yet"
            missing.append(f"it has no evaluation on test: {reason}")
    else:
        view = read_or_say(missing, lambda: evaluated(view, store, store / where, manifest)) or view
    return replace(view, missing=tuple(missing))


def begun_text(history: Sequence[Mapping[str, Any]]) -> str:
    """The status of a stage that has begun and has no result."""
    penalties = sum("C" in row for row in history)
    if penalties:
        return f"not finished: {penalties} of the penalties so far"
    epochs = sum("epoch" in row for row in history)
    return f"not finished: {epochs} epoch{'' if epochs == 1 else 's'} so far"


def evaluated(view: StageView, store: Path, folder: Path, manifest: Manifest | None) -> StageView:
    """The stage's view with its figures on test, its confusions and its worst pictures."""
    measured = read_measured(folder)
    facts = read_json(folder / "evaluation.json")
    classes, matrix = facts["classes"], np.array(facts["confusion"], np.int64)
    others = [read_json(file) for file in sorted(folder.parent.glob("*/evaluation.json")) if file.parent != folder]
    interval = None
    if len(measured.labels) <= MOST_BOOTSTRAPPED:
        predictions = measured.posteriors.argmax(axis=1)
        interval = bootstrap_interval(share_right, predictions, measured.labels, seed=BOOTSTRAP_SEED)[1:]
    drawing = None
    if len(classes) > MOST_CELLS:
        label = html.escape(f"Confusion matrix of {view.name}; its largest entries stand in the table below.")
        drawing = Markup(charts.svg(charts.draw_confusion(matrix, classes), name=f"confusion-{view.place}", label=label))
    return replace(
        view,
        evaluation=facts,
        others=tuple(other for other in others if other.get("split", "test") == "test"),
        interval=interval,
        measured=measured,
        confusion=matrix,
        confusion_picture=drawing,
        confused_pairs=confused_pairs(matrix, classes),
        wrong=wrong_pictures(measured, contents_of(folder), classes, manifest),
    )


def contents_of(folder: Path) -> list[str]:
    """The content digests of an evaluation's pictures, in its order; empty where it has none."""
    try:
        return list(parquet.read_table(folder / "posteriors.parquet", columns=["content"])["content"].to_pylist())
    except (OSError, KeyError, ArrowException):
        return []


def confused_pairs(matrix: NDArray[np.int64], classes: Sequence[str]) -> tuple[tuple[str, str, int], ...]:
    """The ten pairs (true, predicted, pictures) most often confused."""
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:10]
    pairs = (divmod(int(place), len(classes)) for place in order if off.flat[place])
    return tuple((classes[true], classes[predicted], int(off[true, predicted])) for true, predicted in pairs)


def wrong_pictures(
    measured: Measured, contents: Sequence[str], classes: Sequence[str], manifest: Manifest | None
) -> tuple[WrongPicture, ...]:
    """The misclassified test pictures of which the net is most sure, thumbnails read from the data root."""
    predictions = measured.posteriors.argmax(axis=1)
    probabilities = measured.posteriors.max(axis=1)
    places = np.flatnonzero(predictions != measured.labels)
    found = []
    for place in places[np.argsort(-probabilities[places], kind="stable")][:MOST_WORST]:
        path, true = measured.paths[place], int(measured.labels[place])
        image, problem = "", "the data's manifest is not in the store"
        if manifest is not None:
            image, problem = thumbnail(manifest.root / path, contents[place] if contents else None)
        found.append(
            WrongPicture(
                path=path,
                true=classes[true],
                predicted=classes[predictions[place]],
                probability=float(probabilities[place]),
                true_probability=float(measured.posteriors[place, true]),
                thumbnail=image,
                problem=problem,
            )
        )
    return tuple(found)


def suspects_of(store: Path, schedule: Mapping[str, Any], manifest: Manifest | None) -> Suspects | None:
    """The suspected labels that the first logistic stage found, or the yardstick on features; None where neither looked."""
    places = [(entry["name"], store / "stages" / entry["key"]) for entry in schedule["stages"]]
    places.append(("the yardstick on features", store / "schedules" / schedule["key"]))
    for source, folder in places:
        found = read_json(folder / SUSPECTS_FILE)
        if found is None:
            continue
        rows = None if found["suspects"] is None else tuple(suspect(row, manifest) for row in found["suspects"])
        return Suspects(source, found["pictures"], found["neighbours"], rows)
    return None


def suspect(row: Mapping[str, Any], manifest: Manifest | None) -> Suspect:
    """One suspected label with its picture."""
    image, problem = "", "the data's manifest is not in the store"
    if manifest is not None:
        image, problem = thumbnail(manifest.root / row["path"], row["content"])
    return Suspect(
        path=row["path"],
        label=row["class"],
        neighbours_label=row["neighbours_class"],
        neighbours=row["neighbours"],
        nearest=row["nearest"],
        thumbnail=image,
        problem=problem,
    )


def thumbnail(path: Path, content: str | None) -> tuple[str, str]:
    """The picture as a small JPEG in a data: URI, and what is amiss: it is gone, broken, or not what was scanned."""
    try:
        encoded = path.read_bytes()
    except OSError as error:
        return "", f"cannot be shown: {error.strerror}"
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):   # 16-bit grey: Pillow's own conversion would clip, not scale
                upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            small = upright.convert("RGB")
            small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    except (OSError, ValueError, SyntaxError):
        return "", "cannot be shown: Pillow does not decode it"
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=82)
    changed = content is not None and hashlib.blake2b(encoded, digest_size=16).hexdigest() != content
    return charts.data_uri(out.getvalue(), "image/jpeg"), "the file has changed since it was scanned" if changed else ""


def penalties_in_words(history: Sequence[Mapping[str, Any]]) -> str:
    """What a logistic fit's figure shows, for those who cannot see it."""
    rows = [row for row in history if charts.finite(row, "C") and charts.finite(row, "val_loss")]
    best = min(rows, key=lambda row: (row["val_loss"], row["C"]))
    least, most = min(row["C"] for row in rows), max(row["C"] for row in rows)
    reached = f"top-1 on val {percent(best['val_top1_accuracy'])} and loss on train {best['train_loss']:.3f}"
    return (
        f"{len(rows)} penalties, C from {least:g} to {most:g}; the least loss on val, {best['val_loss']:.3f}, is at"
        f" C = {best['C']:g}, with {reached}."
    )


def curves_in_words(epochs: Sequence[Mapping[str, Any]]) -> str:
    """What the learning curves show, for those who cannot see them."""
    if not epochs:
        return "No epoch has ended yet."
    words = [f"{len(epochs)} epoch{'s' if len(epochs) > 1 else ''}"]
    losses = [row["train_loss"] for row in epochs if charts.finite(row, "train_loss")]
    if losses:
        words.append(f"loss on train from {losses[0]:.3f} to {losses[-1]:.3f}")
    accurate = [row for row in epochs if charts.finite(row, "val_top1_accuracy")]
    if accurate:
        best = max(accurate, key=lambda row: row["val_top1_accuracy"])
        last = accurate[-1]["val_top1_accuracy"]
        words.append(
            f"top-1 on val {percent(last)} at the end, {percent(best['val_top1_accuracy'])} at its highest"
            f" (epoch {best['epoch']})"
        )
    ends = {row["iteration"]: row["epoch"] for row in epochs}
    drops = [f"to {rate:g} after epoch {ends[iteration]}" for iteration, rate in charts.rate_drops(epochs)]
    rates = {row["learning_rate"] for row in epochs if charts.finite(row, "learning_rate")}
    if drops:
        words.append("the learning rate fell " + ", ".join(drops))
    elif len(rates) > 1:
        words.append(f"the learning rate moved between {min(rates):g} and {max(rates):g}")
    else:
        words.append("the learning rate never fell")
    return "; ".join(words) + "."


def chosen_stage(stages: Sequence[StageView], registered: Mapping[str, Any] | None) -> StageView | None:
    """The stage the page's headline is about: the registered one if the record names it, else the last one evaluated."""
    measured = [stage for stage in stages if stage.evaluation]
    named = (registered or {}).get("stage")
    return next((stage for stage in measured if stage.name == named), measured[-1] if measured else None)


def model_name(registered: Mapping[str, Any] | None) -> str | None:
    """What `vggrow predict` is given for the registered version."""
    if not registered:
        return None
    name, alias, version = registered["name"], registered.get("alias"), registered.get("version")
    return f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"


def commands(
    store: Path, schedule: Mapping[str, Any], chosen: StageView | None, recipe: str | None
) -> list[tuple[str, str]]:
    """(what it does, the command) for the end of the page; `recipe` is the recipe's text."""
    where = f"--store {shlex.quote(str(store))}"
    tracking = without_secrets(schedule.get("tracking") or "")
    if tracking and tracking != f"sqlite:///{store / 'mlflow.db'}":
        where += f" --tracking {shlex.quote(tracking)}"
    model = model_name(schedule.get("registered")) or (chosen.name if chosen else None)
    found = []
    if recipe is not None and root_is_relative(recipe):
        what = "Train it again, or what is not finished of it (in the recipe's own folder, from where its [data] root counts)"
        found.append((what, f"vggrow train recipe.toml {where}"))
    elif recipe is not None:
        path = store / "schedules" / schedule["key"] / "recipe.toml"
        found.append(("Train it again, or what is not finished of it", f"vggrow train {shlex.quote(str(path))} {where}"))
    if model:
        found.append(("Classify pictures", f"vggrow predict {shlex.quote(model)} PICTURE... {where}"))
    found.append(("Write this page anew", f"vggrow report {schedule['key']} --store {shlex.quote(str(store))}"))
    if tracking.startswith("sqlite:"):
        found.append(("See the runs in MLflow", f"mlflow server --backend-store-uri {shlex.quote(tracking)} --port 5000"))
    return found


def root_is_relative(recipe: str) -> bool:
    """Whether the recipe's [data] root counts from the folder that the recipe was in."""
    try:
        root = tomllib.loads(recipe).get("data", {}).get("root")
    except (tomllib.TOMLDecodeError, AttributeError):
        return False
    return isinstance(root, str) and not root.startswith(("/", "~"))


def libraries(schedule: Mapping[str, Any]) -> tuple[bool, dict[str, str]]:
    """Whether these are the versions that trained (else those where the page was written), and the versions."""
    if schedule.get("versions"):
        return True, dict(schedule["versions"])
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return False, found


def gain_bars(rows: Sequence[ResultRow]) -> list[tuple[float, float, float] | None]:
    """For each row the places of (low, difference, high) on a scale of 0 to 200 whose middle is no difference."""
    widest = max((abs(value) for row in rows if row.gain for value in row.gain), default=0.0) or 1.0
    return [
        (100 + 95 * row.gain[1] / widest, 100 + 95 * row.gain[0] / widest, 100 + 95 * row.gain[2] / widest)
        if row.gain
        else None
        for row in rows
    ]


def percent(share: float) -> str:
    """A share 0..1 as "85.3 %", with a thin no-break space."""
    return f"{100 * share:.1f}\u202f%"


def scale_text(scale: Sequence[int]) -> str:
    """A training scale: "256", or "256 to 512"."""
    low, high = scale
    return f"{low}" if low == high else f"{low} to {high}"


def duration(seconds: float) -> str:
    """A time as "42 s", "3 min 5 s" or "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
