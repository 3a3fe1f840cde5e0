"""What `[augment]` and `balance` add to the plan, through the loaders: equal bits for any workers, start and cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.cache import DecodedCache, make_cache
from pipelines.loader import Batch, TrainLoader
from pipelines.manifest import Manifest
from pipelines.plan import ViewRule
from pipelines.scan import scan
from tests.pipelines.photo_folders import make_photo_folder
from vggcore.recipe import Data

PLAIN = ViewRule(seed=7, net="A", scale=(40, 60), crop=32, flip=True, colour=0.1, global_batch=7)
FLIPS = replace(PLAIN, flip_vertical=True, quarter_turns=True, balance=0.6)
WHOLE = replace(FLIPS, view="whole", scale=(32, 32))
RULES = {"flips": FLIPS, "whole": WHOLE}


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


@pytest.mark.parametrize("name", sorted(RULES))
def test_an_epoch_has_as_many_views_as_the_split_pictures_with_their_own_labels(world, alone, name):
    train = world[0].split("train")

    batches = alone[name, 0]

    assert [len(batch.labels) for batch in batches] == [7, 7, 7, 1] and len(train) == 22
    for batch in batches:
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
