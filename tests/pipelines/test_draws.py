"""Random-resized crops, erased rectangles and mixup's weights: within their bounds, distributed as said, frozen."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.draws import erased_rectangles, mix_weights, random_regions
from pipelines.plan import ViewRule, partners, views, weights, window
from tests.pipelines.test_plan import COLOUR, pictures_of
from vggcore.counter_hash import hash64

KEY = hash64("test", 1)
MANY = np.arange(20_000)
RULE = ViewRule(seed=7, net="A", scale=(73, 73), crop=64, flip=True, colour=0.1, global_batch=256, area=(0.08, 1.0))


def squares(side: int) -> np.ndarray:
    return np.full(len(MANY), side)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6000), st.integers(1, 6000)), min_size=1, max_size=20),
    st.sampled_from([(0.08, 1.0), (0.0001, 0.0002), (1.0, 1.0), (0.5, 0.5)]),
    st.sampled_from([(0.75, 4 / 3), (0.01, 100.0), (50.0, 100.0), (1.0, 1.0)]),
    st.integers(0, 10**9),
)
def test_a_region_lies_in_its_picture_whatever_its_shape(sizes, area, aspect, place):
    pictures = pictures_of([*sizes, (1, 5000), (5000, 1), (7, 7), (1, 1)])
    places = place + np.arange(len(pictures))

    region = random_regions(area, aspect, KEY, places, pictures.heights, pictures.widths)

    top, left, high, wide = region.T
    assert np.all((top >= 0) & (left >= 0) & (high >= 1) & (wide >= 1))
    assert np.all((top + high <= pictures.heights) & (left + wide <= pictures.widths))
    rule = replace(RULE, area=area, aspect=aspect)
    rows = views(rule, pictures, COLOUR, 0, np.arange(len(pictures)))
    sides = np.stack([pictures.heights[rows.picture], pictures.widths[rows.picture]], axis=1)
    where = window(rows, sides[:, 0], sides[:, 1])
    assert np.all((where.start >= 0) & (where.start < where.end) & (where.end <= sides))
    assert np.array_equal(where.start + where.roi_start, rows.region[:, :2])
    assert np.array_equal(where.start + where.roi_end, rows.region[:, :2] + rows.region[:, 2:])


def test_shares_are_uniform_and_aspects_uniform_in_their_logarithm_where_they_fit():
    top, left, high, wide = random_regions((0.1, 0.5), (0.75, 4 / 3), KEY, MANY, squares(1000), squares(1000)).T

    assert stats.kstest(high * wide / 1e6, stats.uniform(0.1, 0.4).cdf).statistic < 0.012
    aspect = np.log(wide / high) / np.log(4 / 3)
    assert stats.kstest(aspect, stats.uniform(-1, 2).cdf).statistic < 0.012
    for offset, side in ((top, high), (left, wide)):
        assert stats.kstest(offset / (1001 - side), "uniform").statistic < 0.012
    assert np.all(np.abs(np.corrcoef([high * wide, aspect, top / (1001 - high), left / (1001 - wide)]) - np.eye(4)) < 0.02)


def test_a_side_that_does_not_fit_is_the_pictures_and_the_other_one_stays():
    _, _, high, wide = random_regions((1.0, 1.0), (4.0, 4.0), KEY, MANY[:1], np.array([100]), np.array([100])).T
    _, _, low_high, low_wide = random_regions((0.5, 0.5), (1.0, 1.0), KEY, MANY[:1], np.array([10]), np.array([1000])).T

    assert (high[0], wide[0]) == (50, 100)  # 50 x 200 does not fit
    assert (low_high[0], low_wide[0]) == (10, 71)  # nor 71 x 71


def test_as_many_crops_are_erased_as_asked_for_each_by_a_rectangle_of_2_to_33_percent():
    rectangles = erased_rectangles(0.25, 224, KEY, MANY)

    top, left, high, wide = rectangles.T
    some = high > 0
    assert some.mean() == pytest.approx(0.25, abs=0.01)
    assert not rectangles[~some].any()
    assert np.all((top + high <= 224) & (left + wide <= 224))
    share, aspect = (high * wide)[some] / 224**2, (wide / np.maximum(high, 1))[some]
    assert 0.019 < share.min() < 0.03 and 0.30 < share.max() < 0.335
    assert stats.kstest(share, stats.uniform(0.02, 0.31).cdf).statistic < 0.03
    assert 0.28 < aspect.min() < 0.32 and 3.1 < aspect.max() < 3.5
    assert erased_rectangles(1.0, 224, KEY, MANY)[:, 2].min() > 0


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_weights_are_drawn_from_the_beta_distribution(alpha):
    found = mix_weights(alpha, KEY, MANY)

    assert found.dtype == np.float32 and 0 <= found.min() <= found.max() <= 1
    at = np.linspace(0.01, 0.99, 99)
    shares = np.searchsorted(np.sort(found), at, side="right") / len(MANY)
    assert np.abs(shares - stats.beta.cdf(at, alpha, alpha)).max() < 0.012
    assert np.array_equal(found * 65536, np.rint(found * 65536)), "exact in float32, and so is 1 - weight"


def test_a_partner_is_another_places_picture_seen_by_draws_of_its_own():
    pictures = pictures_of([(300 + 7 * number % 900, 300 + 11 * number % 700) for number in range(2000)])
    rule = replace(RULE, mixup=0.4, area=None, quarter_turns=True, erase=0.5)

    first, second = (make(rule, pictures, COLOUR, 3, np.arange(2000)) for make in (views, partners))

    assert np.all(first.picture != second.picture)
    assert len(np.unique(second.picture)) > 1200  # 2,000 draws with repetition: 1 - 1/e of them
    for name in ("mirror", "turns", "offset_y", "offset_x"):
        assert abs(np.corrcoef(getattr(first, name), getattr(second, name))[0, 1]) < 0.07
    assert abs(np.corrcoef(first.erased[:, 2] > 0, second.erased[:, 2] > 0)[0, 1]) < 0.07
    assert np.array_equal(weights(rule, 3, np.arange(2000))[100:110], weights(rule, 3, np.arange(100, 110)))
    assert not np.array_equal(weights(rule, 3, np.arange(9)), weights(rule, 4, np.arange(9)))


def test_a_partner_never_comes_from_the_same_place():
    pictures = pictures_of([(90, 120)] * 3)

    pairs = {
        (int(first), int(second))
        for epoch in range(40)
        for first, second in zip(
            *(make(replace(RULE, mixup=0.4), pictures, COLOUR, epoch, np.arange(3)).picture for make in (views, partners)),
            strict=True,
        )
    }

    assert pairs == {(first, second) for first in range(3) for second in range(3) if first != second}


def test_one_picture_alone_is_its_own_partner():
    rows = partners(replace(RULE, mixup=0.4), pictures_of([(90, 120)]), COLOUR, 0, np.arange(1))

    assert rows.picture.tolist() == [0]


# Frozen on 2026-11-29: if one of these changes, every run with such a setting changes.
FROZEN = {
    "picture": [18, 13, 4],
    "region": [[22, 15, 368, 470], [3, 0, 373, 443], [23, 2, 258, 242]],
    "upside_down": [1, 1, 1],
    "turns": [2, 0, 0],
    "erased": [[0, 0, 0, 0], [20, 26, 22, 20], [11, 30, 43, 22]],
    "partner's picture": [7, 17, 18],
    "partner's region": [[25, 8, 305, 366], [112, 126, 200, 250], [8, 111, 373, 339]],
    "partner's turns": [1, 1, 0],
    "partner's mirror": [1, 0, 1],
    "weights": [0.0430908203125, 0.076416015625, 0.2834930419921875],
}


def test_the_draws_are_the_frozen_ones():
    pictures = pictures_of([(300 + 7 * number, 300 + 11 * number) for number in range(20)])
    rule = replace(RULE, mixup=0.4, flip_vertical=True, quarter_turns=True, erase=0.5)
    own, other = (make(rule, pictures, COLOUR, 3, np.arange(3)) for make in (views, partners))

    found = {name: getattr(own, name).tolist() for name in ("picture", "region", "upside_down", "turns", "erased")}
    found |= {f"partner's {name}": getattr(other, name).tolist() for name in ("picture", "region", "turns", "mirror")}
    found["weights"] = weights(rule, 3, np.arange(3)).tolist()

    assert found == FROZEN
