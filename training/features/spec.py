"""What decides the values of features: a record whose digest names their folder in the store. Pure."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from vggcore.digest import digest
from vggcore.nets import FC_NAMES, conv_names, linear_inputs, scaled
from vggcore.nets import FC_UNITS as UNITS
from vggcore.recipe import Features, Frozen, NetName, Pool, Precision

if TYPE_CHECKING:
    from torch import Tensor

Rgb = tuple[float, float, float]


class FeatureSpec(Frozen):
    """Features of whole pictures: of which weights, which layers, at which scales, pooled how, in which precision.

    groups: conv groups whose outputs are pooled over places, as in vggcore.recipe.Features; None: the paper's own features
    (Appendix B), the units of FC-2 at every place, averaged over places, scales and the mirror image, of length 1.
    """

    format: Literal[1] = 1
    tensors: str                       # digest of the weights that the values depend on, 32 hex characters
    net: NetName
    width: float
    groups: tuple[int, ...] | None
    pool: Pool | None                  # None with groups = None
    scales: tuple[int, ...]            # shorter sides Q, pixels, ascending
    flip: bool
    precision: Precision
    mean: Rgb                          # RGB, 0..255
    deviation: Rgb | None              # None: no division
    crop: int | None = None            # of FC features: the side at which FC-1 fits

    @property
    def key(self) -> str:
        """32 hex characters that name the features' folder."""
        return digest(self.model_dump(mode="json"), hex_characters=32)

    @property
    def pooled(self) -> Features | None:
        """As a linear head has it; None for FC features."""
        if self.groups is None or self.pool is None:
            return None
        return Features(groups=self.groups, pool=self.pool, scales=self.scales, flip=self.flip)

    @property
    def values(self) -> int:
        """Values a picture."""
        return linear_inputs(self.pooled, self.width) if self.pooled is not None else scaled(UNITS, self.width)


def used_tensors(net: NetName, groups: tuple[int, ...] | None) -> list[str]:
    """The names of the weights that features depend on: the convs up to the last group, or all and FC-1 and FC-2."""
    modules = list(conv_names(net, max(groups)).values()) if groups else [*conv_names(net).values(), *FC_NAMES["paper"][:2]]
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def tensors_digest(tensors: Mapping[str, "Tensor"]) -> str:
    """32 hex characters over names, shapes and float32 values: the same weights have it wherever they come from."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        values = tensors[name].detach().float().cpu().contiguous()
        found.update(f"\n{name} {tuple(values.shape)}\n".encode())
        found.update(values.numpy().astype("<f4", copy=False).data)
    return found.hexdigest()
