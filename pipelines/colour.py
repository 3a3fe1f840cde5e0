"""The training pictures' colours: mean RGB, deviation, and the axes along which Sec. 3.1's colour shift moves."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Exact sums over a picture's pixels on 0..255: of each channel, and of each product of two channels.
SUMS = ("sum_r", "sum_g", "sum_b", "sum_rr", "sum_rg", "sum_rb", "sum_gg", "sum_gb", "sum_bb")
BLOCK = 1 << 20  # pixels at a time: bounds the memory that a large picture's floats need


@dataclass(frozen=True)
class Colour:
    """What the graphs subtract, divide by and shift along; all float64, channels in the order R, G, B.

    mean (3,): 0..255. deviation (3,): 0..255. axes (3, 3): columns are the eigenvectors of the covariance of pixels on
    0..1, that of the largest eigenvalue first. eigenvalues (3,): never negative; 0 twice for grey pictures.
    """

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    axes: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        """As plain lists; floats read back equal."""
        return {name: getattr(self, name).tolist() for name in ("mean", "deviation", "axes", "eigenvalues")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Colour":
        """What to_json wrote."""
        return cls(**{name: np.array(value, np.float64) for name, value in values.items()})


def pixel_sums(pixels: NDArray[np.uint8]) -> tuple[int, ...]:
    """The nine SUMS of one picture (height, width, 3), exact.

    Products are at most 255 squared, so that float64 holds every partial sum of up to 1e11 pixels without rounding, and
    the order in which BLAS adds does not matter.
    """
    flat = pixels.reshape(-1, 3)
    total = np.zeros((4, 4))
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK]
        rows = np.ones((4, len(part)))
        rows[:3] = part.T
        total += rows @ rows.T
    places = ((0, 3), (1, 3), (2, 3), (0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))  # in the order of SUMS
    return tuple(int(total[place]) for place in places)


def measure_colour(sums: ArrayLike, pixels: ArrayLike) -> Colour:
    """The colours of the pictures whose nine SUMS are the rows of `sums` (n, 9) and pixel counts `pixels` (n,); n >= 1.

    Each picture counts once, whatever its size, since each gives one view an epoch. Additions are correctly rounded
    (fsum) and the eigenvectors are found with sums, products and square roots alone: the same result on every machine.
    """
    shares = np.asarray(sums, np.float64) / np.asarray(pixels, np.float64)[:, None]
    red, green, blue, rr, rg, rb, gg, gb, bb = (math.fsum(column.tolist()) / len(shares) for column in shares.T)
    mean = np.array([red, green, blue])
    moments = np.array([[rr, rg, rb], [rg, gg, gb], [rb, gb, bb]])
    covariance = (moments - mean[:, None] * mean[None, :]) / 255.0**2
    eigenvalues, axes = eigen(covariance)
    eigenvalues[eigenvalues < 1e-12 * max(eigenvalues[0], 1e-9)] = 0.0  # rounding: grey pictures have rank 1
    deviation = 255.0 * np.sqrt(np.clip(np.diagonal(covariance), 0.0, None))
    return Colour(mean=mean, deviation=deviation, axes=axes, eigenvalues=eigenvalues)


def eigen(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues (3,), largest first, and eigenvectors (3, 3), as columns, of a symmetric matrix: Jacobi's rotations.

    LAPACK's last bits and signs depend on the machine's SIMD; these do not. Each column's largest entry is positive.
    """
    a = [[float(value) for value in row] for row in matrix]
    v = [[float(row == column) for column in range(3)] for row in range(3)]
    for _sweep in range(30):  # converges quadratically; 3x3 needs about 5
        if a[0][1] == a[0][2] == a[1][2] == 0.0:
            break
        for p, q in ((0, 1), (0, 2), (1, 2)):
            if abs(a[p][q]) <= 1e-17 * math.sqrt(abs(a[p][p] * a[q][q])):
                a[p][q] = a[q][p] = 0.0
                continue
            theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q])
            t = math.copysign(1.0, theta) / (abs(theta) + math.sqrt(theta * theta + 1.0))
            cosine = 1.0 / math.sqrt(t * t + 1.0)
            sine = t * cosine
            for k in range(3):
                a[k][p], a[k][q] = cosine * a[k][p] - sine * a[k][q], sine * a[k][p] + cosine * a[k][q]
            for k in range(3):
                a[p][k], a[q][k] = cosine * a[p][k] - sine * a[q][k], sine * a[p][k] + cosine * a[q][k]
                v[k][p], v[k][q] = cosine * v[k][p] - sine * v[k][q], sine * v[k][p] + cosine * v[k][q]
    order = sorted(range(3), key=lambda k: -a[k][k])
    columns = []
    for k in order:
        column = [v[row][k] for row in range(3)]
        largest = max(abs(value) for value in column)
        leading = next(value for value in column if abs(value) > largest - 1e-6)  # grey: all equal but for noise
        columns.append([math.copysign(1.0, leading) * value for value in column])
    return np.array([a[k][k] for k in order]), np.array(columns).T.copy()
