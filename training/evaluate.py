"""The paper's test protocols (Sec. 3.2) on one split: a finished stage's posteriors for every picture, and their figures."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipelines.cache import DecodedCache
from pipelines.colour import Colour
from pipelines.loader import TestLoader
from pipelines.manifest import Manifest, Pictures
from training.features.compute import Workers, features_of
from training.features.source import stage_source, stage_spec
from training.parents import recorded_colour
from training.store import Store, read_json
from vggcore.dense import dense_posteriors
from vggcore.digest import digest
from vggcore.metrics import balanced_accuracy, confusion_matrix, macro_auc, top_k_accuracy
from vggcore.nets import FC_NAMES, Vgg, build_net
from vggcore.recipe import TestProtocol, TestViews
from vggcore.schedule import Stage
from vggcore.view_average import Turned, effective_views, turn, turned_views
from vggcore.weights import load_some, load_weights
from vggcore.whole_file import whole_file, write_json

BATCH_PIXELS = 2**22      # pixels a forward pass: 83 crops of 224, one picture of 2048x2048


@dataclass(frozen=True)
class Evaluation:
    """What a stage reached under one protocol; `folder` holds posteriors.parquet and evaluation.json."""

    folder: Path
    facts: dict[str, Any]      # evaluation.json

    @property
    def top1(self) -> float:
        """Top-1 accuracy, 0..1."""
        return float(self.facts["top1_accuracy"])


def evaluate_stage(
    store: Store,
    stage: Stage,
    key: str,
    weights: Path,
    manifest: Manifest,
    *,
    protocol: TestProtocol,
    scales: Sequence[int] | None,
    views: TestViews = "none",
    weights_digest: str | None = None,
    split: str = "test",
    device: str = "cpu",
    threads: int = 1,
    cache: DecodedCache | None = None,
) -> Evaluation:
    """Evaluates a stage's weights, or reads what was found before: the same question is never computed twice.

    scales: test scales Q; None: one, at S or the middle of the range, for "centre", and those of Sec. 4.2 for "dense". A
    linear head is evaluated as "pooled" at the scales of its own features, whatever is given. views: over which posteriors
    are averaged besides. weights_digest: of weights that are not the stage's last ones: they are a question of their own.
    cache: of the manifest's pictures, where there is one.
    """
    if stage.head == "linear":
        protocol, scales = "pooled", stage.default_test_scales
    scales = tuple(scales) if scales is not None else default_scales(stage, protocol)
    question = {"protocol": protocol, "scales": list(scales), "split": split, "fingerprint": manifest.fingerprint}
    views = effective_views(views, protocol, stage)
    question |= {"views": views} if views != "none" else {}
    question |= {"weights": weights_digest} if weights_digest is not None else {}
    folder = store.evaluation(key, digest(question, hex_characters=16))
    known = read_json(folder / "evaluation.json")
    if known is not None:
        return Evaluation(folder, known)
    began = time.monotonic()
    pictures = manifest.split(split)
    if stage.fit == "logistic":
        posteriors = stored_posteriors(store, stage, key, weights, pictures, device=device, threads=threads)
    else:
        posteriors = evaluate_weights(
            load_weights(weights),
            stage,
            pictures,
            recorded_colour(store, key),
            classes=len(manifest.classes),
            protocol=protocol,
            scales=scales,
            views=views,
            device=device,
            threads=threads,
            cache=cache,
        )
    facts = {
        "stage": stage.name,
        "stage_key": key,
        **question,
        **figures(posteriors, pictures.labels, len(manifest.classes)),
        "classes": list(manifest.classes),
        "seconds": round(time.monotonic() - began, 3),
    }
    table = pa.table(
        {
            "path": pa.array([str(path) for path in pictures.paths]),
            "content": pa.array([str(content) for content in pictures.contents]),
            "label": pa.array(pictures.labels, pa.int64()),
            "posteriors": pa.array(list(posteriors), pa.list_(pa.float32())),
        }
    )
    with whole_file(folder / "posteriors.parquet") as part:
        pq.write_table(table, part)
    write_json(folder / "evaluation.json", facts)
    return Evaluation(folder, facts)


def stored_posteriors(
    store: Store, stage: Stage, key: str, weights: Path, pictures: Pictures, *, device: str, threads: int
) -> NDArray[np.float32]:
    """(pictures, classes) posteriors of a logistic stage on the store's features; those that are not there are computed."""
    source = stage_source(stage, weights, {}, recorded_colour(store, key))
    values = features_of(pictures, stage_spec(source, stage), source, store, Workers(threads, device)).values
    layer = load_some(weights, {kind: f"{FC_NAMES['linear'][0]}.{kind}" for kind in ("weight", "bias")})
    logits = functional.linear(torch.from_numpy(values), layer["weight"], layer["bias"])
    return torch.softmax(logits, 1).numpy()


def evaluate_weights(
    weights: dict[str, Tensor],
    stage: Stage,
    pictures: Pictures,
    colour: Colour,
    *,
    classes: int,
    protocol: TestProtocol,
    scales: Sequence[int],
    views: TestViews = "none",
    device: str,
    threads: int,
    cache: DecodedCache | None = None,
) -> NDArray[np.float32]:
    """(pictures, classes) posteriors of a stage's net with these weights; colour: of what the net was trained on."""
    torch.set_num_threads(threads)
    net = build_net(stage.net, classes=classes, **stage.net_settings | {"dropout": 0.0})
    net.load_state_dict(weights)
    loader = TestLoader(
        pictures, colour, standardise=stage.standardise, device=device, threads=threads, cache=cache, view=stage.view
    )
    try:
        net.to(device).eval()
        if protocol == "pooled":
            assert stage.features is not None, "only linear heads pool"
            return pooled_posteriors(net, loader, scales, len(pictures), flip=stage.features.flip)
        turned = turned_views(views, protocol, stage)
        return split_posteriors(net, loader, stage.crop, protocol, scales, turned, len(pictures))
    finally:
        loader.close()


def default_scales(stage: Stage, protocol: TestProtocol) -> tuple[int, ...]:
    """One scale for a centre crop, the multi-scale test of Sec. 4.2 for the dense protocol."""
    return (stage.middle_scale,) if protocol == "centre" else stage.default_test_scales


@torch.inference_mode()
def split_posteriors(
    net: Vgg,
    loader: TestLoader,
    crop: int,
    protocol: TestProtocol,
    scales: Sequence[int],
    turned: Sequence[Turned],
    pictures: int,
) -> NDArray[np.float32]:
    """(pictures, classes) soft-max posteriors, averaged over the test scales and views; dense: with the flip (Sec. 3.2)."""
    total: NDArray[np.float64] | None = None
    for scale in scales:
        if protocol == "centre":
            views = loader.centre(scale, crop, max(1, BATCH_PIXELS // crop**2))
        else:
            views = loader.whole(scale, max(1, BATCH_PIXELS // (2 * scale**2)))
        for images, _, indices in views:
            each = (posteriors_of_views(net, turn(images, one), protocol) for one in turned)
            found = reduce(torch.add, each) / len(turned)
            if total is None:
                total = np.zeros((pictures, found.shape[1]))
            total[np.asarray(indices)] += found.double().cpu().numpy()
    assert total is not None, "an empty split is refused by the scan"
    return (total / len(scales)).astype(np.float32)


def posteriors_of_views(net: Vgg, images: Tensor, protocol: TestProtocol) -> Tensor:
    """(N, classes) soft-max posteriors of images as they are: crops, or whole pictures with FC layers run as convs."""
    return torch.softmax(net(images).float(), dim=1) if protocol == "centre" else dense_posteriors(net, images)


@torch.inference_mode()
def pooled_posteriors(
    net: Vgg, loader: TestLoader, scales: Sequence[int], pictures: int, *, flip: bool
) -> NDArray[np.float32]:
    """(pictures, classes) soft-max posteriors of a linear head: whole pictures, the values of all scales side by side."""
    at_scales = []
    for scale in scales:
        rows: list[Tensor] = [torch.zeros(0)] * pictures
        for images, _, indices in loader.whole(scale, max(1, BATCH_PIXELS // (2 * scale**2))):
            values = net.pooled(images)
            if flip:
                values = (values + net.pooled(images.flip(3))) / 2
            for index, row in zip(indices.tolist(), values, strict=True):
                rows[index] = row
        at_scales.append(torch.stack(rows))
    logits: Tensor = net.classifier(torch.cat(at_scales, 1))
    return torch.softmax(logits.float(), 1).cpu().numpy()


def figures(posteriors: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> dict[str, Any]:
    """The figures of a split: accuracies 0..1, AUC (None where a split has one class only), mean loss, confusion."""
    predictions = posteriors.argmax(1)
    right = np.clip(posteriors[np.arange(len(labels)), labels], 1e-12, 1.0)
    auc = macro_auc(posteriors, labels)
    return {
        "pictures": len(labels),
        "top1_accuracy": top_k_accuracy(posteriors, labels),
        **({"top5_accuracy": top_k_accuracy(posteriors, labels, k=5)} if classes > 5 else {}),
        "balanced_accuracy": balanced_accuracy(predictions, labels, classes),
        "auc": auc if np.isfinite(auc) else None,
        "loss": float(-np.log(right).mean()),
        "confusion": confusion_matrix(predictions, labels, classes).tolist(),
    }
