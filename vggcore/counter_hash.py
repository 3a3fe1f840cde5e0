"""Our own counter-based random numbers: a pure 64-bit hash of integers, the same on every machine and in every version.

NumPy's and PyTorch's generator streams may change between versions; a run must not. A draw is named by integers (seed,
epoch, position, ...) and needs no state, so that it can be made at any time, in any order, by any worker.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)   # SplitMix64's increment (Steele, Lea, Flood 2014)


def mix64(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words whose outputs pass the usual tests of randomness."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def hash64(*keys: ArrayLike | str) -> NDArray[np.uint64]:
    """A 64-bit hash of the keys in order, each a word (str) or integers >= 0 below 2^64; arrays broadcast.

    A word counts by its blake2b digest. Shape: the keys' broadcast shape.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            word = np.asarray(word_bits(key) if isinstance(key, str) else key).astype(np.uint64)
            state = mix64((state + GOLDEN) ^ mix64(word + GOLDEN))
    return state


def word_bits(word: str) -> np.uint64:
    """The first 64 bits of a word's blake2b digest."""
    return np.uint64(int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little"))


def uniforms(*keys: ArrayLike | str) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), multiples of 2^-53, one for each place of the keys' broadcast shape."""
    return (hash64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(*keys: ArrayLike | str) -> NDArray[np.float64]:
    """Nearly normal draws, mean 0 and deviation 1: the sum of 12 uniforms less 6, within [-6, 6).

    Sums are exact in any SIMD width; log and cos of the usual method are not (they differ between NumPy's code paths).
    """
    total = np.full(np.broadcast_shapes(*(np.shape(key) for key in keys if not isinstance(key, str))), -6.0)
    for number in range(12):
        total += uniforms(*keys, number)
    return total
