"""Balanced epochs: how many views each class gets, and which of its pictures, as a pure function of the epoch's number.

With balance b, class c of n_c pictures (of n, in K classes) has q_c = (1 - b) n_c + b n / K views an epoch, on average:
b = 0 is the data's own shares, b = 1 equal classes. Numbers of views are whole; what rounding leaves over is carried to
the next epoch by formula, so that no epoch needs to know the ones before it.
"""

from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vggcore.counter_hash import hash64

Integers = NDArray[np.int64]


def counts_after(epochs: int, sizes: Integers, balance: float) -> list[int]:
    """Views of each class in the first `epochs` epochs together, (K,); sizes, (K,): pictures of each class.

    All classes together have n views an epoch, and no class is a whole view away from epochs * q_c, at any time:
    floor(epochs * Q_c) - floor(epochs * Q_(c-1)) with the partial sums Q_c of q_c. A class without pictures has none.
    """
    share = Fraction(repr(balance))  # as it is written: 0.1 is one tenth
    n, classes = int(sizes.sum()), int(np.count_nonzero(sizes))
    whole, ends = share.denominator * classes, [0]  # q_c and Q_c as whole numbers of 1 / (denominator * K)
    for size in sizes.tolist():
        views = (share.denominator - share.numerator) * classes * size + share.numerator * n
        ends.append(ends[-1] + (views if size else 0))
    return [epochs * end // whole - epochs * start // whole for start, end in pairwise(ends)]


def balanced_pictures(labels: Integers, balance: float, epoch: int, key: NDArray[np.uint64]) -> Integers:
    """The pictures of epoch number `epoch`, (n,) rows in rising order, some perhaps several times, some not at all.

    labels: (n,) >= 0, the class of each row; key: a hash, (), of what the stage draws by. Each class goes through its
    pictures again and again, each time in another order, and goes on in an epoch where it stopped in the one before.
    """
    sizes = np.bincount(labels).astype(np.int64)
    before, after = (counts_after(epochs, sizes, balance) for epochs in (epoch, epoch + 1))
    classes = np.split(np.argsort(labels, kind="stable").astype(np.int64), np.cumsum(sizes)[:-1])
    chosen = [
        cycled(rows, start, stop, key) for rows, start, stop in zip(classes, before, after, strict=True) if start < stop
    ]
    return np.sort(np.concatenate(chosen))


def cycled(rows: Integers, start: int, stop: int, key: NDArray[np.uint64]) -> Integers:
    """Places [start, stop) of the endless sequence of cycles, each of which is all `rows` in an order of its own."""
    first, last = start // len(rows), -(-stop // len(rows))
    cycles = np.arange(first, last, dtype=np.int64)[:, np.newaxis]
    order = np.argsort(hash64(key, "cycle", cycles, rows), axis=1, kind="stable")
    return rows[order].ravel()[start - first * len(rows) : stop - first * len(rows)]
