"""What published net D is worth on the demo's pictures: linear models by scale and groups, and the published test's splits.

    python -m tests.end_to_end.transfer features FOLDER [--scales 64 96 128 160]      CPU-seconds; can be stopped and started
    python -m tests.end_to_end.transfer table FOLDER                                  what docs/benchmarks/transfer.md has

Features are computed once, in fp32, by one thread. `table` fits: (1) on the demo's own split, certain labels, the penalty by
val;
(2) on all 2,624 cells, five 75/25 splits stratified by probability and type of cell (the published figures' proportions), the
penalty by a fifth of the training cells and the fit again on all of them.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from numpy.typing import NDArray

from deploy.scans import scan_data
from pipelines.manifest import Manifest, Pictures
from training.features.compute import Workers, features_of
from training.features.source import pooled_spec, published_source
from training.store import Store, open_store
from vggcore.counter_hash import hash64
from vggcore.logistic import GRID, Layer, Rows, fit_layer
from vggcore.metrics import balanced_accuracy, macro_auc
from vggcore.recipe import Data, Features, Split

WEIGHTS = "keras/vgg16_notop"
GROUPS, CHANNELS = (3, 4, 5), {3: 256, 4: 512, 5: 512}
CHOICES = ((3,), (4,), (5,), (3, 4), (4, 5), (3, 4, 5))
SPLITS, TEST_SHARE = 5, 0.25
SCALES = (64, 96, 128, 160)


def scanned(store: Store, labels: str) -> Manifest:
    """The solar cells: "certain" is the demo's own split, of "all" the split plays no part."""
    split = Split(val=0.15, test=0.15, by="stratified")
    return scan_data(Data(source="elpv", labels=labels, split=split), store, threads=2)  # type: ignore[arg-type]


def everything(manifest: Manifest) -> dict[str, Pictures]:
    """The pictures of every split."""
    return {name: manifest.split(name) for name in ("train", "val", "test")}


def values(store: Store, scale: int, pictures: Pictures) -> tuple[NDArray[np.float32], int]:
    """Features (n, F) of pictures at a scale, all groups, and how many were computed for it."""
    source = published_source(store, WEIGHTS)
    spec = pooled_spec(source, Features(groups=GROUPS, pool="both", scales=(scale,)), precision="fp32")
    found = features_of(pictures, spec, source, store, Workers(1))
    return found.values, found.computed


def compute(store: Store, scales: Sequence[int]) -> None:
    """Computes the features of all cells and keeps the CPU-seconds of each scale."""
    for scale in scales:
        began, computed = time.process_time(), 0
        for pictures in everything(scanned(store, "all")).values():
            computed += values(store, scale, pictures)[1]
        seconds = time.process_time() - began
        if computed:
            path = store.root / f"seconds-{scale}.json"
            path.write_text(json.dumps({"pictures": computed, "cpu_seconds": round(seconds, 1)}))
            print(f"{scale} px: {computed} pictures in {seconds:.0f} CPU-seconds", flush=True)


def columns(groups: Sequence[int]) -> NDArray[np.bool_]:
    """Which of the values belong to these groups."""
    ends = np.cumsum([0, *(2 * CHANNELS[group] for group in GROUPS)])
    kept = np.zeros(ends[-1], bool)
    for group, (start, stop) in zip(GROUPS, pairwise(ends), strict=True):
        kept[start:stop] = group in groups
    return kept


def rows(features: NDArray[np.float32], labels: NDArray[np.int64]) -> Rows:
    return Rows(torch.from_numpy(np.ascontiguousarray(features)), torch.from_numpy(labels))


def figures(layer: Layer, asked: Rows) -> dict[str, float]:
    """Accuracies and AUC in 0..1, mean loss."""
    logits = asked.features.double() @ layer.weight.double().T + layer.bias.double()
    posteriors, labels = torch.softmax(logits, 1).numpy(), asked.labels.numpy()
    predicted = posteriors.argmax(1)
    right = posteriors[np.arange(len(labels)), labels]
    return {
        "top1": float((predicted == labels).mean()),
        "balanced": balanced_accuracy(predicted, labels, 2),
        "auc": macro_auc(posteriors, labels),
        "loss": float(-np.log(right).mean()),
    }


def own_split(store: Store, scales: Sequence[int]) -> list[str]:
    """The demo's split: a line a scale and choice of groups, and several scales together."""
    pictures = everything(scanned(store, "certain"))
    found = {scale: {name: values(store, scale, part)[0] for name, part in pictures.items()} for scale in scales}
    lines = [
        "| Scale | Groups | C | Val loss | Val top-1 / balanced / AUC | Test top-1 / balanced / AUC |",
        "|---|---|---|---|---|---|",
    ]
    asked = [((scale,), groups) for scale in scales for groups in CHOICES]
    asked += [(pair, (3, 4)) for pair in ((64, 128), (96, 160)) if set(pair) <= set(scales)]
    for sizes, groups in asked:
        kept = columns(groups)
        parts = {
            name: rows(np.concatenate([found[size][name][:, kept] for size in sizes], 1), part.labels)
            for name, part in pictures.items()
        }
        layer = fit_layer(parts["train"], parts["val"], classes=2)
        val, test = figures(layer, parts["val"]), figures(layer, parts["test"])
        names = " and ".join(map(str, sizes)), ", ".join(map(str, groups))
        lines.append(f"| {names[0]} | {names[1]} | {layer.chosen.c:g} | {val['loss']:.4f} | {words(val)} | {words(test)} |")
    return lines


def words(found: dict[str, float]) -> str:
    return f"{100 * found['top1']:.1f} / {100 * found['balanced']:.1f} / {found['auc']:.3f}"


def strata(manifest: Manifest, pictures: Pictures) -> NDArray[np.str_]:
    """Probability and type of each cell, from the package's own list."""
    listed = (line.split() for line in (manifest.root / "labels.csv").read_text().splitlines())
    kinds = {path: f"{probability} {kind}" for path, probability, kind in listed}
    return np.array([kinds[str(path)] for path in pictures.paths])


def stratified(kinds: NDArray[np.str_], share: float, *keys: int | str) -> NDArray[np.bool_]:
    """A share of each stratum, drawn by our own hash: (n,) bool."""
    order = hash64("transfer", *keys, np.arange(len(kinds), dtype=np.int64))
    chosen = np.zeros(len(kinds), bool)
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        chosen[members[np.argsort(order[members], kind="stable")[: round(share * len(members))]]] = True
    return chosen


def five_splits(store: Store, scales: Sequence[int]) -> list[str]:
    """All cells, five stratified 75/25 splits: mean and spread."""
    manifest = scanned(store, "all")
    parts = everything(manifest)
    labels = np.concatenate([part.labels for part in parts.values()])
    kinds = np.concatenate([strata(manifest, part) for part in parts.values()])
    lines = ["| Scale | Groups | C | Top-1 % of each split | Mean ± sd | Balanced % | AUC |", "|---|---|---|---|---|---|---|"]
    for scale in scales:
        features = np.concatenate([values(store, scale, part)[0] for part in parts.values()])[:, columns((3, 4))]
        found, penalties = [], []
        for split in range(SPLITS):
            test = stratified(kinds, TEST_SHARE, "test", split)
            inner = np.zeros(len(kinds), bool)
            inner[~test] = stratified(kinds[~test], 0.2, "inner", split)
            fitted = rows(features[~test & ~inner], labels[~test & ~inner])
            chosen = fit_layer(fitted, rows(features[inner], labels[inner]), classes=2, grid=GRID[:7]).chosen.c
            penalties.append(chosen)
            whole = rows(features[~test], labels[~test])
            again = fit_layer(whole, whole, classes=2, grid=[chosen])       # one penalty: nothing is chosen
            found.append(figures(again, rows(features[test], labels[test])))
        each = ", ".join(f"{100 * one['top1']:.1f}" for one in found)
        top1 = [100 * one["top1"] for one in found]
        lines.append(
            f"| {scale} | 3, 4 | {', '.join(f'{c:g}' for c in penalties)} | {each} | {mean(top1):.1f} ± {stdev(top1):.1f}"
            f" | {100 * mean(one['balanced'] for one in found):.1f} | {mean(one['auc'] for one in found):.3f} |"
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["features", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scales", type=int, nargs="+", default=list(SCALES))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    place = open_store(asked.folder)
    if asked.what == "features":
        compute(place, asked.scales)
    else:
        print("\n".join([*own_split(place, asked.scales), "", *five_splits(place, asked.scales)]))
