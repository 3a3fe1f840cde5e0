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
from vggcore.recipe import Data, Protocol, load_recipe
from vggcore.schedule import Stage


def judge(
    model: str,
    *,
    source: Path | None,
    split: str,
    protocol: Protocol | None,
    scales: Sequence[int] | None,
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
    if scales is None:
        scales = described["protocol"]["scales"] if protocol is None else default_scales(stage, chosen)
    for scale in scales:
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
        **figures(posteriors, pictures.labels, len(predictor.classes)),
        "classes": list(predictor.classes),
        "seconds": round(time.monotonic() - began, 3),
    }


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
    lines = [
        f"{found['model']} (net {found['net']}) on {found['split']} of {found['root']}: {found['pictures']:,} pictures",
        f"protocol           {found['protocol']}, Q = {scales}",
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
