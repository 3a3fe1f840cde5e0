"""Paired tests of equal models pass as rarely as they promise; counts, bounds and power against exact arithmetic."""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vggcore.paired import (
    Tally,
    alpha_of_use,
    gain_bounds,
    gain_test,
    half_tails,
    mcnemar,
    power,
    powers,
    resampled_chances,
    strata_power,
    tally,
)

ALPHA = 0.05
PAIRS = 2000
# A rate over 2,000 simulated pairs has a standard error of 0.0049 where the truth is 0.05: a right test may show a
# little more than alpha by chance. Seeds are fixed, and three standard errors are allowed.
ALLOWED = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / PAIRS)


def counted(pictures, gained, lost):
    """A Tally of plain numbers or lists."""
    return Tally(*(np.atleast_1d(np.array(side, np.int64)) for side in (pictures, gained, lost)))


def exact_tail(trials, at_least):
    """P(X >= at_least), X binomial (trials, 1/2), in fractions."""
    return Fraction(sum(math.comb(trials, k) for k in range(at_least, trials + 1)), 2**trials)


def by_every_flip(counts):
    """The sign-flip p-value by going through all signs of all differing pictures."""
    weights = np.repeat(1 / counts.pictures, counts.gained + counts.lost)
    seen = ((counts.gained - counts.lost) / counts.pictures).sum()
    flips = [float(np.dot(signs, weights)) for signs in product((-1, 1), repeat=len(weights))]
    return float(np.mean(np.array(flips) >= seen - 1e-9))


strata = st.lists(
    st.integers(1, 60).flatmap(
        lambda n: st.integers(0, n).flatmap(lambda m: st.tuples(st.just(n), st.integers(0, m).map(lambda g, m=m: (g, m - g))))
    ),
    min_size=1,
    max_size=5,
).map(lambda rows: counted([n for n, _ in rows], [g for _, (g, _) in rows], [lost for _, (_, lost) in rows]))


def test_pictures_are_counted_by_stratum_in_order_of_appearance():
    first = [True, True, False, False, True]
    second = [True, False, True, False, False]

    whole, split = tally(first, second), tally(first, second, [7, 2, 7, 2, 2])

    assert (whole.pictures.tolist(), whole.gained.tolist(), whole.lost.tolist()) == ([5], [2], [1])
    assert (split.pictures.tolist(), split.gained.tolist(), split.lost.tolist()) == ([2, 3], [0, 2], [1, 0])
    assert whole.gain == pytest.approx(1 / 5)
    assert split.gain == pytest.approx((-1 / 2 + 2 / 3) / 2)
    assert split.discordance == pytest.approx(3 / 5)


@pytest.mark.parametrize("trials", [0, 1, 15, 64, 333, 3000])
def test_tails_of_the_fair_coin_are_exact(trials):
    tails = half_tails(trials)

    assert tails[0] == 1.0 and tails[-1] == 0.0
    for at_least in {0, trials // 2, trials * 2 // 3, trials}:
        assert tails[at_least] == pytest.approx(float(exact_tail(trials, at_least)), rel=1e-8, abs=1e-300)


def test_mcnemars_test_is_the_coins_tail():
    assert mcnemar(9, 6) == pytest.approx(float(exact_tail(15, 9)))
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(11, 0) == pytest.approx(2**-11)


@pytest.mark.parametrize(
    "counts",
    [
        counted([9], [5], [2]),
        counted([9, 9], [5, 1], [2, 3]),
        counted([5, 12], [4, 3], [0, 5]),
        counted([5, 12, 5], [1, 3, 2], [2, 4, 0]),
    ],
)
def test_the_sign_flip_test_with_at_most_two_sizes_is_exact(counts):
    assert gain_test(counts, alpha=ALPHA, seed=1).p_value == pytest.approx(by_every_flip(counts), rel=1e-9)


def test_the_sign_flip_test_by_draws_is_near_the_exact_one_and_the_same_again():
    counts = counted([3, 8, 20], [2, 4, 5], [0, 1, 3])

    found = gain_test(counts, alpha=ALPHA, seed=5)

    exact = by_every_flip(counts)
    assert found.p_value == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 100_000))
    assert found == gain_test(counts, alpha=ALPHA, seed=5)
    assert found.p_value != gain_test(counts, alpha=ALPHA, seed=6).p_value


def test_classes_of_equal_size_make_the_sign_flip_test_mcnemars():
    counts = counted([50, 50, 50], [6, 9, 2], [3, 1, 4])

    assert gain_test(counts, alpha=ALPHA, seed=0).p_value == pytest.approx(mcnemar(17, 8))


@settings(max_examples=40, deadline=None)
@given(strata, st.sampled_from([0.05, 0.05 / 52]), st.data())
def test_a_model_that_is_right_once_more_is_never_worse_off(counts, alpha, data):
    place = data.draw(st.integers(0, len(counts.pictures) - 1))
    both_wrong_or_right = int((counts.pictures - counts.gained - counts.lost)[place])
    moves = [(1, 0)] * (both_wrong_or_right > 0) + [(0, -1), (1, -1)] * (int(counts.lost[place]) > 0)
    if not moves:
        return
    gained, lost = data.draw(st.sampled_from(moves))
    one = np.eye(1, len(counts.pictures), place, dtype=np.int64)[0]

    better = Tally(counts.pictures, counts.gained + gained * one, counts.lost + lost * one)

    before, after = (gain_test(each, alpha=alpha, seed=2).p_value for each in (counts, better))
    assert after <= before * (1 + 1e-9)
    for tail in (0.05, 0.3):
        assert all(np.array(gain_bounds(better, tail=tail)) >= np.array(gain_bounds(counts, tail=tail)) - 1e-9)


@settings(max_examples=30, deadline=None)
@given(strata)
def test_of_two_models_at_most_one_is_better(counts):
    other = Tally(counts.pictures, counts.lost, counts.gained)

    here, there = (gain_test(each, alpha=ALPHA, seed=3).p_value for each in (counts, other))

    assert here + there >= 1 - 0.02
    assert counts.gain == pytest.approx(-other.gain)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.data(), st.sampled_from([0.2, 0.05, 0.05 / 52]))
def test_the_needed_gain_is_the_smallest_that_passes(first, second, data, alpha):
    differing = [data.draw(st.integers(0, size)) for size in (first, second)]
    needed = gain_test(counted([first, second], differing, [0, 0]), alpha=alpha, seed=0).needed_gain

    reached = [
        (counts.gain, gain_test(counts, alpha=alpha, seed=0).p_value)
        for share in np.linspace(0, 1, 12)
        for counts in [counted([first, second], *np.transpose([(m - round(share * m), round(share * m)) for m in differing]))]
    ]

    if any(p_value <= alpha for _, p_value in reached):
        for gain, p_value in reached:
            assert (p_value <= alpha) == (gain >= needed - 1e-9)


def test_a_split_too_small_to_show_anything_says_so():
    few = gain_test(counted([333], [2], [1]), alpha=0.05 / 52, seed=0)
    tiny = gain_test(counted([10], [9], [0]), alpha=0.05 / 52, seed=0)
    spent = gain_test(counted([333], [99], [0]), alpha=0.0, seed=0)

    assert few.needed_gain == pytest.approx(11 / 333)   # 2^-11 is the first power below 0.05 / 52
    assert math.isinf(tiny.needed_gain)
    assert math.isinf(spent.needed_gain) and spent.p_value > 0


def test_the_needed_gain_by_draws_is_near_that_of_two_sizes():
    two = gain_test(counted([40, 300], [9, 40], [3, 20]), alpha=0.05, seed=1).needed_gain
    three = gain_test(counted([40, 300, 299], [9, 20, 20], [3, 10, 10]), alpha=0.05, seed=1).needed_gain

    assert three == pytest.approx(two * 2 / 3, rel=0.12)   # the mean is over three strata in place of two


def equal_pairs(rng, sizes, discordance, pairs=PAIRS):
    """(gained, lost), each (pairs, strata), of models that are right equally often in every stratum."""
    differing = rng.binomial(sizes, discordance, (pairs, len(sizes)))
    gained = rng.binomial(differing, 0.5)
    return gained, differing - gained


@pytest.mark.parametrize("pictures", [30, 100, 333, 1000, 3000])
@pytest.mark.parametrize("discordance", [0.03, 0.1, 0.4])
def test_equal_models_pass_mcnemars_test_at_most_at_alpha(pictures, discordance):
    gained, lost = equal_pairs(np.random.default_rng(pictures), np.array([pictures]), discordance)
    tails = {m: half_tails(m) for m in np.unique(gained + lost).tolist()}

    rate = np.mean([tails[g + c][g] <= ALPHA for g, c in zip(gained[:, 0].tolist(), lost[:, 0].tolist(), strict=True)])

    assert rate <= ALLOWED
    assert rate > 0 or pictures * discordance < 15   # a test that never passes would keep the promise too


@pytest.mark.parametrize("sizes", [(4, 26), (30, 70), (10, 323), (100, 900), (30, 2970)])
@pytest.mark.parametrize("discordance", [0.05, 0.3])
def test_equal_models_pass_the_sign_flip_test_at_most_at_alpha_also_with_a_rare_class(sizes, discordance):
    gained, lost = equal_pairs(np.random.default_rng(sum(sizes)), np.array(sizes), discordance)

    found = [gain_test(Tally(np.array(sizes), g, c), alpha=0.0, seed=4).p_value for g, c in zip(gained, lost, strict=True)]

    assert np.mean(np.array(found) <= ALPHA) <= ALLOWED


def test_equal_models_pass_the_sign_flip_test_by_draws_at_most_at_alpha():
    sizes, pairs = np.array([6, 27, 300]), 500      # each takes 10 ms
    gained, lost = equal_pairs(np.random.default_rng(6), sizes, 0.12, pairs)

    found = [gain_test(Tally(sizes, g, c), alpha=0.0, seed=4).p_value for g, c in zip(gained, lost, strict=True)]

    assert np.mean(np.array(found) <= ALPHA) <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / pairs)


def years_with_a_false_pass(rng, pictures, alpha, years=PAIRS, weeks=52):
    """The share of years in which an equal challenger passes once or more, all weeks of a year on one gate list.

    Each picture has its own difficulty; champion and challengers are drawn from it alike. The champion stays: what luck
    it had on this list helps or harms all 52 challengers, so that the weeks of a year depend on each other.
    """
    hard, easy = 0.75, 0.95       # how often a model is right on the two kinds of picture
    passed = np.zeros(years, bool)
    table = [half_tails(m) for m in range(pictures + 1)]
    enough = np.array([np.argmax(tails <= alpha) for tails in table])      # gained pictures that pass, by differing ones
    champion = rng.binomial(pictures // 2, [[hard, easy]], (years, 2))     # right on so many of each kind
    for _ in range(weeks):
        lost = rng.binomial(champion, [1 - hard, 1 - easy]).sum(axis=1)
        gained = rng.binomial(pictures // 2 - champion, [hard, easy]).sum(axis=1)
        passed |= gained >= enough[gained + lost]
    return passed.mean()


@pytest.mark.parametrize("pictures", [100, 334, 3000])
def test_in_a_year_of_weekly_uses_a_false_pass_is_as_rare_as_alpha(pictures):
    spent = years_with_a_false_pass(np.random.default_rng(7), pictures, alpha_of_use(ALPHA, 52, use=1))
    unspent = years_with_a_false_pass(np.random.default_rng(7), pictures, ALPHA)

    assert spent <= ALLOWED
    assert unspent > 0.2     # what the spending rule prevents


def test_in_a_year_of_weekly_uses_balanced_accuracy_has_few_false_passes_too():
    rng, sizes, alpha_k = np.random.default_rng(8), np.array([30, 300]), alpha_of_use(ALPHA, 52, use=1)
    years, passed = 150, 0

    for _ in range(years):
        champion = rng.binomial(sizes, 0.85)
        lost = rng.binomial(champion, 0.15, (52, 2))
        gained = rng.binomial(sizes - champion, 0.85, (52, 2))
        tests = (gain_test(Tally(sizes, g, c), alpha=0.0, seed=4) for g, c in zip(gained, lost, strict=True))
        passed += any(test.p_value <= alpha_k for test in tests)

    assert passed / years <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / years)


def test_each_use_of_a_list_spends_its_share_and_none_is_left_after_the_last():
    assert sum(alpha_of_use(0.05, 52, use) for use in range(1, 200)) == pytest.approx(0.05)
    assert alpha_of_use(0.05, 52, 52) == 0.05 / 52
    assert alpha_of_use(0.05, 52, 53) == 0.0


@pytest.mark.parametrize(("pictures", "gained", "lost"), [(1, 0, 1), (8, 0, 0), (30, 5, 2), (333, 0, 40)])
def test_the_bootstraps_distribution_is_that_of_the_counts_resampled(pictures, gained, lost):
    shares = np.array([gained + 1, lost + 1, pictures - gained - lost]) / (pictures + 2)
    drawn = np.random.default_rng(9).multinomial(pictures, shares, 40_000)

    chances = resampled_chances(pictures, gained, lost)

    steps = np.arange(-pictures, pictures + 1)
    found = np.searchsorted(np.sort(drawn[:, 0] - drawn[:, 1]), steps, side="right") / 40_000
    assert np.abs(chances - found).max() < 0.01
    assert chances[-1] == 1.0 and (np.diff(chances) >= 0).all()


def test_the_lower_bound_is_below_the_true_gain_as_often_as_it_says():
    rng, sizes, shares = np.random.default_rng(10), np.array([40, 300]), [0.12, 0.05, 0.83]
    runs = 600

    drawn = [np.array([rng.multinomial(n, shares) for n in sizes]) for _ in range(runs)]
    lows = [gain_bounds(Tally(sizes, each[:, 0], each[:, 1]), tail=0.05)[0] for each in drawn]

    missed = np.mean(np.array(lows) > 0.12 - 0.05)
    assert 0.02 < missed < 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_a_few_pictures_that_do_not_differ_prove_little():
    low, high = gain_bounds(counted(5, 0, 0), tail=0.025)

    assert low <= -0.4 and high >= 0.4


def test_many_small_classes_do_not_pull_the_bounds_off_the_gain():
    counts = counted([6] * 400, [1] * 200 + [2] * 200, [0] * 400)

    low, high = gain_bounds(counts, tail=0.05)

    assert low < counts.gain < high


def test_trading_a_rare_class_for_a_common_one_seldom_gets_past_the_bound():
    """No gain in truth: 10 points lost in a class of 10, as many won in one of 990. The sign-flip test takes the models
    for equal picture by picture and is misled where, by luck, none of the 10 was lost: in a third of all cases."""
    rng, sizes = np.random.default_rng(11), np.array([10, 990])
    runs = 300

    drawn = [Tally(sizes, np.array([0, rng.binomial(990, 0.1)]), np.array([rng.binomial(10, 0.1), 0])) for _ in range(runs)]
    misled = [counts for counts in drawn if gain_test(counts, alpha=0.05 / 52, seed=0).p_value <= 0.05 / 52]
    passed = sum(gain_bounds(counts, tail=0.05)[0] > 0 for counts in misled)

    assert len(misled) / runs > 0.2
    assert passed / runs <= ALPHA


def test_power_is_what_a_simulation_shows():
    rng, runs = np.random.default_rng(12), 20_000
    drawn = rng.multinomial(333, [0.09, 0.03, 0.88], runs)

    rate = np.mean([mcnemar(g, c) <= 0.05 / 52 for g, c, _ in drawn[:4000].tolist()])

    assert power(333, 0.12, 0.06, 0.05 / 52) == pytest.approx(rate, abs=0.03)


def test_power_grows_with_the_gain_and_the_pictures_and_starts_below_alpha():
    gains = powers(333, 0.1, [0.0, 0.03, 0.06, 0.1], 0.05)

    assert gains[0] <= 0.05 and (np.diff(gains) > 0).all()
    assert power(1000, 0.1, 0.03, 0.05) > gains[1]
    assert power(50, 0.0, 0.0, 0.05) == 0.0
    assert power(20, 0.2, 1.0, 0.05) == 1.0


def test_the_power_over_strata_is_near_the_exact_one_where_both_are_known():
    counts = counted([1000], [60], [40])

    assert strata_power(counts, 0.04, 0.032) == pytest.approx(power(1000, 0.1, 0.04, 0.05 / 52), abs=0.05)
    assert strata_power(counted([9], [0], [0]), 0.0, 0.0) == 1.0
