"""The plain classifier on published weights: logistic regression on pooled conv outputs, where the store has some."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from deploy.yardsticks import Yardstick, Yardsticks, sample, scored
from pipelines.manifest import Manifest, Pictures
from training.features.compute import Workers, features_of
from training.features.source import chosen_precision, pooled_spec, published_source
from training.features.suspects import write_suspects
from training.published.library import list_weights
from training.store import Store
from vggcore.logistic import Layer, Rows, fit_layer
from vggcore.published import PublishedWeights
from vggcore.recipe import Features
from vggcore.schedule import Stage

# Chosen before any test score was seen, and the same for every data set; a stage may do better with scales of its own.
SCALE = 96
FEATURES = Features(groups=(3, 4), pool="both", scales=(SCALE,))
ROW = "features + logistic regression"                                  # ends the name in the table
NETS = ("D", "E", "B", "A", "C", "A-LRN")                               # whose weights are taken where there are several
NAMES = {"A": "VGG-11", "B": "VGG-13", "D": "VGG-16", "E": "VGG-19"}    # as they are known


def with_features(
    found: Yardsticks,
    store: Store,
    manifest: Manifest,
    stages: Sequence[Stage],
    schedule_key: str,
    seed: int,
    *,
    threads: int,
    say: Callable[[str], None],
) -> Yardsticks:
    """The plain classifiers with one more, on features of published weights, where the store has some.

    Not where the schedule has such a stage itself, or `found` that classifier. It learns from the pictures that the others
    learn from, and its penalty is chosen on val. Suspected labels go to the schedule's folder. Raises VggrowError for
    pictures that have changed.
    """
    record = weights_to_use(list_weights(store))
    known = any(row.name.endswith(ROW) for row in found.rows)
    if record is None or known or any(stage.fit == "logistic" and stage.weights_digest for stage in stages):
        return found
    say(f"yardsticks: features of weights:{record.name}")
    began = time.monotonic()
    splits = {name: sampled(manifest.split(name), seed, every_class=name == "train") for name in ("train", "val", "test")}
    values = {name: published_features(store, record, pictures, threads) for name, pictures in splits.items()}
    layer = fitted(splits, values, len(manifest.classes))
    row = scored_layer(record, layer, values["test"], splits["test"], len(manifest.classes), seconds=time.monotonic() - began)
    write_suspects(
        store.schedule(schedule_key), [(splits[name], values[name]) for name in ("train", "val")], manifest.classes
    )
    return replace(found, rows=(*found.rows, row))


def weights_to_use(records: Sequence[PublishedWeights]) -> PublishedWeights | None:
    """Those of the net that comes first in NETS, of several the first by name."""
    return min(records, key=lambda record: (NETS.index(record.net), record.name), default=None)


def sampled(pictures: Pictures, seed: int, *, every_class: bool) -> Pictures:
    """All pictures of a split, or as many as the other classifiers take."""
    rows = sample(pictures, seed, at_least_one_each=every_class)
    names = ("paths", "labels", "heights", "widths", "contents")
    return replace(pictures, **{name: getattr(pictures, name)[rows] for name in names})


def published_features(
    store: Store, record: PublishedWeights, pictures: Pictures, threads: int
) -> NDArray[np.float32]:
    """(n, F) features, from the store where it has them."""
    source = published_source(store, record.digest)
    spec = pooled_spec(source, FEATURES, precision=chosen_precision("auto", "cpu"))
    return features_of(pictures, spec, source, store, Workers(threads)).values


def fitted(splits: dict[str, Pictures], values: dict[str, NDArray[np.float32]], classes: int) -> Layer:
    """The layer fitted on train, its penalty chosen on val, as a logistic stage's is."""
    rows = {}
    for name in ("train", "val"):
        order = np.lexsort((splits[name].paths.astype(str), splits[name].contents.astype(str)))
        rows[name] = Rows(torch.from_numpy(values[name][order]), torch.from_numpy(splits[name].labels[order]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fit_layer(rows["train"], rows["val"], classes=classes)
    finally:
        torch.set_num_threads(threads)


def scored_layer(
    record: PublishedWeights, layer: Layer, values: NDArray[np.float32], test: Pictures, classes: int, *, seconds: float
) -> Yardstick:
    """The row of the table."""
    logits = functional.linear(torch.from_numpy(values), layer.weight, layer.bias)
    groups = " and ".join(map(str, FEATURES.groups))
    return scored(
        f"{NAMES.get(record.net, f'net {record.net}')} {ROW}",
        f"{values.shape[1]:,} values of weights:{record.name} at Q = {SCALE}, groups {groups}; C = {layer.chosen.c:g} by val",
        torch.softmax(logits.double(), 1).numpy(),
        test.labels,
        classes,
        seconds=seconds,
    )
