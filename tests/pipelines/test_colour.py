"""The training pictures' colours: exact sums, and axes that are the same everywhere."""

import json

import numpy as np
import pytest

from pipelines.colour import Colour, eigen, measure_colour, pixel_sums

RNG = np.random.default_rng(0)


def test_the_sums_of_a_picture_are_exact_also_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = RNG.integers(0, 256, (37, 53, 3), np.uint8)
    monkeypatch.setattr("pipelines.colour.BLOCK", 1000)  # 1,961 pixels: two blocks

    sums = pixel_sums(pixels)

    r, g, b = pixels.reshape(-1, 3).astype(np.int64).T
    assert sums == tuple(int(part.sum()) for part in (r, g, b, r * r, r * g, r * b, g * g, g * b, b * b))


def test_a_pale_picture_as_large_as_a_camera_gives_has_exact_sums() -> None:
    pixels = np.full((3000, 4000, 3), 251, np.uint8)

    sums = pixel_sums(pixels)

    assert sums == (251 * 12_000_000,) * 3 + (251 * 251 * 12_000_000,) * 6


def test_each_picture_counts_once_whatever_its_size() -> None:
    small, large = np.full((10, 10, 3), (255, 0, 100), np.uint8), np.full((100, 90, 3), (0, 255, 200), np.uint8)

    colour = measure_colour([pixel_sums(small), pixel_sums(large)], [100, 9000])

    assert colour.mean == pytest.approx([127.5, 127.5, 150.0])
    assert colour.deviation == pytest.approx([127.5, 127.5, 50.0])


def test_the_axes_are_those_of_the_covariance_on_0_to_1() -> None:
    pictures = [RNG.integers(low, 256, (20, 30, 3), np.uint8) for low in (0, 100, 200)]

    colour = measure_colour([pixel_sums(picture) for picture in pictures], [600] * 3)

    flat = np.concatenate([picture.reshape(-1, 3) for picture in pictures]) / 255.0
    covariance = np.cov(flat.T, bias=True)
    assert colour.mean == pytest.approx(flat.mean(0) * 255)
    assert colour.deviation == pytest.approx(flat.std(0) * 255)
    assert colour.axes @ np.diag(colour.eigenvalues) @ colour.axes.T == pytest.approx(covariance)
    assert colour.axes.T @ colour.axes == pytest.approx(np.eye(3))
    assert list(colour.eigenvalues) == sorted(colour.eigenvalues, reverse=True)


def test_the_eigenvectors_agree_with_lapack_and_each_points_where_its_largest_entry_is_positive() -> None:
    for _ in range(50):
        root = RNG.normal(size=(3, 3))

        values, axes = eigen(root @ root.T)

        wanted_values, wanted_axes = np.linalg.eigh(root @ root.T)
        assert values == pytest.approx(wanted_values[::-1], rel=1e-9, abs=1e-12)
        assert np.abs((axes * wanted_axes[:, ::-1]).sum(0)) == pytest.approx(np.ones(3))
        assert (np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0) > 0).all()


def test_grey_pictures_have_one_axis_along_grey_and_no_other_strength() -> None:
    for _ in range(30):  # the rounding that must not become a strength differs from picture to picture
        grey = np.repeat(RNG.integers(0, 256, (40, 40, 1), np.uint8), 3, axis=2)

        colour = measure_colour([pixel_sums(grey)], [1600])

        assert colour.axes[:, 0] == pytest.approx(np.full(3, 3**-0.5))
        assert colour.eigenvalues[0] == pytest.approx(3 * (grey[..., 0] / 255.0).var())
        assert list(colour.eigenvalues[1:]) == [0.0, 0.0]


def test_pictures_of_one_colour_have_no_deviation_and_no_strengths() -> None:
    flat = np.full((7, 9, 3), (10, 20, 30), np.uint8)

    colour = measure_colour([pixel_sums(flat)] * 3, [63] * 3)

    assert colour.mean == pytest.approx([10, 20, 30])
    assert colour.deviation == pytest.approx([0, 0, 0], abs=1e-4)
    assert colour.eigenvalues == pytest.approx([0, 0, 0], abs=1e-12)
    assert (colour.eigenvalues >= 0).all()


def test_the_order_of_the_pictures_changes_no_bit() -> None:
    sums = np.array([pixel_sums(RNG.integers(0, 256, (5, 5, 3), np.uint8)) for _ in range(200)])
    shuffled = RNG.permutation(200)

    first, second = measure_colour(sums, [25] * 200), measure_colour(sums[shuffled], [25] * 200)

    assert first.to_json() == second.to_json()


def test_json_gives_the_same_colour_back() -> None:
    colour = measure_colour([pixel_sums(RNG.integers(0, 256, (5, 5, 3), np.uint8))], [25])

    back = Colour.from_json(json.loads(json.dumps(colour.to_json())))

    for name in ("mean", "deviation", "axes", "eigenvalues"):
        assert np.array_equal(getattr(back, name), getattr(colour, name))
