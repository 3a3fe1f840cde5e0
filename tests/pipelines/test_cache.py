"""The decoded cache: what comes out of it is what comes out of the files, bit by bit; it is bounded, whole, and made once."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.cache import INDEX, PIXELS, cache_folder, make_cache, open_cache
from pipelines.loader import TestLoader, TrainLoader
from pipelines.manifest import Manifest
from pipelines.plan import ViewRule
from pipelines.scan import scan
from tests.pipelines.photo_folders import make_photo_folder, photographs
from vggcore.errors import DatasetError
from vggcore.recipe import Data

RULE = ViewRule(seed=7, net="A", scale=(40, 72), crop=32, flip=True, colour=0.1, global_batch=7)
GIB = 2**30


def colour_photos(folder: Path) -> Path:
    """JPEGs of many sizes, one lying on its side by EXIF, one a copy of another, a CMYK one and a PNG with alpha."""
    make_photo_folder(folder, per_class=8, split=True, size=(40, 90))
    cat = photographs()["cat"].resize((80, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    cat.save(folder / "train" / "cat" / "turned.jpg", exif=exif)
    cat.convert("CMYK").save(folder / "train" / "cat" / "print.jpg")
    cat.convert("RGBA").save(folder / "train" / "cat" / "alpha.png")
    (folder / "train" / "cat" / "copy.jpg").write_bytes((folder / "train" / "cat" / "cat-000.jpg").read_bytes())
    return folder


def grey_photos(folder: Path) -> Path:
    """Grey PNGs: 8 bit, 16 bit, and one that says RGB and has no colour."""
    for split, few in (("train", 9), ("val", 3), ("test", 3)):
        for name, photograph in photographs().items():
            (folder / split / name).mkdir(parents=True)
            for number in range(few):
                piece = photograph.convert("L").crop((10 * number, 5 * number, 10 * number + 90, 5 * number + 70 + number))
                if number % 3 == 1:
                    piece = Image.fromarray(np.asarray(piece).astype(np.uint16) * 257 + number)
                piece = piece.convert("RGB") if number % 3 == 2 else piece
                piece.save(folder / split / name / f"{split}-{number}.png")
    return folder


@pytest.fixture(params=[colour_photos, grey_photos])
def manifest(request, tmp_path) -> Manifest:
    return scan(Data(root=request.param(tmp_path / "photos")), tmp_path / "store", threads=1)


def made(manifest: Manifest, store: Path, budget: int = GIB):
    return make_cache(manifest, store, budget_bytes=budget, threads=1, say=lambda words: None)


def test_every_training_view_is_the_same_to_the_last_bit(manifest, tmp_path):
    cache = made(manifest, tmp_path / "store")
    assert cache.channels == (1 if "print.jpg" not in str(manifest.table["path"].to_pylist()) else 3)
    for rank, world_size, first in ((0, 1, 0), (1, 3, 2)):
        both = []
        for source in (None, cache):
            loader = TrainLoader(
                manifest.split("train"), manifest.colour, RULE,
                standardise=True, rank=rank, world_size=world_size, device="cpu", threads=1, cache=source,
            )  # fmt: skip
            both.append([batch for epoch in (0, 1) for batch in loader.epoch(epoch, first)])
            loader.close()

        assert len(both[0]) >= 4
        for plain, cached in zip(*both, strict=True):
            assert torch.equal(plain.images, cached.images) and torch.equal(plain.labels, cached.labels)
            assert torch.equal(plain.rows, cached.rows)


def test_every_test_view_is_the_same_to_the_last_bit(manifest, tmp_path):
    cache = made(manifest, tmp_path / "store")
    loaders = [
        TestLoader(manifest.split("test"), manifest.colour, standardise=False, device="cpu", threads=1, cache=source)
        for source in (None, cache)
    ]

    for kind, more in (("centre", (40, 32, 4)), ("whole", (40, 4))):
        plain, cached = (list(getattr(loader, kind)(*more)) for loader in loaders)
        assert len(plain) > 1
        for one, other in zip(plain, cached, strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_a_set_larger_than_the_budget_has_no_cache_and_others_make_room(tmp_path):
    store = tmp_path / "store"
    first = scan(Data(root=make_photo_folder(tmp_path / "a", per_class=6, split=True)), store, threads=1)
    second = scan(Data(root=make_photo_folder(tmp_path / "b", per_class=6, split=True, seed=5)), store, threads=1)

    assert made(first, store, budget=100) is None and not (cache_folder(store, first.fingerprint) / PIXELS).exists()
    held = made(first, store)
    size = held.pixels.size
    pixels = held.picture(0).copy()
    assert made(second, store, budget=int(1.5 * size)) is not None

    assert open_cache(cache_folder(store, first.fingerprint)) is None
    assert np.array_equal(held.picture(0), pixels)                      # who has it mapped keeps it


def test_a_cache_that_is_not_whole_is_made_again(manifest, tmp_path):
    folder = cache_folder(tmp_path / "store", manifest.fingerprint)
    whole = made(manifest, tmp_path / "store").pixels.copy()
    for damage in (lambda: (folder / INDEX).unlink(), lambda: (folder / PIXELS).write_bytes(b"short")):
        damage()

        assert open_cache(folder) is None
        assert np.array_equal(made(manifest, tmp_path / "store").pixels, whole)


def test_several_at_once_make_one(manifest, tmp_path):
    said, found = [], []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                make_cache(manifest, tmp_path / "store", budget_bytes=GIB, threads=1, say=said.append)
            )
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(said) == 1 and all(np.array_equal(one.pixels, found[0].pixels) for one in found)


def test_a_picture_that_changed_since_the_scan_is_named(manifest, tmp_path):
    path = manifest.root / manifest.split("train").paths[3]
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(DatasetError, match=r"not the picture that was scanned any more; restore"):
        made(manifest, tmp_path / "store")
    assert open_cache(cache_folder(tmp_path / "store", manifest.fingerprint)) is None
