"""The draws that the paper does not have: random-resized crops, erased rectangles, mixup's weights.

Each is a pure function of a hash and of places, (N,), as all of plan.py. Sizes go through sqrt, which IEEE 754 rounds
correctly everywhere, aspects and weights through tables of whole numbers (quantiles.py); no pow, exp or log of floats.
"""

import numpy as np
from numpy.typing import NDArray

from pipelines.quantiles import STEPS, UNIT, log_uniform, symmetric_beta
from vggcore.counter_hash import uniforms

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Key = NDArray[np.uint64]

ERASED_AREA = (0.02, 0.33)     # of the crop, as torchvision has it (Zhong et al. 2020: up to 0.4)
ERASED_ASPECT = (0.3, 3.3)     # width to height, as both have it


def whole(draws: Floats) -> Integers:
    """Draws >= 0, rounded down."""
    return np.floor(draws).astype(np.int64)


def entries(table: Integers, key: Key, places: Integers, word: str) -> Floats:
    """An entry of a table of quantiles for each place, (N,)."""
    return table[whole(uniforms(key, places, word) * STEPS)] / UNIT


def rectangles(
    share: Floats, aspect: Floats, height: Integers, width: Integers, y: Floats, x: Floats
) -> Integers:
    """Rectangles within height x width, (N, 4): top, left, height, width, whole pixels, 1 at least.

    share: of the area, 0..1; aspect: width to height; y, x: uniform draws of where it lies. A side that would be longer
    than the whole's is the whole's, the other one stays: where torchvision draws again, up to ten times, nothing is.
    """
    pixels = share * (height * width)
    high = np.clip(whole(np.sqrt(pixels / aspect) + 0.5), 1, height)
    wide = np.clip(whole(np.sqrt(pixels * aspect) + 0.5), 1, width)
    return np.stack([whole(y * (height - high + 1)), whole(x * (width - wide + 1)), high, wide], axis=1)


def random_regions(
    area: tuple[float, float], aspect: tuple[float, float], key: Key, places: Integers, height: Integers, width: Integers
) -> Integers:
    """The part of each picture that becomes the crop, (N, 4) as `rectangles` (Szegedy et al. 2015).

    area, aspect: [low, high]; the share is uniform, the aspect's logarithm too. height, width: (N,) of the pictures.
    """
    low, high = area
    return rectangles(
        low + uniforms(key, places, "area") * (high - low),
        entries(log_uniform(*aspect), key, places, "aspect"),
        height,
        width,
        uniforms(key, places, "area_y"),
        uniforms(key, places, "area_x"),
    )


def erased_rectangles(probability: float, crop: int, key: Key, places: Integers) -> Integers:
    """What of each crop is erased, (N, 4) as `rectangles`; all 0 for a view that keeps its pixels (Zhong et al. 2020)."""
    low, high = ERASED_AREA
    side = np.full(len(places), crop, np.int64)
    found = rectangles(
        low + uniforms(key, places, "erase_area") * (high - low),
        entries(log_uniform(*ERASED_ASPECT), key, places, "erase_aspect"),
        side,
        side,
        uniforms(key, places, "erase_y"),
        uniforms(key, places, "erase_x"),
    )
    return found * (uniforms(key, places, "erase") < probability)[:, np.newaxis]


def mix_weights(alpha: float, key: Key, places: Integers) -> NDArray[np.float32]:
    """Weights from Beta(alpha, alpha), (N,) multiples of 1 / UNIT in 0..1 (Zhang et al. 2018)."""
    return entries(symmetric_beta(alpha), key, places, "weight").astype(np.float32)
