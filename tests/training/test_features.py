"""Features of whole pictures: their values, that they are computed once, and that nothing else changes a bit of them."""

import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from torch.nn import functional

from pipelines.colour import Colour
from pipelines.loader import TestLoader
from pipelines.manifest import Manifest, Pictures
from pipelines.scan import scan
from tests.pipelines.photo_folders import make_photo_folder
from tests.training.small_published import MEAN, publish, published_tensors
from training.features import batches, compute
from training.features.compute import Workers, features_of
from training.features.forward import FeatureNet
from training.features.source import fc_spec, pooled_spec, published_source
from training.features.spec import FeatureSpec, tensors_digest, used_tensors
from training.features.table import FeatureTable, write_part
from training.ray_start import start_ray
from training.store import Store, open_store
from vggcore.errors import DatasetError, RecipeError, StoreError
from vggcore.recipe import Data, Features

TINY = Features(groups=(1, 2), pool="both", scales=(32, 48))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 JPEGs of many shapes in three classes."""
    return make_photo_folder(tmp_path_factory.mktemp("photos"), per_class=12, size=(48, 72))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = open_store(tmp_path / "store")
    publish(opened)
    return opened


@pytest.fixture
def manifest(photos: Path, store: Store) -> Manifest:
    return scan(Data(root=photos), store.root, threads=1)


def everything(manifest: Manifest) -> Pictures:
    """All splits' pictures as one."""
    parts = [manifest.split(name) for name in ("train", "val", "test")]
    names = ("paths", "labels", "heights", "widths", "contents")
    return Pictures(root=manifest.root, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def spec_of(store: Store, features: Features = TINY, precision: str = "fp32") -> FeatureSpec:
    return pooled_spec(published_source(store, "small/a"), features, precision=precision)


def found(
    store: Store, pictures: Pictures, spec: FeatureSpec | None = None, *, threads: int = 1, tasks: int | None = None
) -> compute.Found:
    spec = spec or spec_of(store)
    return features_of(pictures, spec, published_source(store, "small/a"), store, Workers(threads, tasks=tasks))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pool", ["average", "maximum", "both"])
def test_values_are_those_of_a_plain_forward_pass(store: Store, manifest: Manifest, pool: str, flip: bool) -> None:
    pictures = everything(manifest)
    features = TINY.model_copy(update={"pool": pool, "flip": flip})

    values = found(store, pictures, spec_of(store, features)).values

    weights = published_tensors()
    colour = Colour(np.array(MEAN), np.ones(3), np.zeros((3, 3)), np.zeros(3))
    loader = TestLoader(pictures, colour, standardise=False, device="cpu", threads=1)
    blocks = []      # of each scale: (pictures, values)
    for scale in (32, 48):
        block: list[torch.Tensor] = [torch.zeros(0)] * len(pictures)
        for images, _, rows in loader.whole(scale, 1):
            sides = [by_hand(side, weights, pool) for side in ((images, images.flip(3)) if flip else (images,))]
            block[int(rows[0])] = torch.stack(sides).mean(0)
        blocks.append(torch.stack(block))
    loader.close()
    expected = torch.cat(blocks, 1).numpy()
    assert values.shape == expected.shape == (36, {"both": 2}.get(pool, 1) * (64 + 128) * 2)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-4)


def by_hand(images: torch.Tensor, weights: dict[str, torch.Tensor], pool: str) -> torch.Tensor:
    """The pooled values of groups 1 and 2 of net A for one picture."""
    one = functional.max_pool2d(functional.relu(conv(images, weights, 0)), 2)
    two = functional.max_pool2d(functional.relu(conv(one, weights, 3)), 2)
    return torch.cat([pooled for maps in (one, two) for pooled in pooled_by(maps, pool)], 1)[0]


def conv(images: torch.Tensor, weights: dict[str, torch.Tensor], index: int) -> torch.Tensor:
    return functional.conv2d(images, weights[f"features.{index}.weight"], weights[f"features.{index}.bias"], padding=1)


def pooled_by(maps: torch.Tensor, pool: str) -> list[torch.Tensor]:
    average, maximum = maps.mean((2, 3)), maps.amax((2, 3))
    return {"average": [average], "maximum": [maximum], "both": [average, maximum]}[pool]


def test_the_papers_own_features_have_length_1_and_are_the_mean_over_places_scales_and_the_mirror(
    store: Store, manifest: Manifest
) -> None:
    publish(store, "small/fc", fc=True)
    source = published_source(store, "small/fc")
    pictures = chosen(everything(manifest), np.arange(0, 36, 8))

    values = features_of(pictures, fc_spec(source, (32, 48), precision="fp32"), source, store, Workers(1)).values

    assert values.shape == (5, 4096)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, rtol=1e-6)
    weights = published_tensors(fc=True)
    loader = TestLoader(
        pictures, Colour(np.array(MEAN), np.ones(3), np.zeros((3, 3)), np.zeros(3)), standardise=False, device="cpu", threads=1
    )
    total = torch.zeros(5, 4096)
    for scale in (32, 48):
        for images, _, rows in loader.whole(scale, 1):
            for side in (images, images.flip(3)):
                total[int(rows[0])] += dense_units_by_hand(side, weights) / 4
    loader.close()
    np.testing.assert_allclose(values, functional.normalize(total, dim=1).numpy(), atol=2e-6)
    with pytest.raises(RecipeError, match=r"--scales: 24 is below the crop of weights:small/fc, 32"):
        fc_spec(source, (24,), precision="fp32")
    with pytest.raises(RecipeError, match=r"--groups fc: weights:small/a have no FC layers"):
        fc_spec(published_source(store, "small/a"), (224,), precision="fp32")


def dense_units_by_hand(images: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """FC-2's units at every place of the last map of net A at crop 32, where FC-1 is a 1x1 conv; averaged."""
    maps = images
    for index in (0, 3, 6, 8, 11, 13, 16, 18):
        maps = functional.relu(conv(maps, weights, index))
        if index in (0, 3, 8, 13, 18):
            maps = functional.max_pool2d(maps, 2)
    for name in ("classifier.0", "classifier.3"):
        maps = functional.relu(functional.conv2d(maps, weights[f"{name}.weight"][:, :, None, None], weights[f"{name}.bias"]))
    return maps.mean((2, 3))[0]


def test_bits_are_equal_at_any_number_of_threads_and_whatever_the_other_pictures_are(
    store: Store, manifest: Manifest, tmp_path: Path
) -> None:
    pictures = everything(manifest)
    whole = found(store, pictures)
    other = open_store(tmp_path / "other")
    publish(other)

    for rows in (np.arange(0, 36, 7), np.arange(20), np.arange(35, -1, -1)):      # in three goes, the last backwards
        some = chosen(pictures, rows)
        got = found(other, some, threads=3)
        np.testing.assert_array_equal(got.values, whole.values[rows])

    assert whole.computed == 36
    assert found(other, pictures).computed == 0


def chosen(pictures: Pictures, rows: np.ndarray) -> Pictures:
    names = ("paths", "labels", "heights", "widths", "contents")
    return replace(pictures, **{name: getattr(pictures, name)[rows] for name in names})


@pytest.fixture(scope="module")
def three_workers(tmp_path_factory: pytest.TempPathFactory):
    """Ray with room for three tasks."""
    store = open_store(tmp_path_factory.mktemp("ray"))
    start_ray(store, address=None, cpus=3, stall_s=60)
    yield
    ray.shutdown()


@pytest.mark.slow      # tests/training/test_logistic_stage.py has three workers, and weights made of their values
def test_bits_are_equal_at_two_and_three_ray_workers(
    store: Store, manifest: Manifest, tmp_path: Path, three_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PART_PIXELS", (2**14, 2**14))      # many parts
    pictures = everything(manifest)
    alone = found(store, pictures).values

    for workers in (2, 3):
        other = open_store(tmp_path / f"with-{workers}")
        publish(other)
        together = found(other, pictures, tasks=workers)
        np.testing.assert_array_equal(together.values, alone)
        assert together.computed == 36
        assert len(list((other.features(spec_of(other).key) / "parts").iterdir())) > workers


def test_a_new_picture_costs_only_itself_and_a_copy_nothing(
    store: Store, manifest: Manifest, photos: Path, tmp_path: Path
) -> None:
    assert found(store, everything(manifest)).computed == 36
    more = tmp_path / "more"
    shutil.copytree(photos, more)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50, 3), np.uint8)).save(more / "cat" / "new.png")
    shutil.copy(more / "cat" / "new.png", more / "cat" / "copy.png")
    counted: list[tuple[int, int]] = []

    grown = scan(Data(root=more), store.root, threads=1)
    result = features_of(
        everything(grown),
        spec_of(store),
        published_source(store, "small/a"),
        store,
        Workers(1),
        progress=lambda done, total: counted.append((done, total)),
    )

    assert result.computed == 1 and result.values.shape[0] == 38
    assert counted[-1] == (1, 1)


def test_a_stop_keeps_the_batches_that_are_done(store: Store, manifest: Manifest) -> None:
    pictures, seen = everything(manifest), 0

    class Stop(Exception):
        pass

    def stop() -> None:
        nonlocal seen
        seen += 1
        if seen == 7:
            raise Stop

    with pytest.raises(Stop):
        features_of(pictures, spec_of(store), published_source(store, "small/a"), store, Workers(1), check=stop)

    table = FeatureTable(store, spec_of(store))
    table.refresh()
    assert len(table.read) >= 7
    assert found(store, pictures).computed == 36 - len(table.read)


def test_the_key_changes_with_every_field_that_decides_a_value(store: Store) -> None:
    spec = spec_of(store)
    changes = {
        "tensors": "0" * 32,
        "net": "B",
        "width": 0.5,
        "groups": (2,),
        "pool": "average",
        "scales": (32,),
        "flip": True,
        "precision": "bf16",
        "mean": (1.0, 2.0, 3.0),
        "deviation": (1.0, 2.0, 3.0),
        "crop": 64,
    }

    keys = {name: spec.model_copy(update={name: value}).key for name, value in changes.items()}

    assert set(changes) == FeatureSpec.model_fields.keys() - {"format"}
    assert len({spec.key, *keys.values()}) == len(changes) + 1


def test_weights_count_by_the_values_that_are_used_alone() -> None:
    weights = published_tensors()
    used = {name: weights[name] for name in used_tensors("A", (1, 2))}
    above = weights | {"features.6.weight": weights["features.6.weight"] + 1}

    assert sorted(used) == ["features.0.bias", "features.0.weight", "features.3.bias", "features.3.weight"]
    assert tensors_digest(used) == tensors_digest({name: above[name] for name in used})
    nudged = used | {"features.3.bias": used["features.3.bias"] + 1e-6}
    assert tensors_digest(nudged) != tensors_digest(used)


@pytest.mark.parametrize("same_size", [True, False])
def test_a_picture_whose_file_changed_since_the_scan_is_named(
    store: Store, photos: Path, tmp_path: Path, same_size: bool
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(photos, copied)
    manifest = scan(Data(root=copied), store.root, threads=1)
    victim = copied / "cat" / "cat-003.jpg"
    with Image.open(victim) as opened:
        size = opened.size if same_size else (opened.width + 1, opened.height)
    Image.new("RGB", size, (9, 9, 9)).save(victim)

    what = "changed since it was scanned" if same_size else "not the picture that was scanned"
    with pytest.raises(DatasetError, match=rf"cat-003\.jpg: .*{what}") as raised:
        found(store, everything(manifest))

    assert "\n" not in str(raised.value)
    assert FeatureTable(store, spec_of(store)).missing(["x"]) == {"x"}


def test_a_broken_file_of_rows_is_named_and_may_be_removed(store: Store, manifest: Manifest) -> None:
    pictures = everything(manifest)
    whole = found(store, pictures)
    part = next((store.features(spec_of(store).key) / "parts").iterdir())
    part.write_bytes(part.read_bytes()[:-20])

    with pytest.raises(StoreError, match="remove this file: it is computed again"):
        found(store, pictures)

    part.unlink()
    np.testing.assert_array_equal(found(store, pictures).values, whole.values)


def test_rows_are_in_parquet_with_their_content_and_the_spec_beside_them(store: Store, manifest: Manifest) -> None:
    spec = spec_of(store)
    found(store, everything(manifest))

    folder = store.features(spec.key)
    tables = [pq.read_table(path) for path in (folder / "parts").iterdir()]

    assert FeatureSpec.model_validate_json((folder / "features.json").read_text()) == spec
    assert {name for table in tables for name in table.column_names} == {"content", "features"}
    assert tables[0].schema.field("features").type.list_size == spec.values
    assert sorted(content for table in tables for content in table["content"].to_pylist()) == sorted(
        manifest.table["content"].to_pylist()
    )


def compute_all(root: Path, photos: Path) -> None:
    """What another command does at the same time."""
    torch.set_num_threads(1)
    store = Store(root)
    found(store, everything(scan(Data(root=photos), root, threads=1)))


def test_two_commands_at_once_compute_each_picture_once_and_find_the_same(
    store: Store, photos: Path, manifest: Manifest
) -> None:
    context = multiprocessing.get_context("spawn")
    commands = [context.Process(target=compute_all, args=(store.root, photos)) for _ in range(2)]

    for command in commands:
        command.start()
    for command in commands:
        command.join(120)

    assert [command.exitcode for command in commands] == [0, 0]
    parts = [pq.read_table(path) for path in (store.features(spec_of(store).key) / "parts").iterdir()]
    assert sum(part.num_rows for part in parts) == 36
    assert found(store, everything(manifest)).computed == 0


def test_bf16_is_a_precision_of_its_own_and_near_fp32(store: Store, manifest: Manifest) -> None:
    pictures = chosen(everything(manifest), np.arange(6))

    exact = found(store, pictures).values
    rounded = found(store, pictures, spec_of(store, precision="bf16")).values

    assert not np.array_equal(exact, rounded)
    assert np.linalg.norm(exact - rounded) / np.linalg.norm(exact) < 0.02


def test_a_net_goes_no_further_than_the_last_group_asked_for(store: Store) -> None:
    net = FeatureNet(spec_of(store), {name: published_tensors()[name] for name in used_tensors("A", (1, 2))}, "cpu").net

    assert len(net.features) == 6      # two groups of a conv, its ReLU and the pool


def test_parts_of_many_pictures_are_larger(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = everything(manifest)
    cut = batches.cut(pictures, np.arange(36), (32, 48), "cpu")
    monkeypatch.setattr(batches, "PART_PIXELS", (1, 2**30))
    monkeypatch.setattr(batches, "MOST_PARTS", 4)

    parts = batches.into_parts(pictures, cut, (32, 48))

    assert len(parts) in (4, 5)
    np.testing.assert_array_equal(np.sort(np.concatenate([rows for part in parts for rows in part])), np.arange(36))


def test_a_part_is_named_by_its_contents(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)

    first, again, other = (write_part(tmp_path, contents, values) for contents in (["a", "b"], ["a", "b"], ["a", "c"]))

    assert first == again != other
