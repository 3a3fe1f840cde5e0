"""What `[augment]` and `balance` add to the plan, through the loaders: equal bits for any workers, start and cache."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.cache import DecodedCache, make_cache
from pipelines.loader import Batch, TrainLoader
from pipelines.manifest import Manifest
from pipelines.plan import ViewRule
from pipelines.scan import scan
from tests.pipelines.photo_folders import make_photo_folder
from vggcore.errors import DatasetError
from vggcore.recipe import Data

PLAIN = ViewRule(seed=7, net="A", scale=(40, 60), crop=32, flip=True, colour=0.1, global_batch=7)
FLIPS = replace(PLAIN, flip_vertical=True, quarter_turns=True, balance=0.6)
WHOLE = replace(FLIPS, view="whole", scale=(32, 32))
AREA = replace(PLAIN, scale=(37, 37), area=(0.08, 1.0), aspect=(0.5, 2.0))
EVERYTHING = replace(AREA, flip_vertical=True, quarter_turns=True, balance=0.6, mixup=0.4, erase=0.5)
MIXED = replace(PLAIN, mixup=0.4, balance=0.6)
RULES = {"flips": FLIPS, "whole": replace(WHOLE, mixup=1.0, erase=0.3), "mixed": MIXED, "everything": EVERYTHING}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Manifest, DecodedCache]:
    """Photographs in three classes of 12, 6 and 4, and their decoded cache."""
    folder: Path = tmp_path_factory.mktemp("options")
    photos = make_photo_folder(folder / "photos", per_class=12, split=True, size=(40, 90))
    for name, kept in (("coffee", 6), ("flower", 4)):
        for file in sorted((photos / "train" / name).iterdir())[kept:]:
            file.unlink()
    manifest = scan(Data(root=photos), folder / "store", threads=1)
    cache = make_cache(manifest, folder / "store", budget_bytes=2**30, threads=1, say=lambda words: None)
    assert cache is not None
    return manifest, cache


def loader_of(manifest: Manifest, rule: ViewRule, rank=0, world_size=1, cache=None) -> TrainLoader:
    return TrainLoader(
        manifest.split("train"), manifest.colour, rule,
        standardise=True, rank=rank, world_size=world_size, device="cpu", threads=1, cache=cache,
    )  # fmt: skip


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """All that a batch brings to a net, by name."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def alone(world) -> dict[tuple[str, int], list[Batch]]:
    """Each rule's epochs 0 and 3 as one worker reads them."""
    found = {}
    for name, rule in RULES.items():
        loader = loader_of(world[0], rule)
        found |= {(name, epoch): list(loader.epoch(epoch)) for epoch in (0, 3)}
        loader.close()
    return found


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(RULES)), st.sampled_from([0, 3]), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_all_options_give_equal_bits_at_any_number_of_workers_from_any_batch_on_cached_or_not(
    world, alone, name, epoch, world_size, first, cached
):
    manifest, cache = world
    loaders = [loader_of(manifest, RULES[name], rank, world_size, cache if cached else None) for rank in range(world_size)]

    shared = list(zip(*(loader.epoch(epoch, first) for loader in loaders), strict=True))

    for loader in loaders:
        loader.close()
    expected = alone[name, epoch][first:]
    assert len(shared) == len(expected) == 4 - first
    for whole, parts in zip(expected, shared, strict=True):
        together = [tensors(part) for part in parts]
        for key, value in tensors(whole).items():
            assert torch.equal(torch.cat([part[key] for part in together]), value), key


def test_a_worker_without_a_share_gets_a_batch_of_nothing_that_has_all_parts(world):
    loader = loader_of(world[0], MIXED, rank=3, world_size=4)

    last = list(loader.epoch(0))[-1]

    assert {name: len(value) for name, value in tensors(last).items()} == dict.fromkeys(tensors(last), 0)
    assert tensors(last).keys() == {"images", "labels", "rows", "mix", "partner_labels"}
    assert last.images.shape == (0, 3, 32, 32) and last.mix.dtype == torch.float32 and last.size == 1


@pytest.mark.parametrize("name", sorted(RULES))
def test_an_epoch_has_as_many_views_as_the_split_pictures_with_their_own_labels(world, alone, name):
    train = world[0].split("train")

    batches = alone[name, 0]

    assert [len(batch.labels) for batch in batches] == [7, 7, 7, 1] and len(train) == 22
    for batch in batches:
        assert (batch.mix is None) == (batch.partner_labels is None) == (batch.partners is None) == (name == "flips")
        assert batch.labels.tolist() == train.labels[batch.pictures].tolist()
        assert batch.images.shape == (len(batch.labels), 3, 32, 32) and batch.images.is_contiguous()
    counts = torch.bincount(torch.cat([batch.labels for batch in batches])).tolist()
    shares = [0.4 * size + 0.6 * 22 / 3 for size in (12, 6, 4)]
    assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))


def test_flips_and_turns_are_the_plain_views_pixels_in_other_places(world):
    plain, turned = (
        list(loader_of(world[0], rule).epoch(1)) for rule in (PLAIN, replace(PLAIN, flip_vertical=True, quarter_turns=True))
    )

    seen = set()
    for one, other in zip(plain, turned, strict=True):
        for before, after in zip(one.images, other.images, strict=True):
            ways = {
                (down, turns): torch.rot90(before.flip(1) if down else before, turns, (1, 2))
                for down in (False, True) for turns in range(4)
            }  # fmt: skip
            found = [way for way, pixels in ways.items() if torch.equal(pixels, after)]
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) >= 7


def test_mixup_is_the_plain_view_and_another_one_by_their_weights(world):
    train, labels = world[0].split("train"), world[0].split("train").labels
    rule = replace(MIXED, balance=0.0)
    plain, mixed = (list(loader_of(world[0], chosen).epoch(1)) for chosen in (PLAIN, rule))

    weights, other = torch.cat([batch.mix for batch in mixed]), torch.cat([batch.partner_labels for batch in mixed])
    for before, after in zip(plain, mixed, strict=True):
        assert torch.equal(before.labels, after.labels) and before.pictures.tolist() == after.pictures.tolist()
        assert after.partner_labels.tolist() == labels[after.partners].tolist()
        share = after.mix[:, None, None, None]
        partner = (after.images - share * before.images) / (1 - share)      # what was mixed in
        partner = partner[after.mix < 0.9]
        mean, deviation = (torch.tensor(value, dtype=torch.float32)[:, None, None] for value in
                           (world[0].colour.mean, world[0].colour.deviation))  # fmt: skip
        levels = partner * deviation + mean
        assert levels.min() > -30 and levels.max() < 285, "a picture's levels and its colour shift"
    assert len(train) == len(weights) == len(other) and 0.1 < weights.mean() < 0.9


def test_a_mixed_picture_is_the_sum_of_two_colours_with_their_labels(tmp_path):
    """Each picture is one colour, 12 * its number: what is mixed shows in the sum."""
    for split, per_class in (("train", 10), ("val", 1), ("test", 1)):
        for label in range(2):
            (tmp_path / split / f"class-{label}").mkdir(parents=True)
            for number in range(per_class):
                level = 12 * (number + per_class * label)
                path = tmp_path / split / f"class-{label}" / f"{number}.png"
                Image.new("RGB", (50 + number, 44), (level, 100 * label, 7 if split == "train" else 9)).save(path)
    manifest = scan(Data(root=tmp_path, standardise=False), tmp_path / "store", threads=1)
    train = manifest.split("train")
    loader = TrainLoader(
        train, manifest.colour, replace(MIXED, colour=0.0, balance=0.0),
        standardise=False, rank=0, world_size=1, device="cpu", threads=1,
    )  # fmt: skip

    for batch in loader.epoch(0):
        seen = batch.images[:, 0] + float(manifest.colour.mean[0])
        for row, level in enumerate(seen):
            one, other = (12 * int(place[row]) for place in (batch.pictures, batch.partners))
            expected = float(batch.mix[row]) * one + (1 - float(batch.mix[row])) * other
            assert torch.allclose(level, torch.tensor(expected), atol=1e-3)
            assert batch.pictures[row] != batch.partners[row]
            assert batch.partner_labels[row] == train.labels[batch.partners[row]]
    loader.close()


def test_erased_rectangles_are_0_and_all_else_is_the_plain_view(world):
    rule = replace(PLAIN, erase=0.5)
    plain, holed = (list(loader_of(world[0], chosen).epoch(1)) for chosen in (PLAIN, rule))

    erased = 0
    for before, after in zip(plain, holed, strict=True):
        for one, other in zip(before.images, after.images, strict=True):
            changed = (one != other).any(dim=0)
            if changed.any():
                erased += 1
                down, across = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
                hole = other[:, down.min() : down.max() + 1, across.min() : across.max() + 1]
                assert not hole.any() and hole[0].numel() > 0.015 * 32 * 32
    assert 5 <= erased <= 17


@pytest.mark.parametrize("cached", [False, True])
def test_a_picture_that_breaks_as_a_partner_is_named(world, cached, tmp_path):
    manifest, cache = world
    train = manifest.split("train")
    first = next(loader_of(manifest, MIXED).epoch(0))
    partner = next(int(row) for row in first.partners if row not in first.pictures)
    path = train.root / str(train.paths[partner])
    kept = path.rename(tmp_path / "kept.jpg")
    loader = loader_of(manifest, MIXED, cache=cache if cached else None)

    try:
        if cached:
            assert torch.equal(next(loader.epoch(0)).images, first.images)
        else:
            with pytest.raises(DatasetError, match=f"{re.escape(str(path))}: cannot be read any more"):
                next(loader.epoch(0))
    finally:
        kept.rename(path)
        loader.close()
