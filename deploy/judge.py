"""`vggrow evaluate`: any MODEL measured on a split by one of the paper's test protocols, read by DALI as in training."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.predict import Predictor, check_classes, open_model
from deploy.scans import scan_data
from pipelines.colour import Colour
from pipelines.manifest import Manifest, read_manifest
from training.evaluate import default_scales, evaluate_weights, figures
from training.store import Store
from training.where import cores
from vggcore.errors import DatasetError, DeviceError, RecipeError
from vggcore.recipe import Data, Protocol, TestViews, load_recipe
from vggcore.schedule import Stage
from vggcore.view_average import effective_views


def judge(
    model: str,
    *,
    source: Path | None,
    split: str,
    protocol: Protocol | None,
    scales: Sequence[int] | None,
    views: TestViews | None = None,
    device: str,
    store: Store,
    tracking: str,
) -> dict[str, Any]:
    """The figures of `model` on a split, as evaluation.json has them, with where they come from.

    source: a folder or a recipe; None: the pictures the model was trained on, as this store knows them. Raises
    VggrowError: no such model, no such pictures, other classes, a test scale below the crop, no GPU.
    """
    predictor = open_model(model, store=store.root, tracking=tracking)
    described = predictor.description
    stage = Stage.model_validate_json(json.dumps(described["stage"]))
    chosen = protocol or described["protocol"]["name"]
    if stage.head == "linear":
        check_own_protocol(model, stage, protocol, scales, views)
    if scales is None:
        scales = described["protocol"]["scales"] if protocol is None else default_scales(stage, chosen)
    chosen_views = views_for(stage, chosen, views, described["protocol"].get("views", "none"))
    for scale in scales if stage.head != "linear" else ():
        if scale < stage.crop:
            raise RecipeError(f"--scales: {scale} is below the model's crop, {stage.crop}; a net needs its crop at least")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise DeviceError("--device cuda: torch finds no GPU on this machine; use --device cpu")
    manifest = pictures_for(predictor, source, store).in_order(predictor.classes)
    check_classes(predictor.classes, manifest.classes)
    began = time.monotonic()
    pictures = manifest.split(split)
    posteriors = evaluate_weights(
        predictor.weights,
        stage,
        pictures,
        colour_of(described),
        classes=len(predictor.classes),
        protocol=chosen,
        scales=scales,
        views=chosen_views,
        device=device,
        threads=cores(),
    )
    return {
        "model": model,
        "net": stage.net,
        "root": str(manifest.root),
        "fingerprint": manifest.fingerprint,
        "split": split,
        "protocol": chosen,
        "scales": list(scales),
        **({"views": chosen_views} if chosen_views != "none" else {}),
        **figures(posteriors, pictures.labels, len(predictor.classes)),
        "classes": list(predictor.classes),
        "seconds": round(time.monotonic() - began, 3),
    }


def check_own_protocol(
    model: str, stage: Stage, protocol: Protocol | None, scales: Sequence[int] | None, views: TestViews | None
) -> None:
    """RecipeError for options that a linear head has no use for: it is fitted to whole pictures at its own scales."""
    options = {"--protocol": protocol, "--scales": scales, "--views": views}
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        own = ", ".join(map(str, stage.default_test_scales))
        raise RecipeError(
            f"{given} has no effect on {model}: a linear head sees whole pictures at Q = {own}, which it was fitted to; leave"
            f" {given} out"
        )


def views_for(stage: Stage, protocol: Protocol, asked: TestViews | None, own: TestViews) -> TestViews:
    """The views to average over, those asked for or else the model's own. Raises RecipeError for views that mislead it."""
    if asked == "turns" and not stage.quarter_turns:
        raise RecipeError(
            "--views turns: the model was not trained on turned pictures, and turning them would mislead it; leave --views"
            " out, or give flips"
        )
    return effective_views(asked or own, protocol, stage)


def pictures_for(predictor: Predictor, source: Path | None, store: Store) -> Manifest:
    """The pictures to measure on: scanned anew when named, else those of the model's own fingerprint."""
    if source is not None:
        data = Data(root=source.absolute()) if source.is_dir() else load_recipe(source).data
        return scan_data(data, store, threads=cores())
    fingerprint = predictor.description["lineage"].get("fingerprint", "")
    folder = store.data(fingerprint)
    if not (folder / "manifest.parquet").exists():
        raise DatasetError(
            f"{predictor.model}: the pictures it was trained on (fingerprint {fingerprint or 'unknown'}) are not in store"
            f" {store.root}; name pictures by --data, or the store by --store"
        )
    return read_manifest(folder)


def colour_of(described: dict[str, Any]) -> Colour:
    """Mean and deviation that the model was trained with; the colour axes play no part in a test."""
    deviation = described["deviation"] or [1.0, 1.0, 1.0]
    return Colour.from_json(
        {"mean": described["mean"], "deviation": deviation, "eigenvalues": [0.0] * 3, "axes": [[0.0] * 3] * 3}
    )


def evaluation_text(found: dict[str, Any]) -> str:
    """The figures for people."""
    classes, confusion = found["classes"], found["confusion"]
    scales = ", ".join(map(str, found["scales"]))
    views = f", {found['views']}" if "views" in found else ""
    lines = [
        f"{found['model']} (net {found['net']}) on {found['split']} of {found['root']}: {found['pictures']:,} pictures",
        f"protocol           {found['protocol']}, Q = {scales}{views}",
        f"top-1 accuracy     {100 * found['top1_accuracy']:.2f} %",
    ]
    if "top5_accuracy" in found:
        lines.append(f"top-5 accuracy     {100 * found['top5_accuracy']:.2f} %")
    lines += [
        f"balanced accuracy  {100 * found['balanced_accuracy']:.2f} %",
        f"AUC                {found['auc']:.4f}" if found["auc"] is not None else "AUC                none: one class only",
        f"loss               {found['loss']:.4f}",
    ]
    if len(classes) <= 20:
        width = max(len(name) for name in ["true class", *classes])
        cell = max(6, *(len(name) for name in classes)) + 2
        lines += ["", f"{'true class':<{width}}" + "".join(f"{name:>{cell}}" for name in classes) + "   (predicted)"]
        for name, row in zip(classes, confusion, strict=True):
            lines.append(f"{name:<{width}}" + "".join(f"{number:>{cell},}" for number in row))
    return "\n".join(lines)
