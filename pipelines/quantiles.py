"""Quantile tables in whole numbers: draws from distributions that would need a power or a logarithm.

NumPy's pow, log and exp differ in their last bits between its code paths and versions, and a view must not. These tables
are worked out in decimal arithmetic (Python's decimal rounds exp and ln correctly, everywhere alike) and rounded to
multiples of 1 / UNIT; a uniform draw then picks an entry. All entries are equally likely: STEPS different values.
"""

from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

STEPS = 1024     # entries of a table: the quantiles of (k + 1/2) / STEPS
UNIT = 2**16     # entries are numbers of 1/65536, which float32 and float64 hold exactly
DIGITS = 40      # of the decimal arithmetic; far more than rounding to 1 / UNIT needs


@lru_cache(maxsize=32)
def log_uniform(low: float, high: float) -> Integers:
    """Quantiles of a number between low > 0 and high whose logarithm is uniform, (STEPS,) rising, in 1 / UNIT."""
    with localcontext(Context(prec=DIGITS)):
        span = (Decimal(high) / Decimal(low)).ln()
        found = [Decimal(low) * (span * chance(k)).exp() * UNIT for k in range(STEPS)]
        return read_only([max(1, int(value.to_integral_value(ROUND_HALF_EVEN))) for value in found])


@lru_cache(maxsize=32)
def symmetric_beta(alpha: float) -> Integers:
    """Quantiles of Beta(alpha, alpha), alpha > 0, (STEPS,) rising, in 1 / UNIT: from 0 to UNIT, symmetric about UNIT / 2."""
    with localcontext(Context(prec=DIGITS + int(alpha))):  # large alpha: terms of both signs, up to 1.5^alpha
        share_below = lower_half(Decimal(alpha))
        half = [0] * (STEPS // 2)

        def fill(start: int, stop: int, low: int, high: int) -> None:
            """Entries [start, stop), all between low and high: the middle one, then those on both sides of it."""
            if start == stop:
                return
            middle = (start + stop) // 2
            half[middle] = nearest(share_below, chance(middle), low, high)
            fill(start, middle, low, half[middle])
            fill(middle + 1, stop, half[middle], high)

        fill(0, len(half), 0, UNIT // 2)
    return read_only(half + [UNIT - entry for entry in reversed(half)])


def chance(k: int) -> Decimal:
    """The share of draws below entry k: the middle of its step."""
    return (k + Decimal("0.5")) / STEPS


def nearest(share_below: Callable[[Decimal], Decimal], wanted: Decimal, low: int, high: int) -> int:
    """The whole number m of [low, high] with the quantile of `wanted` between (m - 1/2) / UNIT and (m + 1/2) / UNIT."""
    while low < high:
        middle = (low + high) // 2
        if share_below((middle + Decimal("0.5")) / UNIT) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


def lower_half(alpha: Decimal) -> Callable[[Decimal], Decimal]:
    """The distribution function of Beta(alpha, alpha) on [0, 1/2], by its series; by symmetry it is 1/2 at 1/2.

    The integral of (t (1 - t))^(alpha - 1) from 0 to x is x^alpha * sum_n (1 - alpha)_n / n! * x^n / (alpha + n), whose
    terms fall at least by half from n = alpha on (Abramowitz and Stegun, 6.6.8 with 15.1.1).
    """
    factor, series = Decimal(1), []
    for n in range(4 * int(alpha) + 80):
        series.append(factor / (alpha + n))
        factor *= (n + 1 - alpha) / (n + 1)

    def integral(x: Decimal) -> Decimal:
        total = Decimal(0)
        for term in reversed(series):
            total = total * x + term
        return total * (alpha * x.ln()).exp()

    half = Decimal("0.5")
    scale = half / integral(half)
    return lambda x: integral(x) * scale


def read_only(entries: list[int]) -> Integers:
    """A table that callers share."""
    table = np.array(entries, np.int64)
    table.flags.writeable = False
    return table
