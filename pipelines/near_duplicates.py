"""Near-duplicates: a 64-bit difference hash of a picture's pixels, and an index that finds hashes a few bits apart."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

ROWS, COLUMNS = 8, 9   # cells whose grey levels are compared, each with its right neighbour: 8 x 8 bits
BITS = ROWS * (COLUMNS - 1)
DISTANCE = 2           # bits in which near-duplicates differ at most (measured, docs/how-to/registry.md)
NOTHING = 0            # the hash of pictures in which there is nothing to compare: it is near to none, itself included
LUMA = np.array([299, 587, 114], np.int64)   # of 1000: ITU-R BT.601
BLOCK = 1 << 22        # pairs compared at a time: bounds memory where very many hashes share a band


def difference_hash(pixels: NDArray[np.uint8]) -> int:
    """The 64-bit difference hash of a picture (height, width, 3) uint8: whether each cell is darker than its right one.

    Cells are area means of the grey levels, exact in integers: every machine gives the same hash. The first bit is the
    highest. A picture of one colour, and any that never brightens from left to right, gives 0 (NOTHING).
    """
    height, width, _ = pixels.shape
    bands_of_rows = []
    for row in overlaps(ROWS, height):
        lines = np.flatnonzero(row)
        part = pixels[lines[0] : lines[-1] + 1].reshape(len(lines), -1)
        # Whole numbers up to 255 * height: exact in float32 below 2**24 in whatever order BLAS adds them.
        kind = np.float32 if 255 * height < 2**24 else np.float64
        bands_of_rows.append(row[lines].astype(kind) @ part.astype(kind))
    grey = np.stack(bands_of_rows).astype(np.int64).reshape(ROWS, width, 3) @ LUMA      # (8, width)
    cells = grey @ overlaps(COLUMNS, width).T                                           # (8, 9)
    bits = (cells[:, :-1] < cells[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def overlaps(cells: int, lines: int) -> NDArray[np.int64]:
    """(cells, lines): how much of each line lies in each of `cells` equal parts, in units of 1 / cells of a line."""
    cell, line = np.arange(cells)[:, None], np.arange(lines)[None, :]
    shared = np.minimum((cell + 1) * lines, (line + 1) * cells) - np.maximum(cell * lines, line * cells)
    return np.asarray(np.clip(shared, 0, None), np.int64)


def near_pairs(hashes: NDArray[np.uint64], distance: int = DISTANCE) -> NDArray[np.int64]:
    """All pairs (n, 2) of places i < j whose hashes differ in at most `distance` bits, sorted; exact, NOTHING left out."""
    seen = np.flatnonzero(hashes != NOTHING)
    unique, home = np.unique(hashes[seen], return_inverse=True)
    places: list[list[int]] = [[] for _ in unique]
    for place, number in zip(seen.tolist(), home.tolist(), strict=True):
        places[number].append(place)
    found = {(i, j) for same in places for number, i in enumerate(same) for j in same[number + 1 :]}
    for first, second in joined(unique, unique, distance):
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            if one < other:
                found |= {(min(i, j), max(i, j)) for i in places[one] for j in places[other]}
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def has_near(hashes: NDArray[np.uint64], distance: int = DISTANCE) -> NDArray[np.bool_]:
    """For each hash (n,) whether another of them is at most `distance` bits away; NOTHING is near to none.

    As near_pairs says, without making the pairs: of 10,000 copies of one picture there are 50 million.
    """
    seen = np.flatnonzero(hashes != NOTHING)
    unique, home, times = np.unique(hashes[seen], return_inverse=True, return_counts=True)
    near = times > 1
    for first, second in joined(unique, unique, distance):
        near[first[first != second]] = True
    found = np.zeros(len(hashes), np.bool_)
    found[seen] = near[home]
    return found


def nearest_listed(
    hashes: NDArray[np.uint64], listed: NDArray[np.uint64], distance: int = DISTANCE
) -> NDArray[np.int64]:
    """For each hash (n,) the place in `listed` of the nearest one at most `distance` bits away, -1 where none is.

    Of several as near the first listed; NOTHING is near to none.
    """
    nearest = np.full(len(hashes), -1, np.int64)
    least = np.full(len(hashes), BITS + 1, np.int64)
    for first, second in joined(hashes, listed, distance):
        apart = np.bitwise_count(hashes[first] ^ listed[second]).astype(np.int64)
        for place, other, bits in zip(first.tolist(), second.tolist(), apart.tolist(), strict=True):
            if hashes[place] != NOTHING and (bits, other) < (least[place], nearest[place]):
                least[place], nearest[place] = bits, other
    return nearest


def components(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """For each of `count` places the lowest place that a chain of pairs leads to."""
    lowest = np.arange(count)

    def root(place: int) -> int:
        while lowest[place] != place:
            lowest[place] = lowest[lowest[place]]
            place = int(lowest[place])
        return place

    for first, second in pairs.tolist():
        one, other = root(first), root(second)
        lowest[max(one, other)] = min(one, other)
    return np.array([root(place) for place in range(count)], np.int64)


def joined(
    hashes: NDArray[np.uint64], others: NDArray[np.uint64], distance: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places (i, j) with hashes[i] and others[j] at most `distance` bits apart, block by block; a pair may come again.

    The 64 bits are cut into distance + 1 bands: two words that differ in `distance` bits or fewer agree in one band at
    least, so that only words of one band's bucket need be compared (the pigeonhole principle).
    """
    for low, high in bands(distance + 1):
        mask = np.uint64((1 << (high - low)) - 1)
        keys, other_keys = (hashes >> np.uint64(low)) & mask, (others >> np.uint64(low)) & mask
        order, other_order = np.argsort(keys, kind="stable"), np.argsort(other_keys, kind="stable")
        shared = np.intersect1d(keys, other_keys)
        starts, stops = (np.searchsorted(keys[order], shared, side=side) for side in ("left", "right"))
        froms, tos = (np.searchsorted(other_keys[other_order], shared, side=side) for side in ("left", "right"))
        single = (stops - starts == 1) & (tos - froms == 1)     # nearly all buckets of a large set: compared in one go
        first, second = order[starts[single]], other_order[froms[single]]
        near = np.bitwise_count(hashes[first] ^ others[second]) <= distance
        yield first[near], second[near]
        for start, stop, from_, to in zip(*(edges[~single].tolist() for edges in (starts, stops, froms, tos)), strict=True):
            second = other_order[from_:to]
            step = max(1, BLOCK // len(second))
            for begin in range(start, stop, step):
                first = order[begin : min(begin + step, stop)]
                rows, columns = np.nonzero(np.bitwise_count(hashes[first][:, None] ^ others[second][None, :]) <= distance)
                if len(rows):
                    yield first[rows], second[columns]


def bands(count: int) -> Sequence[tuple[int, int]]:
    """`count` bands of the 64 bits as (low, high), widths differing by one bit at most."""
    edges = [number * BITS // count for number in range(count + 1)]
    return list(itertools.pairwise(edges))
