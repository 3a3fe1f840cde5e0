"""Plain classifiers on the same pictures, to hold a net's accuracy against: majority, pixels, forest, HOG with an SVM."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipelines.manifest import Pictures
from vggcore.counter_hash import hash64
from vggcore.errors import DatasetError, StoreError, VggrowError
from vggcore.metrics import balanced_accuracy, macro_auc, paired_bootstrap, top_k_accuracy
from vggcore.whole_file import write_text

PIXELS_SIDE = 32       # pictures are squeezed to 32x32 for the classifiers on raw pixels
HOG_SIDE = 128         # and to 128x128 for the histograms of oriented gradients
MOST_PICTURES = 4000   # of train, and of test: an SVM's time grows with the square; a larger set is sampled by its content
MOST_SVM_CLASSES = 50
BOOTSTRAP_SEED = 0      # of the intervals: the same on the terminal and on the page

LOGISTIC_NAME = "logistic regression"

# Settings are fixed here by common sense, before any test score was seen, and are the same for every data set.
LOGISTIC = {"C": 0.01, "max_iter": 1000}                          # strong shrinkage: thousands of pixels, few pictures
FOREST = {"n_estimators": 300, "min_samples_leaf": 2}
HOG = {"orientations": 9, "pixels_per_cell": (16, 16), "cells_per_block": (2, 2)}
LINEAR_SVM = {"kernel": "linear", "C": 0.01}
RBF_SVM = {"kernel": "rbf", "C": 10.0, "gamma": "scale"}


@dataclass(frozen=True)
class Yardstick:
    """One plain classifier's result on the test split; accuracies and auc are 0..1, auc is None with one class on test."""

    name: str
    detail: str
    top1_accuracy: float
    balanced_accuracy: float
    auc: float | None
    predictions: tuple[int, ...]   # the class number it says, one a test picture, in the order of `paths`
    seconds: float


@dataclass(frozen=True)
class Yardsticks:
    """All plain classifiers on one test split, with what they learned from."""

    train_pictures: int          # how many they learned from
    train_available: int         # how many the split has
    test_available: int
    paths: tuple[str, ...]       # the test pictures that were scored, relative to the data root
    labels: tuple[int, ...]
    rows: tuple[Yardstick, ...]


@dataclass(frozen=True)
class Measured:
    """A net's posteriors on the test split as an evaluation left them in the store."""

    name: str
    paths: tuple[str, ...]
    labels: NDArray[np.int64]         # (n,)
    posteriors: NDArray[np.float64]   # (n, classes), rows sum to 1


@dataclass(frozen=True)
class ResultRow:
    """A line of the result table; `gain` is (difference, low, high) of a net's top-1 accuracy over this yardstick's."""

    name: str
    top1_accuracy: float
    balanced_accuracy: float
    auc: float | None
    pictures: int
    is_yardstick: bool
    gain: tuple[float, float, float] | None = None


def yardsticks(
    train: Pictures,
    test: Pictures,
    seed: int,
    *,
    threads: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Yardsticks:
    """Trains every plain classifier on `train` and scores it on `test`; about 25 s for 1,900 pictures on one core.

    Nothing is chosen by looking at test. Beyond MOST_PICTURES a split is sampled (by a hash of content and seed).
    Raises VggrowError without scikit-learn and scikit-image, DatasetError for a picture that Pillow cannot decode.
    """
    require_scikit()
    chosen_train = sample(train, seed, at_least_one_each=True)
    chosen_test = sample(test, seed, at_least_one_each=False)
    say = progress or (lambda name: None)
    say("decoding")
    small_train, hog_train = features(train, chosen_train, threads=threads)
    small_test, hog_test = features(test, chosen_test, threads=threads)
    if is_grey(small_train) and is_grey(small_test):
        small_train, small_test = small_train[..., :1], small_test[..., :1]
    pixels = (flat(small_train), flat(small_test))
    kind = "grey" if small_train.shape[-1] == 1 else "colour"
    labels, true = train.labels[chosen_train], test.labels[chosen_test]
    classes = int(max(train.labels.max(), test.labels.max())) + 1

    rows = []
    for name, detail, model, (inputs, asked) in contestants(seed, threads, classes, pixels, (hog_train, hog_test), kind):
        say(name)
        started = time.monotonic()
        scores = class_scores(model.fit(inputs, labels), asked, classes)
        rows.append(scored(name, detail, scores, true, classes, seconds=time.monotonic() - started))
    return Yardsticks(
        train_pictures=len(chosen_train),
        train_available=len(train.labels),
        test_available=len(test.labels),
        paths=tuple(str(test.paths[place]) for place in chosen_test),
        labels=tuple(int(label) for label in true),
        rows=tuple(rows),
    )


def require_scikit() -> None:
    """VggrowError that says what to install when scikit-learn or scikit-image is absent."""
    try:
        import skimage.feature  # noqa: F401
        import sklearn.svm  # noqa: F401
    except ImportError as error:
        raise VggrowError(
            f"yardsticks need scikit-learn and scikit-image ({error}); install them with: pip install 'vggrow[demo]'"
        ) from error


def contestants(
    seed: int,
    threads: int,
    classes: int,
    pixels: tuple[NDArray[np.float32], NDArray[np.float32]],
    hog: tuple[NDArray[np.float32], NDArray[np.float32]],
    kind: str,
) -> list[tuple[str, str, Any, tuple[NDArray[np.float32], NDArray[np.float32]]]]:
    """(name, detail, unfitted model, its inputs for train and test) for each yardstick, the simplest first."""
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    state = seed % 2**32
    side = f"{PIXELS_SIDE}x{PIXELS_SIDE} {kind} pixels"
    logistic = make_pipeline(StandardScaler(), LogisticRegression(**LOGISTIC, random_state=state))
    forest = RandomForestClassifier(**FOREST, n_jobs=threads, random_state=state)
    found = [
        ("majority class", "the most frequent class of train", DummyClassifier(strategy="prior"), pixels),
        (LOGISTIC_NAME, side, logistic, pixels),
        ("random forest", f"{FOREST['n_estimators']} trees on {side}", forest, pixels),
    ]
    if classes <= MOST_SVM_CLASSES:
        shape = f"{hog[0].shape[1]} HOG values of the {HOG_SIDE}x{HOG_SIDE} grey picture"
        for name, settings in (("HOG + linear SVM", LINEAR_SVM), ("HOG + RBF SVM", RBF_SVM)):
            found.append((name, shape, make_pipeline(StandardScaler(), SVC(**settings, random_state=state)), hog))
    return found


def sample(pictures: Pictures, seed: int, *, at_least_one_each: bool) -> NDArray[np.int64]:
    """The positions of all pictures, or of MOST_PICTURES of them: those whose content hashes lowest."""
    count = len(pictures.labels)
    if count <= MOST_PICTURES:
        return np.arange(count)
    content = np.array([int(str(text)[:16], 16) for text in pictures.contents], np.uint64)
    order = np.argsort(hash64("yardsticks", seed, content), kind="stable")
    chosen = order[:MOST_PICTURES]
    if at_least_one_each:
        labels = pictures.labels[order]
        firsts = order[np.unique(labels, return_index=True)[1]]
        chosen = np.union1d(chosen, firsts)
    return np.sort(chosen)


def features(
    pictures: Pictures, chosen: NDArray[np.int64], *, threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The pictures at 32x32 (n, 32, 32, 3) and their HOG values (n, k); each file is decoded once, by Pillow."""
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda place: picture_features(pictures.root / str(pictures.paths[place])), chosen))
    small, gradients = zip(*found, strict=True)
    return np.stack(small), np.stack(gradients)


def picture_features(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """One picture at 32x32 (32, 32, 3), upright, and the HOG values of its grey 128x128 form."""
    from skimage.feature import hog

    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):   # 16-bit grey: Pillow's own conversion would clip, not scale
                levels = (np.asarray(upright).astype(np.int64) * 255 + 32767) // 65535
                upright = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            grey = upright.convert("L").resize((HOG_SIDE, HOG_SIDE), Image.Resampling.BOX)
            small = upright.convert("RGB").resize((PIXELS_SIDE, PIXELS_SIDE), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError) as error:
        raise DatasetError(f"{path}: Pillow cannot decode it ({error}); replace or remove it, then scan again") from error
    return np.asarray(small), hog(np.asarray(grey, np.float32), feature_vector=True, **HOG).astype(np.float32)


def is_grey(pixels: NDArray[np.uint8]) -> bool:
    """Whether all three channels of all pictures (n, h, w, 3) are the same."""
    return bool((pixels == pixels[..., :1]).all())


def flat(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures (n, h, w, c) as rows (n, h*w*c) of 0..1."""
    return pixels.reshape(len(pixels), -1).astype(np.float32) / np.float32(255)


def class_scores(model: Any, inputs: NDArray[np.float32], classes: int) -> NDArray[np.float64]:
    """(n, classes) scores, the highest where the model decides; a class that train lacks has the lowest of all.

    The majority rule's two equal rows, the SVM's signed distance and the forest's shares all come out in this shape.
    """
    found = model.predict_proba(inputs) if hasattr(model, "predict_proba") else model.decision_function(inputs)
    if found.ndim == 1:   # two classes: signed distance from the border, positive is the second class
        found = np.stack([-found, found], axis=1)
    scores = np.full((len(inputs), classes), found.min() - 1.0)
    scores[:, model.classes_] = found
    return scores


def scored(
    name: str, detail: str, scores: NDArray[np.float64], labels: NDArray[np.int64], classes: int, *, seconds: float
) -> Yardstick:
    """The three figures of one yardstick from its scores (n, classes)."""
    predictions = scores.argmax(axis=1)
    auc = macro_auc(scores, labels)
    return Yardstick(
        name=name,
        detail=detail,
        top1_accuracy=top_k_accuracy(scores, labels),
        balanced_accuracy=balanced_accuracy(predictions, labels, classes),
        auc=auc if np.isfinite(auc) else None,
        predictions=tuple(int(prediction) for prediction in predictions),
        seconds=round(seconds, 2),
    )


def write_yardsticks(path: Path, found: Yardsticks) -> None:
    """Writes yardsticks.json, whole or not at all: the figures and every prediction."""
    write_text(path, json.dumps(asdict(found), allow_nan=False, ensure_ascii=False) + "\n")


def read_yardsticks(path: Path) -> Yardsticks:
    """Reads what write_yardsticks wrote; StoreError when it is not that."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Yardstick(**{**row, "predictions": tuple(row["predictions"])}) for row in saved.pop("rows"))
        return Yardsticks(**{**saved, "paths": tuple(saved["paths"]), "labels": tuple(saved["labels"])}, rows=rows)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path}: cannot be read as yardsticks ({error}); remove it, and train again to renew it") from error


def read_measured(folder: Path) -> Measured:
    """Reads an evaluation folder of the store (posteriors.parquet, evaluation.json); StoreError when it is not one."""
    from pyarrow import ArrowException, parquet

    try:
        name = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["stage"]
        columns = parquet.read_table(folder / "posteriors.parquet").to_pydict()
        return Measured(
            name=name,
            paths=tuple(columns["path"]),
            labels=np.array(columns["label"], np.int64),
            posteriors=np.array(columns["posteriors"], np.float64),
        )
    except (OSError, ValueError, KeyError, ArrowException) as error:
        raise StoreError(f"{folder}: cannot be read as an evaluation ({error}); remove it, and evaluate again") from error


def gain_over(net: Measured, found: Yardsticks, row: Yardstick) -> tuple[float, float, float] | None:
    """(difference, low, high) of top-1 accuracy, net minus yardstick, on the test pictures that both scored.

    The interval is the paired bootstrap's at 95 %; None when they have no picture in common.
    """
    places = {path: place for place, path in enumerate(net.paths)}
    common = [(places[path], at) for at, path in enumerate(found.paths) if path in places]
    if not common:
        return None
    net_places, row_places = (np.array(side) for side in zip(*common, strict=True))
    labels = net.labels[net_places]
    ours = net.posteriors[net_places].argmax(axis=1)
    theirs = np.array(row.predictions)[row_places]
    return paired_bootstrap(share_right, ours, theirs, labels, seed=BOOTSTRAP_SEED)


def share_right(predictions: NDArray[np.generic], labels: NDArray[np.int64]) -> float:
    """The share of predictions that are the labels."""
    return float((predictions == labels).mean())


def result_rows(
    evaluations: Mapping[str, Mapping[str, Any]], found: Yardsticks | None, net: Measured | None
) -> list[ResultRow]:
    """The rows of the result table: stages (name -> what evaluation.json holds) in order, then the yardsticks.

    net: the stage that the yardsticks' last column is about, that which was registered; None leaves the column out.
    """
    rows = [
        ResultRow(
            name=name,
            top1_accuracy=evaluation["top1_accuracy"],
            balanced_accuracy=evaluation["balanced_accuracy"],
            auc=evaluation.get("auc"),
            pictures=evaluation["pictures"],
            is_yardstick=False,
        )
        for name, evaluation in evaluations.items()
    ]
    for row in found.rows if found else ():
        assert found is not None
        rows.append(
            ResultRow(
                name=row.name,
                top1_accuracy=row.top1_accuracy,
                balanced_accuracy=row.balanced_accuracy,
                auc=row.auc,
                pictures=len(row.predictions),
                is_yardstick=True,
                gain=gain_over(net, found, row) if net else None,
            )
        )
    return rows


def result_table(rows: Sequence[ResultRow], *, net: str | None = None) -> str:
    """The rows as an aligned plain table for a terminal; `net` names the stage the last column compares with."""
    compares = net is not None and any(row.gain for row in rows)
    heads = ["", "top-1 %", "balanced %", "AUC", *([f"{net} minus it, 95 % interval"] if compares else [])]
    lines = [[*cells(row), *([gain_text(row.gain) if row.gain else ""] if compares else [])] for row in rows]
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    rule = "  ".join("-" * width for width in widths)
    text = [aligned(heads, widths), rule]
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        if row.is_yardstick and number and not rows[number - 1].is_yardstick:
            text.append(rule)
        text.append(aligned(line, widths))
    return "\n".join(text)


def cells(row: ResultRow) -> list[str]:
    """The name and the three figures of a row as text."""
    auc = "-" if row.auc is None else f"{row.auc:.3f}"
    return [row.name, f"{100 * row.top1_accuracy:.1f}", f"{100 * row.balanced_accuracy:.1f}", auc]


def gain_text(gain: tuple[float, float, float]) -> str:
    """A gain in percentage points with its interval: "+2.1 (-1.5 to +5.7)"."""
    difference, low, high = (100 * value for value in gain)
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """One line of the table: names to the left, numbers to the right."""
    numbers = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
    return "  ".join([line[0].ljust(widths[0]), *numbers]).rstrip()
