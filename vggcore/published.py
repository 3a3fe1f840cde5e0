"""Published weights: weights of others, imported once into one convention; a record, its digest, and its name."""

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from vggcore.errors import WeightsError
from vggcore.recipe import NetName

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
DIGEST = re.compile(r"[0-9a-f]{32}")
LONGEST_NAME = 100
PUBLISHED = "keras/vgg16_notop"      # 59 MB, the paper's own convs: what a store without weights is advised to import
FC_LAYERS = ("fc1", "fc2", "fc3")    # the paper's head, by the places that `layers` counts

Rgb = tuple[float, float, float]


class PublishedWeights(BaseModel):
    """What is known of imported weights: a weights.json of the store.

    The tensors beside it are float32 under torchvision's names of the net, for pictures that are RGB, 0..255 less `mean`,
    without a division by a deviation. `digest` covers what decides results: net, layers, tensors, mean and classes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    name: str
    digest: str                         # 32 hex characters
    net: NetName
    width: float = 1.0                  # always: published nets have the paper's width
    layers: tuple[str, ...]             # the places that have weights, in order: "conv1_1", ..., "fc1", "fc2", "fc3"
    classes: tuple[str, ...] | None     # the last layer's classes in order, where known
    outputs: int | None                 # units of the last layer; None without FC layers
    crop: int | None                    # side of the crop, pixels, at which fc1 fits; None without FC layers
    mean: Rgb                           # RGB, 0..255
    licence: str | None                 # as far as known
    origin: str | None
    source: str                         # what was imported, as typed
    source_digest: str                  # blake2b-128 of the source's file, 32 hex characters
    imported_at: str                    # UTC, ISO 8601

    @property
    def has_fc(self) -> bool:
        """Whether the FC layers are there, all three of them."""
        return "fc3" in self.layers


def weights_digest(
    *, net: NetName, layers: tuple[str, ...], tensors: "Mapping[str, Tensor]", mean: Rgb, classes: tuple[str, ...] | None
) -> str:
    """32 hex characters over all that decides results; tensors: float32, contiguous, on the CPU, by name."""
    about = {"format": 1, "net": net, "layers": layers, "mean": mean, "classes": classes}
    found = blake2b(json.dumps(about, sort_keys=True, separators=(",", ":")).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.numpy().astype("<f4", copy=False).data)
    return found.hexdigest()


def check_name(name: str) -> str:
    """The name, or WeightsError where a recipe could not hold it or it could be taken for a digest."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME or DIGEST.fullmatch(name):
        raise WeightsError(
            f"name {name[:80]!r}: expected letters, digits, '.', '_' and '-', with '/' between parts, at most {LONGEST_NAME}"
            " characters and not a digest, such as 'torchvision/vgg16'; give another by --name"
        )
    return name


def differences(one: PublishedWeights, other: PublishedWeights) -> list[str]:
    """What sets two records' weights apart, in words: "net D, not E"; their tensors where nothing else does."""
    found = []
    if one.net != other.net:
        found.append(f"net {one.net}, not {other.net}")
    if one.layers != other.layers:
        only = [layer for layer in one.layers if layer not in other.layers]
        lacking = [layer for layer in other.layers if layer not in one.layers]
        found += [f"with {', '.join(only)}"] if only else []
        found += [f"without {', '.join(lacking)}"] if lacking else []
    if one.mean != other.mean:
        found.append(f"mean {mean_text(one.mean)}, not {mean_text(other.mean)}")
    if one.outputs != other.outputs:
        found.append(f"{one.outputs or 'no'} outputs, not {other.outputs or 'none'}")
    elif one.classes != other.classes:
        found.append("other class names")
    return found or ["other values in its tensors"]


def mean_text(mean: Rgb) -> str:
    """ "123.68 116.779 103.939"."""
    return " ".join(f"{level:g}" for level in mean)
