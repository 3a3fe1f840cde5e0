"""The DALI graphs on pictures whose answer is known, and against Pillow."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from pipelines import graph
from pipelines.after_crop import after_crop
from pipelines.colour import Colour
from pipelines.loader import TestLoader, columns_of
from pipelines.manifest import Pictures
from pipelines.plan import Views, centre_views

NO_COLOUR = Colour(mean=np.zeros(3), deviation=np.ones(3), axes=np.eye(3), eigenvalues=np.zeros(3))


def save(folder: Path, pixels: NDArray[np.uint8], name: str = "picture.png", **options) -> Pictures:
    """One picture in a file, as the manifest would list it."""
    Image.fromarray(pixels).save(folder / name, **options)
    return listed(folder, name, pixels.shape[:2])


def listed(folder: Path, name: str, size: tuple[int, int]) -> Pictures:
    return Pictures(
        root=folder,
        paths=np.array([name], object),
        labels=np.zeros(1, np.int64),
        heights=np.array([size[0]], np.int64),
        widths=np.array([size[1]], np.int64),
        contents=np.array([""], object),
    )


def view(pictures: Pictures, scale: int, crop: int, *, y: int, x: int, mirror: bool = False, shift=(0, 0, 0)) -> Views:
    """One view by hand: the crop at (y, x) of the picture rescaled to shorter side `scale`."""
    return replace(
        centre_views(pictures, np.array([0]), scale, crop),
        offset_y=np.array([y]),
        offset_x=np.array([x]),
        mirror=np.array([mirror], np.int32),
        shift=np.array([shift], np.float64),
    )


def shown(pictures: Pictures, rows: Views, mean=(0, 0, 0), deviation=None) -> NDArray[np.float32]:
    """What the training graph makes of one view: (crop, crop, 3)."""
    columns = columns_of(pictures, rows, np.array(mean, np.float64))

    def source(info):
        if info.iteration > 0:
            raise StopIteration
        return tuple(columns[name] for name in graph.VIEW_COLUMNS)

    pipeline = graph.build(graph.train_graph, source, "cpu", batch=1, threads=1, crop=rows.crop, deviation=deviation)
    images = after_crop(torch.from_numpy(np.array(pipeline.run()[0].as_array())), rows).numpy()
    assert images.shape == (1, 3, rows.crop, rows.crop)
    assert images.dtype == np.float32
    return images[0].transpose(1, 2, 0)


def by_pillow(picture: Image.Image, rows: Views) -> NDArray[np.float32]:
    """The same view by Pillow: rescaled whole, then cropped, then mirrored."""
    rescaled = picture.convert("RGB").resize((int(rows.scaled_w[0]), int(rows.scaled_h[0])), Image.Resampling.BILINEAR)
    y, x = int(rows.offset_y[0]), int(rows.offset_x[0])
    crop = np.asarray(rescaled, np.float32)[y : y + rows.crop, x : x + rows.crop]
    return crop[:, ::-1] if rows.mirror[0] else crop


def test_a_solid_colour_stays_that_colour_less_the_mean(tmp_path):
    pictures = save(tmp_path, np.full((90, 120, 3), (200, 100, 50), np.uint8), "Grün & 緑, 1.png")

    image = shown(pictures, view(pictures, 72, 64, y=5, x=20), mean=(120.5, 110, 100.25))

    assert np.array_equal(image, np.broadcast_to(np.float32([79.5, -10, -50.25]), (64, 64, 3)))


def test_standardise_divides_by_each_channels_deviation(tmp_path):
    pictures = save(tmp_path, np.full((90, 120, 3), (200, 100, 50), np.uint8))

    image = shown(pictures, view(pictures, 72, 64, y=5, x=20), mean=(120, 110, 100), deviation=[40.0, 20.0, 10.0])

    np.testing.assert_allclose(image, np.broadcast_to(np.float32([2, -0.5, -5]), (64, 64, 3)), atol=1e-6)


def test_ramps_show_which_window_was_taken(tmp_path):
    rows, columns = np.mgrid[0:256, 0:512]
    pictures = save(tmp_path, np.stack([columns // 2, rows, np.zeros_like(rows)], axis=2).astype(np.uint8))

    image = shown(pictures, view(pictures, 128, 64, y=10, x=150))  # halved: pixel j shows 2j and 2j + 1

    place = np.arange(64)
    np.testing.assert_allclose(image[:, :, 0], np.broadcast_to(150 + place + 0.25, (64, 64)), atol=1)
    np.testing.assert_allclose(image[:, :, 1], np.broadcast_to((2 * (10 + place) + 0.5)[:, None], (64, 64)), atol=1)


@pytest.mark.parametrize(("corner", "y", "x"), [("upper left", 0, 0), ("lower right", 8, 32)])
def test_a_bright_corner_is_where_it_was_and_mirrored_where_it_was_not(tmp_path, corner, y, x):
    pixels = np.zeros((144, 192, 3), np.uint8)
    pixels[:16, :16] = 255
    pixels[-16:, -16:] = 255
    pictures = save(tmp_path, pixels)

    image, mirrored = (shown(pictures, view(pictures, 72, 64, y=y, x=x, mirror=mirror)) for mirror in (False, True))

    bright = np.argwhere(image[:, :, 0] > 250)
    expected = range(8) if corner == "upper left" else range(56, 64)  # 16 source pixels are 8 at half the size
    assert set(bright[:, 0]) <= set(expected) and set(bright[:, 1]) <= set(expected) and len(bright) >= 49
    assert np.array_equal(mirrored, image[:, ::-1])
    assert not np.array_equal(mirrored, image)


@pytest.mark.parametrize(
    ("mirror", "upside_down", "turns", "corner"),
    [
        (0, 0, 0, "upper left"),
        (1, 0, 0, "upper right"),
        (0, 1, 0, "lower left"),
        (1, 1, 0, "lower right"),
        (0, 0, 1, "lower left"),  # counterclockwise
        (0, 0, 2, "lower right"),
        (0, 0, 3, "upper right"),
        (1, 0, 1, "upper left"),  # mirrored first
        (0, 1, 1, "lower right"),
        (0, 1, 2, "upper right"),
        (1, 1, 3, "lower left"),
    ],
)
def test_a_bright_corner_goes_where_flips_and_quarter_turns_take_it(tmp_path, mirror, upside_down, turns, corner):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:8, :4] = 255  # so that a turn is told from a flip
    pictures = save(tmp_path, pixels)
    rows = replace(
        view(pictures, 64, 64, y=0, x=0, mirror=mirror), upside_down=np.array([upside_down]), turns=np.array([turns])
    )

    image = shown(pictures, rows)

    high, wide = (4, 8) if turns % 2 else (8, 4)
    expected = np.zeros((64, 64, 3), np.float32)
    down, right = corner.split()
    vertical = slice(high) if down == "upper" else slice(-high, None)
    expected[vertical, slice(wide) if right == "left" else slice(-wide, None)] = 255
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("size", [(90, 120), (120, 90), (7, 7), (1, 5000), (5000, 1), (64, 64)])
def test_a_whole_view_is_the_picture_squeezed_to_a_square_as_pillow_does_it(tmp_path, size):
    large = Image.fromarray(load_sample_image("china.jpg")).resize(size[::-1], Image.Resampling.BICUBIC)
    pictures = save(tmp_path, np.asarray(large))
    rows = centre_views(pictures, np.array([0]), 64, 64, "whole")

    difference = np.abs(shown(pictures, rows) - by_pillow(large, rows))

    assert difference[2:-2, 2:-2].max() <= 1
    assert np.mean(difference > 1) < 0.03  # at the edge DALI clamps where Pillow renormalises


@pytest.mark.parametrize(
    ("size", "region"),
    [
        ((427, 640), (100, 40, 222, 333)),
        ((427, 640), (0, 0, 427, 640)),
        ((427, 640), (380, 600, 47, 40)),
        ((427, 640), (13, 17, 9, 120)),
        ((427, 640), (200, 300, 1, 1)),
        ((7, 7), (2, 3, 4, 2)),
        ((1, 5000), (0, 777, 1, 3000)),
        ((5000, 1), (4000, 0, 1000, 1)),
    ],
)
def test_a_random_resized_crop_is_pillows_resize_of_that_box(tmp_path, size, region):
    large = Image.fromarray(load_sample_image("china.jpg")).resize(size[::-1], Image.Resampling.BICUBIC)
    pictures = save(tmp_path, np.asarray(large))
    top, left, high, wide = region
    rows = replace(centre_views(pictures, np.array([0]), 64, 64, "whole"), region=np.array([region]))

    image = shown(pictures, rows)

    expected = large.resize((64, 64), Image.Resampling.BILINEAR, box=(left, top, left + wide, top + high))
    difference = np.abs(image - np.asarray(expected, np.float32))
    assert difference[2:-2, 2:-2].max() <= 1
    assert np.mean(difference > 1) < 0.03  # where a region touches the picture's edge DALI clamps and Pillow renormalises


def test_a_region_of_ramps_shows_where_it_lies(tmp_path):
    rows, columns = np.mgrid[0:128, 0:256]
    pictures = save(tmp_path, np.stack([columns, 2 * rows, np.zeros_like(rows)], axis=2).astype(np.uint8))
    squeezed = centre_views(pictures, np.array([0]), 64, 64, "whole")

    image = shown(pictures, replace(squeezed, region=np.array([[20, 90, 32, 128]])))

    place = np.arange(64)
    np.testing.assert_allclose(image[:, :, 0], np.broadcast_to(90 + 2 * place + 0.5, (64, 64)), atol=1)
    np.testing.assert_allclose(image[:, :, 1], np.broadcast_to((40 + place - 0.5)[:, None], (64, 64)), atol=1)


def test_an_erased_rectangle_is_the_mean_and_lies_where_the_plan_has_it(tmp_path):
    pictures = save(tmp_path, np.full((64, 64, 3), 200, np.uint8))
    rows = replace(view(pictures, 64, 64, y=0, x=0, shift=(3, 2, 1)), erased=np.array([[5, 10, 20, 30]]))

    image = shown(pictures, replace(rows, turns=np.array([1]), upside_down=np.array([1])), mean=(120, 110, 100))

    expected = np.broadcast_to(np.float32([83, 92, 101]), (64, 64, 3)).copy()
    expected[5:25, 10:40] = 0  # after flips and turns, and whatever the colour shift
    assert np.array_equal(image, expected)


def test_a_whole_view_of_ramps_shows_both_sides_to_their_ends(tmp_path):
    rows, columns = np.mgrid[0:128, 0:256]
    pictures = save(tmp_path, np.stack([columns, 2 * rows, np.zeros_like(rows)], axis=2).astype(np.uint8))

    image = shown(pictures, centre_views(pictures, np.array([0]), 64, 64, "whole"))

    place = np.arange(64)
    np.testing.assert_allclose(image[2:-2, 2:-2, 0], np.broadcast_to(4 * place + 1.5, (64, 64))[2:-2, 2:-2], atol=1)
    np.testing.assert_allclose(image[2:-2, 2:-2, 1], np.broadcast_to((4 * place + 1)[:, None], (64, 64))[2:-2, 2:-2], atol=1)


def test_squeezed_test_views_are_the_middle_of_the_squeezed_picture(tmp_path):
    pictures = save(tmp_path, load_sample_image("flower.jpg"))  # 427 x 640
    loader = TestLoader(pictures, NO_COLOUR, standardise=False, device="cpu", threads=1, view="whole")
    squeezed = Image.open(tmp_path / "picture.png").resize((96, 96), Image.Resampling.BILINEAR)

    whole, _, _ = next(loader.whole(96, 4))
    centre, _, _ = next(loader.centre(96, 64, 4))
    exact, _, _ = next(loader.centre(96, 96, 4))

    assert whole.shape == exact.shape == (1, 3, 96, 96)
    difference = np.abs(whole[0].numpy().transpose(1, 2, 0) - np.asarray(squeezed, np.float32))
    assert difference[2:-2, 2:-2].max() <= 1
    assert np.abs(whole[:, :, 16:80, 16:80].numpy() - centre.numpy()).max() <= 1
    assert (whole - exact).abs().max() <= 1


def test_the_colour_shift_is_added_to_every_pixel(tmp_path):
    pictures = save(tmp_path, load_sample_image("china.jpg"))
    plain, shifted = (view(pictures, 256, 224, y=11, x=70, shift=shift) for shift in ((0, 0, 0), (3.5, -2.25, 0.125)))

    difference = shown(pictures, shifted) - shown(pictures, plain)

    assert np.array_equal(difference, np.broadcast_to(np.float32([3.5, -2.25, 0.125]), (224, 224, 3)))


@pytest.mark.parametrize("name", ["picture.png", "picture.jpg"])
@pytest.mark.parametrize(
    ("scale", "crop", "y", "x"),
    [(256, 224, 13, 101), (384, 224, 60, 200), (72, 64, 5, 17), (128, 64, 30, 90), (640, 224, 9, 5)],
)
def test_pixels_are_pillows_within_one_level(tmp_path, name, scale, crop, y, x):
    pictures = save(tmp_path, load_sample_image("china.jpg"), name)  # 427 x 640
    rows = view(pictures, scale, crop, y=y, x=x, mirror=True)

    difference = np.abs(shown(pictures, rows) - by_pillow(Image.open(tmp_path / name), rows))

    assert difference.max() <= 1
    assert difference.mean() < 0.2


@pytest.mark.parametrize(("y", "x"), [(0, 0), (8, 44)])
def test_at_a_pictures_border_few_pixels_differ_from_pillows(tmp_path, y, x):
    pictures = save(tmp_path, load_sample_image("china.jpg"))
    rows = view(pictures, 72, 64, y=y, x=x)

    difference = np.abs(shown(pictures, rows) - by_pillow(Image.open(tmp_path / "picture.png"), rows))

    assert difference[2:-2, 2:-2].max() <= 1  # at the edge itself DALI clamps where Pillow renormalises
    assert difference.max() <= 20
    assert np.mean(difference > 1) < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_cut_as_it_is_seen(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path, load_sample_image("china.jpg"), "turned.jpg", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg"))
    pictures = listed(tmp_path, "turned.jpg", (upright.height, upright.width))
    rows = view(pictures, 96, 64, y=20, x=30)

    difference = np.abs(shown(pictures, rows) - by_pillow(upright, rows))

    assert difference.max() <= 1


def test_a_grey_picture_has_three_equal_channels(tmp_path):
    grey = (np.arange(100 * 110).reshape(100, 110) % 251).astype(np.uint8)
    pictures = save(tmp_path, grey)

    image = shown(pictures, view(pictures, 100, 96, y=2, x=3))

    for channel in range(3):
        assert np.array_equal(image[:, :, channel], grey[2:98, 3:99])


def test_grey_of_16_bits_is_rounded_to_8(tmp_path):
    grey = (np.arange(100 * 110).reshape(100, 110) * 17 % 65536).astype(np.uint16)
    pictures = save(tmp_path, grey)

    image = shown(pictures, view(pictures, 100, 96, y=2, x=3))

    for channel in range(3):
        assert np.array_equal(image[:, :, channel], np.floor(grey[2:98, 3:99] / 257 + 0.5))


def test_a_centre_crop_is_the_middle_of_the_whole_picture(tmp_path):
    pictures = save(tmp_path, load_sample_image("flower.jpg"))  # 427 x 640
    loader = TestLoader(pictures, NO_COLOUR, standardise=False, device="cpu", threads=1)

    whole, _, _ = next(loader.whole(256, 4))
    centre, _, _ = next(loader.centre(256, 224, 4))

    assert whole.shape == (1, 3, 256, 384)
    difference = np.abs(whole[:, :, 16:240, 80:304].numpy() - centre.numpy())
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.001


def test_a_whole_picture_is_pillows_within_one_level(tmp_path):
    pictures = save(tmp_path, load_sample_image("flower.jpg"))
    colour = replace(NO_COLOUR, mean=np.array([120.0, 110.0, 100.0]))

    whole, _, _ = next(TestLoader(pictures, colour, standardise=False, device="cpu", threads=1).whole(96, 4))

    expected = np.asarray(Image.open(tmp_path / "picture.png").resize((144, 96), Image.Resampling.BILINEAR), np.float32)
    difference = np.abs(whole[0].numpy().transpose(1, 2, 0) + np.float32([120, 110, 100]) - expected)
    assert difference[2:-2, 2:-2].max() <= 1
    assert np.mean(difference > 1) < 0.01


def test_a_picture_with_an_alpha_channel_is_read_without_it(tmp_path):
    pictures = save(tmp_path, np.full((80, 80, 4), (10, 200, 30, 128), np.uint8))

    image = shown(pictures, view(pictures, 72, 64, y=0, x=0))

    assert np.array_equal(image, np.broadcast_to(np.float32([10, 200, 30]), (64, 64, 3)))
