"""The loaders end to end: the same pictures, seen the same way, for any number of workers; and pictures that break."""

import hashlib
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from pipelines.colour import Colour
from pipelines.loader import Batch, TestLoader, TrainLoader
from pipelines.manifest import Pictures
from pipelines.plan import ViewRule, epoch_order
from vggcore.errors import DatasetError

COLOUR = Colour(
    mean=np.array([120.0, 110.0, 100.0]),
    deviation=np.array([60.0, 55.0, 50.0]),
    axes=np.array([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]]),
    eigenvalues=np.array([0.2, 0.02, 0.004]),
)
RULE = ViewRule(seed=7, net="A", scale=(72, 96), crop=64, flip=True, colour=0.1, global_batch=5)


def list_folder(root: Path) -> Pictures:
    """The JPEGs below `root`, class folders in alphabetical order, as the manifest would list them."""
    files = sorted(root.rglob("*.jpg"))
    classes = sorted({file.parent.name for file in files})
    sizes = []
    for file in files:
        with Image.open(file) as picture:
            sizes.append(picture.size)
    return Pictures(
        root=root,
        paths=np.array([str(file.relative_to(root)) for file in files], object),
        labels=np.array([classes.index(file.parent.name) for file in files], np.int64),
        heights=np.array([height for _, height in sizes], np.int64),
        widths=np.array([width for width, _ in sizes], np.int64),
        contents=np.array([hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in files], object),
    )


@pytest.fixture
def photographs(tmp_path) -> Pictures:
    """23 colour JPEGs of many sizes in two classes, cut from two photographs."""
    for name in ("china", "flower"):
        photograph = load_sample_image(f"{name}.jpg")
        (tmp_path / name).mkdir()
        for number in range(12 if name == "china" else 11):
            y, x, height, width = 20 * number, 30 * number, 100 + 9 * number, 200 - 7 * number
            piece = photograph[y : y + height, x : x + width]
            Image.fromarray(piece).save(tmp_path / name / f"{number:02}.jpg", quality=90)
    return list_folder(tmp_path)


def train_loader(pictures: Pictures, rule: ViewRule = RULE, rank=0, world_size=1, threads=1) -> TrainLoader:
    return TrainLoader(
        pictures, COLOUR, rule, standardise=False, rank=rank, world_size=world_size, device="cpu", threads=threads
    )


def loader_of_tests(pictures: Pictures) -> TestLoader:
    return TestLoader(pictures, COLOUR, standardise=False, device="cpu", threads=1)


def same(first: Batch, second: Batch) -> bool:
    """Equal to the last bit."""
    return (first.size, first.index) == (second.size, second.index) and all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("images", "labels", "rows")
    )


def test_every_number_of_workers_sees_the_same_pixels_in_the_same_batches(photographs):
    alone = [batch for epoch in (0, 1) for batch in train_loader(photographs).epoch(epoch)]
    assert [batch.size for batch in alone] == [5, 5, 5, 5, 3] * 2

    for world_size in (2, 3, 4, 7):
        loaders = [train_loader(photographs, rank=rank, world_size=world_size) for rank in range(world_size)]
        shared = [shares for epoch in (0, 1) for shares in zip(*(loader.epoch(epoch) for loader in loaders), strict=True)]

        assert len(shared) == len(alone)
        for whole, shares in zip(alone, shared, strict=True):
            assert all((part.size, part.index) == (whole.size, whole.index) for part in shares)
            for name in ("images", "labels", "rows"):
                together = torch.cat([getattr(part, name) for part in shares])
                assert torch.equal(together, getattr(whole, name)), f"{name} with {world_size} workers"


def test_the_number_of_threads_changes_no_pixel(photographs):
    one, three = (list(train_loader(photographs, threads=threads).epoch(0)) for threads in (1, 3))

    assert all(same(*pair) for pair in zip(one, three, strict=True))


def test_a_batch_is_what_the_net_takes(photographs):
    batch = next(train_loader(photographs).epoch(0))

    assert batch.images.shape == (5, 3, 64, 64)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous()
    assert -150 < batch.images.min() < batch.images.max() < 200
    assert batch.labels.dtype == batch.rows.dtype == torch.int64
    assert batch.rows.tolist() == [0, 1, 2, 3, 4]


def test_an_epoch_sees_each_picture_once_with_its_own_label(tmp_path):
    for number in range(21):  # a picture's colour tells which it is, its green which class
        (tmp_path / f"class-{number % 3}").mkdir(exist_ok=True)
        solid = Image.new("RGB", (100, 80), (10 * number, 80 * (number % 3), 0))
        solid.save(tmp_path / f"class-{number % 3}" / f"{number}.jpg", quality=100)
    loader = train_loader(list_folder(tmp_path), replace(RULE, colour=0.0))

    epochs = [list(loader.epoch(epoch)) for epoch in (0, 1)]

    orders = []
    for batches in epochs:
        middles = torch.cat([batch.images[:, :, 32, 32] for batch in batches]) + torch.tensor([120.0, 110.0, 100.0])
        orders.append(torch.round(middles[:, 0] / 10).int().tolist())
        labels = torch.cat([batch.labels for batch in batches])
        assert torch.equal(torch.round(middles[:, 1] / 80).long(), labels)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(21))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("first_batch", [0, 2, 4, 5])
def test_an_epoch_from_any_batch_on_is_the_whole_epochs_tail(photographs, first_batch):
    whole = list(train_loader(photographs).epoch(3))

    tail = list(train_loader(photographs).epoch(3, first_batch))

    assert [batch.index for batch in tail] == list(range(first_batch, 5))
    assert all(same(*pair) for pair in zip(whole[first_batch:], tail, strict=True))


def test_an_abandoned_epoch_leaves_nothing_behind(photographs):
    expected = list(train_loader(photographs).epoch(1))
    loader = train_loader(photographs)

    for taken in (1, 2, 4):
        unfinished = loader.epoch(0)
        for _ in range(taken):
            next(unfinished)
        found = list(loader.epoch(1))

        assert all(same(*pair) for pair in zip(expected, found, strict=True)), f"after {taken} batches"
    with pytest.raises(RuntimeError, match="a later one was started"):
        next(unfinished)


def test_batches_stay_as_they_were_while_later_ones_are_made(photographs):
    loader = train_loader(photographs)
    held = list(loader.epoch(0))
    copies = [replace(batch, images=batch.images.clone()) for batch in held]

    for epoch in range(1, 5):
        list(loader.epoch(epoch))
    loader.close()

    assert all(same(*pair) for pair in zip(held, copies, strict=True))


def test_one_picture_is_an_epoch_and_a_worker_without_one_gets_an_empty_batch(photographs):
    columns = ("paths", "labels", "heights", "widths", "contents")
    single = replace(photographs, **{name: getattr(photographs, name)[:1] for name in columns})

    first, second = (list(train_loader(single, rank=rank, world_size=2).epoch(0)) for rank in (0, 1))

    assert [(batch.images.shape, batch.size) for batch in first] == [((1, 3, 64, 64), 1)]
    assert [(batch.images.shape, batch.size) for batch in second] == [((0, 3, 64, 64), 1)]
    assert second[0].labels.shape == second[0].rows.shape == (0,)


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(b"")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


def replace_by_a_page(file: Path) -> None:
    file.write_text("<html>404</html>")


def replace_by_a_smaller_picture(file: Path) -> None:
    Image.new("RGB", (8, 8)).save(file)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (delete, "cannot be read any more (No such file or directory)"),
        (truncate, "not a picture that DALI decodes any more (0 bytes)"),
        (cut_short, "not a picture that DALI decodes any more (200 bytes, changed since the scan)"),
        (replace_by_a_page, "not a picture that DALI decodes any more (16 bytes, changed since the scan)"),
        (replace_by_a_smaller_picture, "not the picture that was scanned any more (8 x 8 pixels, wanted 127 x 179)"),
    ],
)
def test_a_picture_that_breaks_is_named_within_seconds(photographs, damage, found):
    loader = train_loader(photographs)
    file = photographs.root / "flower" / "03.jpg"
    content = file.read_bytes()
    expected = list(loader.epoch(0))
    damage(file)
    started = time.monotonic()

    with pytest.raises(DatasetError) as caught:
        list(loader.epoch(0))

    assert time.monotonic() - started < 10
    assert str(caught.value).startswith(f"{file}: ")
    assert found in str(caught.value)
    assert str(caught.value).endswith("restore or remove it, then start the same command again")
    file.write_bytes(content)
    assert all(same(*pair) for pair in zip(expected, loader.epoch(0), strict=True))


@pytest.mark.parametrize("damage", [delete, truncate, replace_by_a_page, replace_by_a_smaller_picture])
def test_a_broken_picture_in_a_large_batch_does_not_kill_the_process(photographs, damage):
    columns = ("paths", "labels", "heights", "widths", "contents")
    many = replace(photographs, **{name: np.tile(getattr(photographs, name), 5) for name in columns})
    file = photographs.root / "flower" / "03.jpg"
    damage(file)
    loader = train_loader(many, replace(RULE, global_batch=len(many)))  # DALI's own check would crash from 9 pictures on

    for epoch in range(3):
        with pytest.raises(DatasetError, match=re.escape(str(file))):
            list(loader.epoch(epoch))


def test_batches_before_a_broken_picture_are_still_given(photographs):
    loader = train_loader(photographs)
    whole = list(loader.epoch(0))
    last = photographs.root / photographs.paths[epoch_order(RULE, 0, photographs.labels)[-1]]
    last.unlink()
    given = []

    with pytest.raises(DatasetError, match="cannot be read any more"):
        for batch in loader.epoch(0):
            given.append(batch)

    assert all(same(*pair) for pair in zip(whole[:4], given, strict=True))


def test_a_picture_that_breaks_in_a_test_is_named(photographs):
    file = photographs.root / "china" / "05.jpg"
    truncate(file)
    loader = loader_of_tests(photographs)

    for batches in (loader.centre(72, 64, 4), loader.whole(72, 4)):
        with pytest.raises(DatasetError, match=r"china/05.jpg: not a picture that DALI decodes any more \(0 bytes\)"):
            list(batches)


def test_centre_crops_come_in_order_and_do_not_depend_on_the_batch(photographs):
    loader = loader_of_tests(photographs)

    whole = list(loader.centre(72, 64, 23))
    parts = list(loader.centre(72, 64, 4, start=0, stop=9)) + list(loader.centre(72, 64, 5, start=9))

    assert [len(images) for images, _, _ in parts] == [4, 4, 1, 5, 5, 4]
    images, labels, indices = (torch.cat(kind) for kind in zip(*parts, strict=True))
    assert torch.equal(images, whole[0][0])
    assert torch.equal(labels, torch.from_numpy(photographs.labels))
    assert indices.tolist() == list(range(23))


def test_whole_pictures_come_once_each_at_their_own_size(photographs):
    loader = loader_of_tests(photographs)

    batches = list(loader.whole(72, 4))

    indices = torch.cat([indices for _, _, indices in batches]).tolist()
    assert sorted(indices) == list(range(23))
    for images, labels, indices in batches:
        assert len(images) <= 4
        assert torch.equal(labels, torch.from_numpy(photographs.labels[indices.numpy()]))
        for index in indices.tolist():
            height, width = int(photographs.heights[index]), int(photographs.widths[index])
            assert min(images.shape[2:]) == 72
            assert abs(images.shape[2] * width - images.shape[3] * height) <= max(height, width) / 2


def test_pictures_of_one_size_share_a_batch(tmp_path):
    (tmp_path / "one").mkdir()
    for number in range(6):
        solid = Image.new("RGB", (100, 80) if number % 2 else (80, 100), (40 * number, 0, 0))
        solid.save(tmp_path / "one" / f"{number}.jpg")
    loader = loader_of_tests(list_folder(tmp_path))

    batches = list(loader.whole(64, 8))

    assert sorted((tuple(images.shape), indices.tolist()) for images, _, indices in batches) == [
        ((3, 3, 64, 80), [1, 3, 5]),
        ((3, 3, 80, 64), [0, 2, 4]),
    ]
    for images, _, indices in batches:
        np.testing.assert_allclose(images[:, 0, 32, 32] + 120, 40 * indices, atol=2)


def test_a_deviation_of_nothing_is_refused(photographs):
    flat = replace(COLOUR, deviation=np.array([0.0, 1.0, 1.0]))

    with pytest.raises(DatasetError, match=r"standardise = true: .* must be above 0"):
        TestLoader(photographs, flat, standardise=True, device="cpu", threads=1)
