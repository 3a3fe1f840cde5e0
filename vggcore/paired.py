"""Two models on the same pictures: exact tests of whether the first is better, bounds of its gain, what a split can show.

Only pictures on which one model is right and the other wrong speak; all functions here take their counts (`Tally`). With
one stratum the gain is that of top-1 accuracy; with a stratum for each class, that of balanced accuracy.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vggcore.counter_hash import hash64, mix64, uniforms

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

FLIPS = 100_000      # draws of the sign-flip test; its smallest p-value is 1 / (FLIPS + 1)
RESAMPLES = 4_000    # of the bootstrap over several strata
BLOCK = 2**14        # hashes at a time: what fits the processor's cache
TIE = 1e-12          # gains that differ by less are equal; they count against the first model
LIKELY = 1e-7        # a number of differing pictures less likely than this is left out of the power
MOST_COUNTS = 60     # numbers of differing pictures that the power is made of; more are thinned evenly
IMAGINED = 1.0       # pictures imagined each way in a stratum before it is resampled (Laplace; Bonett and Price 2012)


@dataclass(frozen=True, eq=False)
class Tally:
    """Pictures of each stratum, those that only the first model had right (gained) and only the second (lost).

    Each int64 (strata,); pictures >= 1, gained + lost <= pictures.
    """

    pictures: Ints
    gained: Ints
    lost: Ints

    def __post_init__(self) -> None:
        assert self.pictures.shape == self.gained.shape == self.lost.shape and self.pictures.size > 0
        assert (self.pictures > 0).all() and (self.gained + self.lost <= self.pictures).all()
        assert min(self.gained.min(), self.lost.min()) >= 0

    @property
    def gain(self) -> float:
        """How much more accurate the first model is, -1..1: the mean over strata."""
        return float(np.mean((self.gained - self.lost) / self.pictures))

    @property
    def discordance(self) -> float:
        """Share of pictures on which exactly one model is right, 0..1."""
        return float((self.gained + self.lost).sum() / self.pictures.sum())


class GainTest(NamedTuple):
    """`p_value`: how often equal models show such a gain; `needed_gain`: the smallest gain that passes at alpha."""

    p_value: float
    needed_gain: float


def tally(first_right: ArrayLike, second_right: ArrayLike, strata: ArrayLike | None = None) -> Tally:
    """Counts from what each model had right, bool (n,), n > 0; strata: integers (n,), kept in order of appearance."""
    first, second = np.asarray(first_right, bool), np.asarray(second_right, bool)
    assert first.shape == second.shape and first.ndim == 1 and first.size > 0, (first.shape, second.shape)
    place = np.zeros(len(first), np.int64)
    if strata is not None:
        _, appears, place = np.unique(np.asarray(strata), return_index=True, return_inverse=True)
        place = np.argsort(np.argsort(appears))[place]
    count = int(place.max()) + 1
    return Tally(
        pictures=np.bincount(place, minlength=count).astype(np.int64),
        gained=np.bincount(place[first & ~second], minlength=count).astype(np.int64),
        lost=np.bincount(place[second & ~first], minlength=count).astype(np.int64),
    )


def alpha_of_use(alpha: float, planned_uses: int, use: int) -> float:
    """What the use-th use (from 1) of one list may spend: alpha / planned_uses, 0 once all are spent.

    The sum over all uses is alpha, so that by Bonferroni the chance of any false pass in the life of a list is at most
    alpha, however much its uses depend on each other.
    """
    assert use >= 1 and planned_uses >= 1, (use, planned_uses)
    return alpha / planned_uses if use <= planned_uses else 0.0


def log_factorials(most: int) -> Floats:
    """log(k!) for k = 0..most."""
    logs: Floats = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])
    return logs


def half_tails(trials: int, logs: Floats | None = None) -> Floats:
    """P(X >= k) for k = 0..trials + 1 and X binomial (trials, 1/2); relative error below 1e-8 up to 50,000 trials.

    logs: log_factorials of `trials` or more, where they are at hand.
    """
    logs = log_factorials(trials) if logs is None else logs
    tails = np.cumsum(binomial(logs, trials, 0.5)[::-1])[::-1]
    return np.concatenate([tails / tails[0], [0.0]])


def mcnemar(gained: int, lost: int) -> float:
    """One-sided p-value of McNemar's exact test that the first model is better: P(X >= gained), X of gained + lost coins."""
    return float(half_tails(gained + lost)[gained])


def gain_test(counts: Tally, *, alpha: float, seed: int) -> GainTest:
    """The paired sign-flip test: how often the gain is as large when each differing picture falls to a model by a coin.

    With strata of at most two sizes it is exact (of one size: McNemar's test); else FLIPS draws of our own hash of
    `seed`, and p = (1 + draws as large) / (1 + FLIPS). A picture always has the same coin, so that a model that is
    right once more never gets a larger p-value.

    needed_gain: with as many pictures differing in each stratum as here; if so few can't show anything, with just
    enough of them, all gained, where a picture weighs least; infinity where the split has not even these.
    """
    sizes, place = np.unique(counts.pictures, return_inverse=True)
    gained, lost = (np.bincount(place, weights=side).astype(np.int64) for side in (counts.gained, counts.lost))
    differing = gained + lost
    strata = len(counts.pictures)
    seen = float(((gained - lost) / sizes).sum())
    if len(sizes) <= 2:
        null = TwoSizes(np.resize(sizes, 2), np.append(differing, 0)[:2])
        p_value, needed = null.p_value(seen), null.smallest(alpha)
    else:
        drawn = flipped_gains(sizes, differing, seed)
        p_value, needed = float((1 + (drawn >= seen - TIE).sum()) / (1 + FLIPS)), smallest_of(drawn, sizes, differing, alpha)
    if math.isinf(needed):
        fewest = math.ceil(-math.log2(alpha)) if alpha > 0 else math.inf
        needed = fewest / float(sizes[-1]) if fewest <= sizes[-1] else math.inf
    return GainTest(p_value, needed / strata)


class TwoSizes:
    """The exact distribution of a gain whose pictures come from strata of two sizes, each picture's sign a coin."""

    def __init__(self, sizes: Ints, differing: Ints) -> None:
        self.sizes, self.differing = sizes, differing
        first, self.second_tails = half_tails(int(differing[0])), half_tails(int(differing[1]))
        self.first_chances = first[:-1] - first[1:]
        self.first_gains = (2 * np.arange(differing[0] + 1) - differing[0]) / sizes[0]

    def second_count(self, gain: float) -> Ints:
        """For each outcome of the first size, how many of the second must be gained for `gain` or more."""
        wanted = (gain - TIE - self.first_gains) * self.sizes[1]
        count: Ints = np.clip(np.ceil((wanted + self.differing[1]) / 2), 0, self.differing[1] + 1).astype(np.int64)
        return count

    def p_value(self, gain: float) -> float:
        """How often the gain is at least this."""
        return min(1.0, float(self.first_chances @ self.second_tails[self.second_count(gain)]))

    def smallest(self, alpha: float) -> float:
        """The smallest gain that can occur whose p-value is at most alpha; infinity where none is."""
        low, high = -TIE, float((self.differing / self.sizes).sum())
        if self.p_value(high) > alpha:
            return math.inf
        while high - low > TIE:
            middle = (low + high) / 2
            low, high = (low, middle) if self.p_value(middle) <= alpha else (middle, high)
        second = self.second_count(high)
        gains = self.first_gains + (2 * second - self.differing[1]) / self.sizes[1]
        return float(gains[second <= self.differing[1]].min())


def flipped_gains(sizes: Ints, differing: Ints, seed: int) -> Floats:
    """(FLIPS,) gains with a coin for each differing picture: bits of a hash, counted 64 at a time."""
    coins = dict(zip(sizes.tolist(), differing.tolist(), strict=True))
    words = [(size, word) for size, count in coins.items() for word in range(-(-count // 64))]
    kept = np.array([2 ** min(64, coins[size] - 64 * word) - 1 for size, word in words], np.uint64)
    names = np.asarray(hash64("word", *np.array(words, np.uint64).reshape(-1, 2).T))
    weights = np.array([2 / size for size, _ in words])
    draws = hash64("sign flip", seed, np.arange(FLIPS))
    total = np.full(FLIPS, -float((differing / sizes).sum()))
    at_once = max(1, BLOCK // max(1, len(words)))
    for start in range(0, FLIPS, at_once):
        block = slice(start, start + at_once)
        total[block] += np.bitwise_count(mix64(draws[block, None] ^ names) & kept) @ weights
    return total


def smallest_of(drawn: Floats, sizes: Ints, differing: Ints, alpha: float) -> float:
    """As TwoSizes.smallest, from draws: the smallest drawn gain that is drawn, or passed, rarely enough."""
    allowed = math.floor(alpha * (1 + FLIPS)) - 1
    if allowed < 0:
        return math.inf
    last_too_low = float(np.partition(drawn, FLIPS - 1 - allowed)[FLIPS - 1 - allowed])
    above = drawn[drawn > last_too_low + TIE]
    largest = float((differing / sizes).sum())
    if largest <= last_too_low + TIE:
        return math.inf
    return float(above.min()) if above.size else largest


def gain_bounds(counts: Tally, *, tail: float, seed: int = 0) -> tuple[float, float]:
    """(low, high) of the gain by the paired bootstrap within strata, each missed with chance `tail`.

    In each stratum one picture is imagined gained and one lost: without them a stratum of five pictures that do not
    differ would have a change of exactly 0, known without doubt. One stratum: the bootstrap's exact distribution. More:
    RESAMPLES draws, moved so that their mean is the gain seen, since what the imagined pictures pull each stratum
    towards 0 would add up over many small ones.
    """
    strata = list(zip(counts.pictures.tolist(), counts.gained.tolist(), counts.lost.tolist(), strict=True))
    if len(strata) == 1:
        pictures = strata[0][0]
        low, high = np.searchsorted(resampled_chances(*strata[0]), [tail, 1 - tail])
        return (float(low - pictures) / pictures, float(high - pictures) / pictures)
    total = np.zeros(RESAMPLES)
    draw = np.arange(RESAMPLES)
    for number, stratum in enumerate(strata):
        drawn = uniforms("gain", seed, number, draw)
        total += np.searchsorted(resampled_chances(*stratum), drawn, side="right") / stratum[0] - 1
    low, high = np.quantile(total / len(strata), [tail, 1 - tail], method="inverted_cdf")
    mean = float(np.mean((counts.gained - counts.lost) / (counts.pictures + 2 * IMAGINED)))
    return (max(-1.0, float(low) + counts.gain - mean), min(1.0, float(high) + counts.gain - mean))


def resampled_chances(pictures: int, gained: int, lost: int) -> Floats:
    """P(gained - lost <= k), k = -pictures..pictures, in resamples of a stratum: exact, by its characteristic function."""
    share = 1 / (pictures + 2 * IMAGINED)
    length = 2 ** math.ceil(math.log2(2 * pictures + 1))
    turn = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
    one = 1 + (gained + IMAGINED) * share * (turn - 1) + (lost + IMAGINED) * share * (turn.conj() - 1)
    chances = np.fft.irfft(one**pictures, length)
    chances = np.concatenate([chances[length - pictures :], chances[: pictures + 1]])
    total = np.cumsum(np.maximum(chances, 0))
    return np.asarray(total / total[-1], np.float64)


def power(pictures: int, discordance: float, gain: float, alpha: float) -> float:
    """How often McNemar's exact test at alpha passes a model that is truly better by `gain`, 0..1; to about 0.002.

    discordance: the true share of pictures on which exactly one model is right; at least `gain` is taken.
    """
    return float(powers(pictures, discordance, [gain], alpha)[0])


def powers(pictures: int, discordance: float, gains: ArrayLike, alpha: float) -> Floats:
    """As `power`, for each of several gains."""
    logs = log_factorials(pictures)
    found = []
    for gain in np.asarray(gains, np.float64).tolist():
        apart = min(1.0, max(discordance, gain))
        count = np.arange(pictures + 1)
        chances = binomial(logs, pictures, apart)
        likely = count[chances > LIKELY]
        likely = likely[:: -(-len(likely) // MOST_COUNTS)]
        better = (1 + gain / apart) / 2 if apart > 0 else 0.5
        passed = 0.0
        for differing in likely.tolist():
            enough = int(np.argmax(half_tails(differing, logs) <= alpha))
            passed += chances[differing] * binomial(logs, differing, better)[enough:].sum()
        found.append(min(1.0, passed / chances[likely].sum()))
    return np.array(found)


def binomial(logs: Floats, trials: int, chance: float) -> Floats:
    """P(X = k), k = 0..trials; logs: log_factorials of at least `trials`."""
    count = np.arange(trials + 1)
    if chance in (0.0, 1.0):
        return np.asarray(count == chance * trials, np.float64)
    ways = logs[trials] - logs[: trials + 1] - logs[trials::-1]
    chances: Floats = np.exp(ways + count * math.log(chance) + (trials - count) * math.log1p(-chance))
    return chances


def strata_power(counts: Tally, gain: float, needed_gain: float) -> float:
    """About how often a true `gain`, the same in every stratum, is seen as `needed_gain` or more (normal approximation)."""
    share = np.maximum((counts.gained + counts.lost) / counts.pictures, gain)
    deviation = math.sqrt(float(((share - gain**2) / counts.pictures).sum())) / len(counts.pictures)
    return NormalDist().cdf((gain - needed_gain) / deviation) if deviation > 0 else float(gain >= needed_gain)
