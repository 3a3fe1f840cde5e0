"""The plan of views: which picture is seen at which place of an epoch, and how, as a pure function of integers.

No random number is drawn while pictures are read. Every draw is a hash of (seed, net, scale, epoch, place), so that a
view is the same for any number of workers, from any iteration on, and can be printed, repeated and drawn by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.balance import balanced_pictures
from pipelines.draws import erased_rectangles, mix_weights, random_regions, whole
from vggcore.counter_hash import hash64, normals, uniforms
from vggcore.recipe import View

if TYPE_CHECKING:
    from pipelines.colour import Colour
    from pipelines.manifest import Pictures

Integers = NDArray[np.int64]


ASPECT = (3 / 4, 4 / 3)  # of random-resized crops where none is given (Szegedy et al. 2015)


@dataclass(frozen=True)
class ViewRule:
    """What decides a stage's training views, the pictures apart (Sec. 3.1; what has a default is not the paper's)."""

    seed: int
    net: str
    scale: tuple[int, int]  # shorter side S in pixels, drawn per view from [low, high]; (256, 256) is a fixed S
    crop: int  # pixels, both sides
    flip: bool  # mirror half of the views
    colour: float  # deviation of the three colour strengths; 0: no shift
    global_batch: int  # pictures an iteration, over all workers
    view: View = "crop"  # "whole": the picture with both sides brought to S, aspect not kept
    flip_vertical: bool = False  # turn half of the views upside down
    quarter_turns: bool = False  # turn each view by 0 to 3 quarters
    area: tuple[float, float] | None = None  # share of the picture that becomes the crop; S has no effect then
    aspect: tuple[float, float] | None = None  # its width to height; None: ASPECT
    mixup: float = 0.0  # alpha of Beta(alpha, alpha), from which a view's weight beside its partner is drawn; 0: off
    erase: float = 0.0  # probability of a rectangle that is set to the mean
    balance: float = 0.0  # 0: classes as they are; 1: equal numbers of views of each class (pipelines/balance.py)


@dataclass(frozen=True)
class Views:
    """N views, one row each: a picture, rescaled so that its shorter side is S, and the crop taken from that.

    The last columns are None where the rule has no such thing.
    """

    crop: int  # pixels, both sides, the same in all rows
    picture: Integers  # (N,) row in Pictures
    label: Integers  # (N,)
    scale: Integers  # (N,) shorter side S, pixels
    scaled_h: Integers  # (N,) the whole picture's height at S, pixels
    scaled_w: Integers  # (N,)
    offset_y: Integers  # (N,) the crop's upper edge in the rescaled picture
    offset_x: Integers  # (N,)
    mirror: NDArray[np.int32]  # (N,) 1: left and right exchanged
    shift: NDArray[np.float64]  # (N, 3) RGB, added to every pixel, in levels 0..255
    upside_down: Integers | None = None  # (N,) 1: top and bottom exchanged, after the mirror
    turns: Integers | None = None  # (N,) 0..3 quarter turns counterclockwise, after both
    erased: Integers | None = None  # (N, 4) top, left, height, width in the crop, set to the mean after all; 0 high: none
    region: Integers | None = None  # (N, 4) top, left, height, width of what is rescaled, source pixels; None: all of it

    def __len__(self) -> int:
        return len(self.picture)

    def __getitem__(self, rows: slice | Integers) -> "Views":
        """The views of these rows."""
        every: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "crop"}
        chosen: dict[str, Any] = {name: None if column is None else column[rows] for name, column in every.items()}
        return Views(crop=self.crop, **chosen)


@dataclass(frozen=True)
class Window:
    """Where N views lie in their pictures: the pixels to decode, and within these the region that becomes the crop."""

    start: NDArray[np.int32]  # (N, 2) first row and column to decode, in the upright picture
    end: NDArray[np.int32]  # (N, 2) one past the last
    roi_start: NDArray[np.float32]  # (N, 2) y, x of the crop's upper left corner, source pixels after `start`
    roi_end: NDArray[np.float32]  # (N, 2) of its lower right corner


def epoch_order(rule: ViewRule, epoch: int, labels: Integers) -> Integers:
    """The order in which epoch number `epoch` sees pictures of these classes, (n,): n rows, each once.

    With a balance rows may come several times or not at all (pipelines/balance.py); there are n all the same.
    """
    stage = (rule.seed, rule.net, *rule.scale)
    if rule.balance == 0:
        pictures = np.arange(len(labels), dtype=np.int64)
        return pictures[np.argsort(hash64("permutation", *stage, epoch, pictures), kind="stable")]
    pictures = balanced_pictures(labels, rule.balance, epoch, hash64("balance", *stage))
    again = np.arange(len(pictures)) - np.searchsorted(pictures, pictures)  # (n,) 0 at a row's first place, then 1, ...
    once_more = hash64("permutation again", *stage, epoch, pictures, again)
    order = np.where(again == 0, hash64("permutation", *stage, epoch, pictures), once_more)
    return pictures[np.argsort(order, kind="stable")]


def batches_per_epoch(n: int, global_batch: int) -> int:
    """Iterations an epoch over n pictures; the last batch may be short."""
    return -(-n // global_batch)


def share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows [start, stop) of a batch of `size` that worker `rank` reads; shares differ by one picture at most."""
    least, longer = divmod(size, world_size)
    start = rank * least + min(rank, longer)
    return start, start + least + (rank < longer)


def scaled_side(side: Integers, short: Integers, scale: Integers | int) -> Integers:
    """A side's length, in pixels, once the shorter side is `scale`: rounded to nearest, halves up, in integers."""
    scaled: Integers = (2 * side * scale + short) // (2 * short)
    return scaled


def together(parts: Sequence[Views]) -> Views:
    """Views of one rule, one part after another."""
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(Views) if field.name != "crop"):
        values = [getattr(part, name) for part in parts]
        columns[name] = None if values[0] is None else np.concatenate(values)
    return Views(crop=parts[0].crop, **columns)


def scaled_sides(
    pictures: "Pictures", indices: Integers, scale: Integers | int, view: View
) -> tuple[Integers, Integers]:
    """Heights and widths, (N,), of these pictures at `scale`: their shorter side ("crop"), or both ("whole")."""
    height, width = pictures.heights[indices], pictures.widths[indices]
    if view == "whole":
        both = np.zeros_like(height) + scale
        return both, both
    short = np.minimum(height, width)
    return scaled_side(height, short, scale), scaled_side(width, short, scale)


def views(
    rule: ViewRule,
    pictures: "Pictures",
    colour: "Colour",
    epoch: int,
    positions: Integers,
    order: Integers | None = None,
) -> Views:
    """The views at these positions, (N,) >= 0, of epoch number `epoch` (Sec. 3.1).

    order: epoch_order(rule, epoch, labels), where it is at hand; worked out if not given.
    """
    if order is None:
        order = epoch_order(rule, epoch, pictures.labels)
    key = hash64("view", rule.seed, rule.net, *rule.scale, epoch)
    return drawn(rule, pictures, colour, key, positions, order[positions])


def partners(
    rule: ViewRule,
    pictures: "Pictures",
    colour: "Colour",
    epoch: int,
    positions: Integers,
    order: Integers | None = None,
) -> Views:
    """The views that mixup adds to those at these positions, (N,): of another place's picture, by draws of their own."""
    if order is None:
        order = epoch_order(rule, epoch, pictures.labels)
    key = hash64("partner", rule.seed, rule.net, *rule.scale, epoch)
    further = 1 + whole(uniforms(key, positions, "place") * (len(order) - 1))
    return drawn(rule, pictures, colour, key, positions, order[(positions + further) % len(order)])


def weights(rule: ViewRule, epoch: int, positions: Integers) -> NDArray[np.float32]:
    """How much of each view at these positions mixup keeps, (N,) in 0..1; its partner has the rest."""
    return mix_weights(rule.mixup, hash64("mix", rule.seed, rule.net, *rule.scale, epoch), positions)


def drawn(
    rule: ViewRule, pictures: "Pictures", colour: "Colour", key: NDArray[np.uint64], positions: Integers, picture: Integers
) -> Views:
    """Views of these pictures, (N,) rows, by what the key, a hash, draws at these positions, (N,)."""
    low, high = rule.scale
    scale = low + whole(uniforms(key, positions, "scale") * (high - low + 1))
    region = None
    if rule.area is None:
        scaled_h, scaled_w = scaled_sides(pictures, picture, scale, rule.view)
    else:
        sizes = pictures.heights[picture], pictures.widths[picture]
        region = random_regions(rule.area, rule.aspect or ASPECT, key, positions, *sizes)
        scale = scaled_h = scaled_w = np.full(len(picture), rule.crop, np.int64)
    return Views(
        crop=rule.crop,
        picture=picture,
        label=pictures.labels[picture],
        scale=scale,
        scaled_h=scaled_h,
        scaled_w=scaled_w,
        offset_y=whole(uniforms(key, positions, "offset_y") * (scaled_h - rule.crop + 1)),
        offset_x=whole(uniforms(key, positions, "offset_x") * (scaled_w - rule.crop + 1)),
        mirror=(uniforms(key, positions, "mirror") < 0.5 if rule.flip else np.zeros(len(picture))).astype(np.int32),
        shift=colour_shift(colour, rule.colour * normals(key, positions[:, np.newaxis], "colour", np.arange(3))),
        upside_down=whole(uniforms(key, positions, "flip_vertical") * 2) if rule.flip_vertical else None,
        turns=whole(uniforms(key, positions, "quarter_turns") * 4) if rule.quarter_turns else None,
        erased=erased_rectangles(rule.erase, rule.crop, key, positions) if rule.erase else None,
        region=region,
    )


def colour_shift(colour: "Colour", strength: NDArray[np.float64]) -> NDArray[np.float64]:
    """The RGB shift 255 * sum_i a_i l_i p_i in levels, (N, 3), for strengths a (N, 3) (Sec. 3.1, Krizhevsky 2012).

    l and p: eigenvalues and eigenvectors of the covariance on 0..1. No matmul: BLAS changes bits with the row count.
    """
    shift = np.zeros_like(strength)
    for axis in range(3):
        shift += strength[:, axis, np.newaxis] * (255 * colour.eigenvalues[axis] * colour.axes[:, axis])
    return shift


def centre_views(
    pictures: "Pictures", indices: Integers, test_scale: int, crop: int, view: View = "crop"
) -> Views:
    """The centre crops of these pictures, (N,) rows, at `test_scale` Q, see full_views; offset (n - crop) // 2 (ours)."""
    rows = full_views(pictures, indices, test_scale, view)
    return replace(rows, crop=crop, offset_y=(rows.scaled_h - crop) // 2, offset_x=(rows.scaled_w - crop) // 2)


def full_views(pictures: "Pictures", indices: Integers, test_scale: int, view: View = "crop") -> Views:
    """These pictures, (N,) rows, uncropped (crop 0), at `test_scale` Q: their shorter side (Sec. 3.2), or both ("whole")."""
    scaled_h, scaled_w = scaled_sides(pictures, indices, test_scale, view)
    none = np.zeros(len(indices), np.int64)
    return Views(
        crop=0,
        picture=indices,
        label=pictures.labels[indices],
        scale=np.full(len(indices), test_scale, np.int64),
        scaled_h=scaled_h,
        scaled_w=scaled_w,
        offset_y=none,
        offset_x=none,
        mirror=none.astype(np.int32),
        shift=np.zeros((len(indices), 3)),
    )


def window(rows: Views, heights: Integers, widths: Integers) -> Window:
    """Where these views lie in their own pictures; heights, widths (N,): the pictures' upright sizes in pixels.

    Along a side of n scaled pixels the crop covers [o*side/n, (o + crop)*side/n) of the source. It is decoded with a
    margin of ceil(side/n) + 1 pixels, the resampling filter's reach (less shows at large pictures), within the picture.
    A random-resized crop is its region, in place of the whole picture; the filter sees what is around it.
    """
    side = np.stack([heights, widths], axis=1)  # (N, 2): y, x
    scaled = np.stack([rows.scaled_h, rows.scaled_w], axis=1)
    offset = np.stack([rows.offset_y, rows.offset_x], axis=1)
    origin, span = (np.zeros_like(side), side) if rows.region is None else (rows.region[:, :2], rows.region[:, 2:])
    first = offset * span / scaled + origin
    last = first + rows.crop * span / scaled
    margin = -(-span // scaled) + 1
    start = np.maximum(np.floor(first).astype(np.int64) - margin, 0)
    end = np.minimum(np.ceil(last).astype(np.int64) + margin, side)
    return Window(
        start=start.astype(np.int32),
        end=end.astype(np.int32),
        roi_start=(first - start).astype(np.float32),
        roi_end=(last - start).astype(np.float32),
    )
