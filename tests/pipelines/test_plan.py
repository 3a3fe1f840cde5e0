"""The plan of views: frozen numbers, and what must hold for any seed."""

from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipelines.colour import Colour
from pipelines.manifest import Pictures
from pipelines.plan import (
    ViewRule,
    Views,
    batches_per_epoch,
    centre_views,
    epoch_order,
    full_views,
    scaled_side,
    share,
    views,
    window,
)
from vggcore.counter_hash import hash64, normals, uniforms

RULE = ViewRule(seed=7, net="A", scale=(256, 512), crop=224, flip=True, colour=0.1, global_batch=256)
COLOUR = Colour(
    mean=np.array([120.0, 110.0, 100.0]),
    deviation=np.array([60.0, 55.0, 50.0]),
    axes=np.array([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]]),
    eigenvalues=np.array([0.2, 0.02, 0.004]),
)
EVERYTHING = {"view": "whole", "scale": (224, 224), "flip_vertical": True, "quarter_turns": True, "balance": 0.5}
RANDOM_AREA = {"scale": (256, 256), "area": (0.08, 1.0), "erase": 0.5}

# Frozen on 2026-11-24: if one of these changes, every run of every user changes.
FROZEN_HASH = [2602221277231203895, 2119880671029686662, 7325768603044359780]
FROZEN_UNIFORMS = [0.2094333823026313, 0.958787747547837, 0.17385676186250343]
FROZEN_NORMALS = [0.9802917137916487, -2.002018340919463, 0.2126361678316936]
FROZEN_ORDER = [3, 10, 4, 8, 7, 2, 9, 1, 0, 6, 11, 5]
FROZEN_NEXT_ORDER = [2, 10, 7, 9, 3, 1, 11, 4, 8, 5, 6, 0]
FROZEN_VIEWS = {
    "picture": [1269, 1901, 1710, 1344],
    "label": [0, 2, 0, 0],
    "scale": [275, 336, 354, 335],
    "scaled_h": [311, 371, 354, 618],
    "scaled_w": [275, 336, 565, 335],
    "offset_y": [11, 97, 93, 357],
    "offset_x": [39, 32, 92, 63],
    "mirror": [0, 1, 1, 1],
    "shift": [
        [7.115310170206545, 8.552759612548824, 0.04620630908059089],
        [2.1380246702496537, 4.526867297614366, -0.18834115570556134],
        [5.2183048191109, 5.591812559526617, -0.1657723835947056],
        [-2.5733471872880282, -2.5731477106626883, -0.02336010720355664],
    ],
}


def pictures_of(sizes: list[tuple[int, int]]) -> Pictures:
    heights, widths = np.array(sizes, np.int64).T
    return Pictures(
        root=Path("/pictures"),
        paths=np.array([f"{number}.jpg" for number in range(len(sizes))], object),
        labels=np.arange(len(sizes)) % 3,
        heights=heights,
        widths=widths,
        contents=np.array([""] * len(sizes), object),
    )


ONE_CLASS = np.zeros(1000, np.int64)
MANY = pictures_of([(300 + 7 * number % 900, 300 + 11 * number % 700) for number in range(2000)])


def test_draws_are_the_frozen_ones():
    numbers = hash64("view", 7, np.arange(3))
    draws = uniforms(7, np.arange(3))
    normal = normals(7, np.arange(3))

    assert numbers.tolist() == FROZEN_HASH
    assert draws.tolist() == FROZEN_UNIFORMS
    assert normal.tolist() == FROZEN_NORMALS


def test_the_permutation_is_the_frozen_one():
    assert epoch_order(RULE, 0, ONE_CLASS[:12]).tolist() == FROZEN_ORDER
    assert epoch_order(RULE, 1, ONE_CLASS[:12]).tolist() == FROZEN_NEXT_ORDER


def test_views_are_the_frozen_ones():
    rows = views(RULE, MANY, COLOUR, 3, np.arange(4))

    found = {field.name: getattr(rows, field.name) for field in fields(Views) if field.name != "crop"}
    assert {name: found[name].tolist() for name in FROZEN_VIEWS} == FROZEN_VIEWS
    assert all(found[name] is None for name in found.keys() - FROZEN_VIEWS.keys()), "what came later is off by default"


def test_each_epoch_sees_every_picture_once_in_an_order_of_its_own():
    first, second = epoch_order(RULE, 0, ONE_CLASS[:1000]), epoch_order(RULE, 1, ONE_CLASS[:1000])

    assert sorted(first) == sorted(second) == list(range(1000))
    assert np.mean(first == second) < 0.01


@pytest.mark.parametrize("change", [{"seed": 8}, {"net": "D"}, {"scale": (256, 256)}])
def test_the_order_follows_the_stage(change):
    other = replace(RULE, **change)

    assert np.mean(epoch_order(RULE, 0, ONE_CLASS[:1000]) == epoch_order(other, 0, ONE_CLASS[:1000])) < 0.01


@pytest.mark.parametrize("size", [0, 1, 2, 6, 7, 8, 256])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_workers_share_a_batch_without_gap_or_overlap(size, world_size):
    shares = [share(size, rank, world_size) for rank in range(world_size)]

    assert [row for start, stop in shares for row in range(start, stop)] == list(range(size))
    lengths = [stop - start for start, stop in shares]
    assert max(lengths) - min(lengths) <= 1


def test_the_last_short_batch_counts():
    assert [batches_per_epoch(n, 256) for n in (1, 255, 256, 257, 512)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("rule", [RULE, replace(RULE, **EVERYTHING), replace(RULE, **RANDOM_AREA)])
def test_a_view_does_not_depend_on_which_others_are_asked_for(rule):
    together = views(rule, MANY, COLOUR, 5, np.arange(100, 164))

    for position in (100, 131, 163):
        alone = views(rule, MANY, COLOUR, 5, np.array([position]))
        among = together[np.array([position - 100])]
        for field in fields(Views):
            assert np.array_equal(getattr(alone, field.name), getattr(among, field.name)), field.name


def test_a_picture_is_seen_another_way_in_the_next_epoch():
    first, second = (views(RULE, MANY, COLOUR, epoch, np.arange(2000)) for epoch in (0, 1))

    by_picture = [rows[np.argsort(rows.picture)] for rows in (first, second)]
    assert np.mean(by_picture[0].offset_x == by_picture[1].offset_x) < 0.05


def test_scales_fill_the_range_and_crops_the_picture():
    rule = replace(RULE, scale=(256, 260))
    square = pictures_of([(400, 400)] * 2000)

    rows = views(rule, square, COLOUR, 0, np.arange(2000))

    assert sorted(set(rows.scale.tolist())) == [256, 257, 258, 259, 260]
    assert np.bincount(rows.scale - 256).min() > 320  # 400 each in the mean
    for offset in (rows.offset_y, rows.offset_x):
        assert offset.min() == 0
        assert set((rows.scaled_h - 224 - offset).tolist()) >= {0, 1}
        assert np.all(offset <= rows.scaled_h - 224)


def test_a_fixed_scale_is_that_scale():
    rows = views(replace(RULE, scale=(384, 384)), MANY, COLOUR, 0, np.arange(2000))

    assert set(rows.scale.tolist()) == {384}
    assert set(np.minimum(rows.scaled_h, rows.scaled_w).tolist()) == {384}


def test_the_long_side_is_rounded_to_the_nearest_pixel_halves_up():
    long, short = np.arange(300, 900), 300

    scaled = scaled_side(long, np.array(short), 150)

    assert scaled.tolist() == [int(Fraction(int(side) * 150, short) + Fraction(1, 2)) for side in long]


def test_half_of_the_views_are_mirrored_unless_flip_is_off():
    flipped = views(RULE, MANY, COLOUR, 0, np.arange(2000)).mirror
    still = views(replace(RULE, flip=False), MANY, COLOUR, 0, np.arange(2000)).mirror

    assert 0.45 < flipped.mean() < 0.55
    assert not still.any()


def test_the_colour_shift_moves_along_the_axes_by_a_tenth_of_their_eigenvalues():
    shift = views(RULE, MANY, COLOUR, 0, np.arange(2000)).shift

    along = shift @ COLOUR.axes  # (N, 3): each column one axis
    np.testing.assert_allclose(along.std(axis=0), 255 * 0.1 * COLOUR.eigenvalues, rtol=0.06)
    assert np.all(np.abs(along.mean(axis=0)) < 0.08 * along.std(axis=0))
    assert np.all(np.abs(np.corrcoef(along.T) - np.eye(3)) < 0.08)


def test_no_colour_no_shift():
    assert not views(replace(RULE, colour=0.0), MANY, COLOUR, 0, np.arange(20)).shift.any()


def test_the_centre_crop_stands_in_the_middle():
    rows = centre_views(pictures_of([(300, 400), (401, 300)]), np.arange(2), 150, 100)

    assert rows.scaled_h.tolist() == [150, 201]  # 200.5 rounds up
    assert rows.scaled_w.tolist() == [200, 150]
    assert rows.offset_y.tolist() == [25, 50]
    assert rows.offset_x.tolist() == [50, 25]
    assert not rows.mirror.any()
    assert not rows.shift.any()


def test_a_whole_picture_keeps_its_shape():
    rows = full_views(pictures_of([(300, 400), (1000, 10)]), np.array([1, 0]), 32)

    assert rows.scaled_h.tolist() == [3200, 32]
    assert rows.scaled_w.tolist() == [32, 43]


def test_a_squeezed_picture_has_two_sides_of_that_length():
    pictures = pictures_of([(300, 400), (1, 5000), (7, 7)])
    full = full_views(pictures, np.arange(3), 96, "whole")
    centre = centre_views(pictures, np.arange(3), 96, 64, "whole")
    trained = views(replace(RULE, view="whole", scale=(64, 64), crop=64), pictures, COLOUR, 0, np.arange(3))

    assert full.scaled_h.tolist() == full.scaled_w.tolist() == centre.scaled_h.tolist() == centre.scaled_w.tolist() == [96] * 3
    assert centre.offset_y.tolist() == centre.offset_x.tolist() == [16] * 3
    assert trained.scaled_h.tolist() == trained.scaled_w.tolist() == [64] * 3
    assert not trained.offset_y.any() and not trained.offset_x.any()
    where = window(trained, pictures.heights[trained.picture], pictures.widths[trained.picture])
    assert not where.start.any() and not where.roi_start.any()
    assert where.roi_end.tolist() == [[float(n) for n in side] for side in where.end.tolist()]


def test_half_of_the_views_are_upside_down_and_a_quarter_each_turned_by_their_own_draws():
    rows = views(replace(RULE, flip_vertical=True, quarter_turns=True), MANY, COLOUR, 0, np.arange(2000))
    plain = views(RULE, MANY, COLOUR, 0, np.arange(2000))

    assert np.bincount(rows.upside_down).tolist() == pytest.approx([1000] * 2, rel=0.08)
    assert np.bincount(rows.turns).tolist() == pytest.approx([500] * 4, rel=0.12)
    together = np.array([rows.mirror, rows.upside_down, rows.turns % 2, rows.turns // 2])
    assert np.all(np.abs(np.corrcoef(together) - np.eye(4)) < 0.08)
    for name in FROZEN_VIEWS:
        assert np.array_equal(getattr(rows, name), getattr(plain, name)), "the draws that were there before are as they were"


def test_the_window_of_a_halved_picture():
    rows = centre_views(pictures_of([(400, 600)]), np.array([0]), 200, 100)

    where = window(rows, np.array([400]), np.array([600]))

    assert where.start.tolist() == [[97, 197]]  # the crop covers rows 100 to 300, columns 200 to 400,
    assert where.end.tolist() == [[303, 403]]  # and 3 pixels more: ceil(600/300) + 1
    assert where.roi_start.tolist() == [[3.0, 3.0]]
    assert where.roi_end.tolist() == [[203.0, 203.0]]


def test_every_window_lies_in_its_picture_and_holds_its_crop():
    rows = views(replace(RULE, scale=(224, 512)), MANY, COLOUR, 0, np.arange(2000))
    sides = np.stack([MANY.heights[rows.picture], MANY.widths[rows.picture]], axis=1)

    where = window(rows, sides[:, 0], sides[:, 1])

    assert np.all((where.start >= 0) & (where.start < where.end) & (where.end <= sides))
    assert np.all((where.roi_start >= 0) & (where.roi_end <= where.end - where.start + 1e-3))
    scaled = np.stack([rows.scaled_h, rows.scaled_w], axis=1)
    np.testing.assert_allclose((where.roi_end - where.roi_start) * scaled / sides, 224, rtol=1e-5)
