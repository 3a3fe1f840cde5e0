"""How pictures are cut into batches, and batches into parts: a rule of the pictures alone. Pure.

A batch has pictures of one shape at every scale, in the order of their contents, as many as fit its pixels. A short one is
filled up with zeros, so that a picture goes through the same sums whatever the others are: with workers, kills and
pictures that come later its values stay the same bits (measured: a batch of one takes other kernels than one of two).
"""

from collections.abc import Sequence

import numpy as np

from pipelines.manifest import Pictures
from pipelines.plan import Integers
from pipelines.scales import scaled_shapes

# Pixels a batch over all scales; at 96 px four pictures are as quick as sixteen, at 160 px one is (net D, measured).
BATCH_PIXELS = {"cpu": 4 * 96**2, "cuda": 2**21}
PART_PIXELS = (2**20, 2**23)      # pixels a part: seconds of work, so that little is lost; more in large sets
MOST_PARTS = 1000                 # where PART_PIXELS allows it


def batch_size(pixels: int, device: str) -> int:
    """Pictures a batch, of so many pixels each over all scales."""
    return max(1, BATCH_PIXELS["cuda" if device.startswith("cuda") else "cpu"] // pixels)


def cut(pictures: Pictures, rows: Integers, scales: Sequence[int], device: str) -> list[Integers]:
    """Batches of these rows of the pictures: grouped by shape, in the order of their contents."""
    shapes = scaled_shapes(pictures, scales).reshape(len(pictures), -1)
    contents = pictures.contents.astype(str)
    order = rows[np.lexsort((contents[rows], *shapes[rows].T[::-1]))]
    batches = []
    for shape in np.unique(shapes[order], axis=0):
        group = order[(shapes[order] == shape).all(axis=1)]
        size = batch_size(pixels_of(shape), device)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def pixels_of(shape: Integers) -> int:
    """Pixels a picture over all scales; shape: h, w at each scale in turn."""
    return int((shape[0::2] * shape[1::2]).sum())


def into_parts(pictures: Pictures, batches: Sequence[Integers], scales: Sequence[int]) -> list[list[Integers]]:
    """Consecutive batches as parts: what one task computes and writes as one file."""
    shapes = scaled_shapes(pictures, scales).reshape(len(pictures), -1)
    pixels = [len(batch) * pixels_of(shapes[batch[0]]) for batch in batches]
    least, most = PART_PIXELS
    full = min(max(sum(pixels) // MOST_PARTS, least), most)
    parts: list[list[Integers]] = []
    taken = full
    for batch, size in zip(batches, pixels, strict=True):
        if taken >= full:
            parts.append([])
            taken = 0
        parts[-1].append(batch)
        taken += size
    return parts
