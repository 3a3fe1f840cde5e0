"""Near-duplicates: the difference hash of real pictures, and an index that misses no pair and invents none."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.near_duplicates import DISTANCE, NOTHING, components, difference_hash, has_near, near_pairs, nearest_listed
from tests.pipelines.photo_folders import photographs


def apart(one: int, other: int) -> int:
    """In how many bits two hashes differ."""
    return (one ^ other).bit_count()


def hash_of(picture: Image.Image) -> int:
    return difference_hash(np.asarray(picture.convert("RGB")))


def encoded(picture: Image.Image, **settings: object) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **settings)
    return Image.open(buffer)


def test_the_hash_says_where_the_picture_brightens_from_left_to_right() -> None:
    ramp = np.repeat(np.tile(np.arange(90, dtype=np.uint8), (80, 1))[:, :, None], 3, axis=2)
    half = np.concatenate([ramp[:40], ramp[40:, ::-1]])

    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(np.ascontiguousarray(ramp[:, ::-1])) == NOTHING
    assert difference_hash(half) == (2**64 - 1) ^ (2**32 - 1)


def test_cells_are_area_means_at_sizes_that_are_no_multiple_of_them() -> None:
    """A grey step inside a cell's part: only exact parts of lines tell the two sides of column 4 (of 9) apart."""
    draws = np.random.default_rng(0)
    for height, width in ((31, 47), (8, 9), (100, 61), (5, 4), (1, 1)):
        pixels = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
        fine = np.repeat(np.repeat(pixels, 8, axis=0), 9, axis=1)      # every line 8 or 9 times: parts are whole lines

        grey = (fine.astype(np.int64) @ np.array([299, 587, 114])).reshape(8, height, 9, width).sum(axis=(1, 3))
        wanted = np.packbits((grey[:, :-1] < grey[:, 1:]).ravel()).tobytes()

        assert difference_hash(pixels) == int.from_bytes(wanted, "big"), (height, width)


def test_a_picture_stored_again_smaller_or_brighter_is_near_and_another_is_far() -> None:
    pictures = photographs()
    hashes = {name: hash_of(picture) for name, picture in pictures.items()}

    for name, picture in pictures.items():
        smaller = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC)
        brighter = picture.point(lambda level: min(255, int(level * 1.1 + 5)))
        for variant in (encoded(picture, quality=50), smaller, brighter, picture.convert("L")):
            assert apart(hashes[name], hash_of(variant)) <= DISTANCE
    assert apart(hashes["cat"], hashes["coffee"]) > 10
    assert apart(hashes["cat"], hashes["flower"]) > 10


@st.composite
def some_hashes(draw: st.DrawFn) -> np.ndarray:
    """Hashes of which many are a few bits from another."""
    base = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8))
    found = list(base)
    for _ in range(draw(st.integers(0, 25))):
        word = draw(st.sampled_from(found))
        for bit in draw(st.lists(st.integers(0, 63), max_size=5)):
            word ^= 1 << bit
        found.append(word)
    return np.array(found, np.uint64)


@settings(max_examples=80, deadline=None)
@given(some_hashes(), st.integers(0, 5))
def test_the_index_finds_exactly_the_pairs_that_comparing_all_finds(hashes: np.ndarray, distance: int) -> None:
    words = hashes.tolist()
    wanted = [
        [i, j]
        for i in range(len(words))
        for j in range(i + 1, len(words))
        if apart(words[i], words[j]) <= distance and words[i] != NOTHING and words[j] != NOTHING
    ]

    assert near_pairs(hashes, distance).tolist() == wanted


@settings(max_examples=80, deadline=None)
@given(some_hashes(), some_hashes(), st.integers(0, 5))
def test_the_nearest_of_a_list_is_found_or_none_is(hashes: np.ndarray, listed: np.ndarray, distance: int) -> None:
    found = nearest_listed(hashes, listed, distance).tolist()

    for word, place in zip(hashes.tolist(), found, strict=True):
        distances = [apart(word, other) for other in listed.tolist()]
        if word == NOTHING or min(distances) > distance:
            assert place == -1
        else:
            assert place == distances.index(min(distances))


def test_pictures_in_which_there_is_nothing_to_compare_are_near_to_none() -> None:
    flat = np.array([difference_hash(np.full((20, 20, 3), grey, np.uint8)) for grey in (0, 90, 255)], np.uint64)

    assert flat.tolist() == [NOTHING] * 3
    assert near_pairs(flat).shape == (0, 2)
    assert nearest_listed(flat, flat).tolist() == [-1, -1, -1]


def test_twenty_thousand_hashes_take_a_small_part_of_all_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.random.default_rng(1).integers(1, 2**63, 20_000).astype(np.uint64) * np.uint64(2)
    hashes[16_000:] = hashes[:4_000] ^ np.uint64(0b101 << 20)
    compared, count = [], np.bitwise_count

    def counting(words: np.ndarray) -> np.ndarray:
        compared.append(words.size)
        return count(words)

    monkeypatch.setattr(np, "bitwise_count", counting)

    pairs = near_pairs(hashes)

    assert {(i, i + 16_000) for i in range(4_000)} <= set(map(tuple, pairs.tolist()))
    assert sum(compared) < 20_000**2 / 1000


def test_chains_of_pairs_are_one_component() -> None:
    assert components(np.array([[1, 2], [2, 5], [3, 4]]), 7).tolist() == [0, 1, 1, 3, 3, 1, 6]
    assert components(np.zeros((0, 2), np.int64), 2).tolist() == [0, 1]


@settings(max_examples=50, deadline=None)
@given(some_hashes(), st.integers(0, 3))
def test_who_has_a_near_duplicate_is_who_stands_in_a_pair(hashes: np.ndarray, distance: int) -> None:
    hashes = np.append(hashes, np.array([NOTHING, NOTHING, 1], np.uint64))

    found = has_near(hashes, distance)

    assert set(np.flatnonzero(found).tolist()) == set(near_pairs(hashes, distance).ravel().tolist())


def test_ten_thousand_copies_of_one_picture_are_counted_at_once() -> None:
    assert has_near(np.full(10_000, 77, np.uint64)).all()
