"""Where features come from: a file of weights and the net that they belong to; and the spec that such a question has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pipelines.colour import Colour
from training.features.forward import has_bf16
from training.features.spec import FeatureSpec, Rgb, tensors_digest, used_tensors
from training.published.library import verified_weights
from training.store import Store
from vggcore.errors import RecipeError
from vggcore.recipe import Features, NetName
from vggcore.schedule import Stage
from vggcore.weights import load_some


@dataclass(frozen=True)
class FeatureSource:
    """A net with weights in a file that every worker sees; tensors: the net's names, each with its name in the file."""

    name: str                      # as messages have it
    net: NetName
    width: float
    file: Path
    tensors: Mapping[str, str]
    mean: Rgb
    deviation: Rgb | None
    crop: int | None               # side at which FC-1 fits; None without the paper's FC layers
    last_group: int = 5            # convs beyond it are not there

    def used(self, groups: tuple[int, ...] | None) -> dict[str, Tensor]:
        """The weights that features of these groups, or of FC-2 (None), depend on, float32. Raises StoreError."""
        return load_some(self.file, {name: self.tensors.get(name, name) for name in used_tensors(self.net, groups)})


def published_source(store: Store, name: str) -> FeatureSource:
    """Published weights of the store by name or digest. Raises StoreError where they are not there, or damaged."""
    record, path = verified_weights(store, name)
    return FeatureSource(
        name=f"weights:{record.name}",
        net=record.net,
        width=1.0,
        file=path,
        tensors={},
        mean=record.mean,
        deviation=None,
        crop=record.crop if record.has_fc else None,
    )


def stage_source(stage: Stage, weights: Path, tensors: Mapping[str, str], colour: Colour) -> FeatureSource:
    """A stage's net, or that which it starts from: a file with the tensors that `tensors` names, see parents.Parent."""
    return FeatureSource(
        name=f"stage {stage.name!r}",
        net=stage.net,
        width=stage.width,
        file=weights,
        tensors=tensors,
        mean=rgb(colour.mean),
        deviation=rgb(colour.deviation) if stage.standardise else None,
        crop=stage.crop if stage.head == "paper" else None,
        last_group=max(stage.features.groups) if stage.features else 5,
    )


def stage_spec(source: FeatureSource, stage: Stage) -> FeatureSpec:
    """The features that a stage's linear head sees, in the stage's precision."""
    assert stage.features is not None and stage.features.scales is not None
    return pooled_spec(source, stage.features, precision=stage.precision)


def pooled_spec(source: FeatureSource, features: Features, *, precision: str) -> FeatureSpec:
    """Outputs of conv groups, pooled over places; features.scales are given. Raises RecipeError for what the net has not."""
    if max(features.groups) > source.last_group:
        raise RecipeError(
            f"--groups: {max(features.groups)} is above the last conv group of {source.name}, {source.last_group}; ask for"
            " lower groups"
        )
    return FeatureSpec(
        tensors=tensors_digest(source.used(features.groups)),
        net=source.net,
        width=source.width,
        groups=features.groups,
        pool=features.pool,
        scales=features.scales or (),
        flip=features.flip,
        precision=precision,  # type: ignore[arg-type]
        mean=source.mean,
        deviation=source.deviation,
    )


def fc_spec(source: FeatureSource, scales: Sequence[int], *, precision: str) -> FeatureSpec:
    """The paper's own features (Appendix B). Raises RecipeError without FC layers, or for scales below their crop."""
    if source.crop is None:
        raise RecipeError(f"--groups fc: {source.name} have no FC layers of the paper's head; name conv groups, such as 3,4")
    if min(scales) < source.crop:
        raise RecipeError(f"--scales: {min(scales)} is below the crop of {source.name}, {source.crop}; FC-1 needs it at least")
    return FeatureSpec(
        tensors=tensors_digest(source.used(None)),
        net=source.net,
        width=source.width,
        groups=None,
        pool=None,
        scales=tuple(scales),
        flip=True,
        precision=precision,  # type: ignore[arg-type]
        mean=source.mean,
        deviation=source.deviation,
        crop=source.crop,
    )


def chosen_precision(asked: str, device: str) -> str:
    """ "auto" as "bf16" where the hardware has it, else "fp32"; anything else as it is."""
    return ("bf16" if has_bf16(device) else "fp32") if asked == "auto" else asked


def rgb(levels: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Rgb:
    """Three levels as plain floats."""
    red, green, blue = (float(level) for level in levels)
    return (red, green, blue)


def spec_colour(spec: FeatureSpec) -> Colour:
    """What a graph subtracts and divides by; the axes of the colour shift play no part."""
    deviation = spec.deviation or (1.0, 1.0, 1.0)
    return Colour(np.array(spec.mean), np.array(deviation), np.zeros((3, 3)), np.zeros(3))
