"""The yardstick on published weights' features, and the suspected labels that its features show."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy import feature_yardstick
from deploy.feature_yardstick import weights_to_use, with_features
from deploy.yardsticks import Yardsticks, read_yardsticks, write_yardsticks
from pipelines.manifest import Manifest
from pipelines.scan import scan
from tests.pipelines.photo_folders import make_photo_folder
from tests.training.small_published import publish
from training.store import Store, open_store, read_json
from vggcore.recipe import Data, Features, parse_recipe
from vggcore.schedule import resolve_stages

SCHEDULE = "00aa11bb22cc33dd"
RECIPE = """
name = "photos"
[data]
root = "{root}"
[net]
crop = 32
[[stage]]
name = "A-36"
net = "A"
scale = 36
"""
LOGISTIC = """
[[stage]]
name = "linear"
net = "A"
head = "linear"
fit = "logistic"
init_from = "weights:small/a"
features = { groups = [1, 2], scales = [36] }
"""


@pytest.fixture(autouse=True)
def small_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of net A in place of four of net D: the same code in a second."""
    monkeypatch.setattr(feature_yardstick, "FEATURES", Features(groups=(1, 2), pool="both", scales=(36,)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = make_photo_folder(tmp_path / "photos", per_class=16, split=True, size=(48, 60))
    (folder / "train" / "cat" / "cat-003.jpg").rename(folder / "train" / "coffee" / "<b>not & coffee.jpg")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def manifest(photos: Path, store: Store) -> Manifest:
    return scan(Data(root=photos), store.root, threads=1)


def others(manifest: Manifest) -> Yardsticks:
    """What the plain classifiers have found before."""
    test = manifest.split("test")
    return Yardsticks(48, 48, len(test), tuple(map(str, test.paths)), tuple(map(int, test.labels)), ())


def row_of(store: Store, manifest: Manifest, photos: Path, more: str = "") -> Yardsticks:
    stages = resolve_stages(parse_recipe(RECIPE.format(root=photos) + more, place="r", folder=photos))
    stages = tuple(
        stage.model_copy(update={"weights_digest": "0" * 32}) if stage.init_from else stage for stage in stages
    )
    return with_features(
        others(manifest), store, manifest, stages, SCHEDULE, 0, threads=1, say=lambda words: None
    )


def test_without_published_weights_there_is_no_such_row(store: Store, manifest: Manifest, photos: Path) -> None:
    assert row_of(store, manifest, photos).rows == ()


def test_with_published_weights_there_is_a_row_that_names_them(store: Store, manifest: Manifest, photos: Path) -> None:
    publish(store)

    found = row_of(store, manifest, photos)

    (row,) = found.rows
    assert row.name == "VGG-11 features + logistic regression"
    assert "384 values of weights:small/a" in row.detail and "by val" in row.detail
    assert row.top1_accuracy > 0.8 and len(row.predictions) == len(found.paths) == len(manifest.split("test"))
    right = np.mean(np.array(row.predictions) == np.array(found.labels))
    assert row.top1_accuracy == pytest.approx(right)
    write_yardsticks(store.root / "yardsticks.json", found)
    assert read_yardsticks(store.root / "yardsticks.json") == found
    stages = resolve_stages(parse_recipe(RECIPE.format(root=photos), place="r", folder=photos))
    assert with_features(found, store, manifest, stages, SCHEDULE, 0, threads=1, say=print) is found      # once is enough


def test_a_schedule_that_has_such_a_stage_itself_needs_no_row(store: Store, manifest: Manifest, photos: Path) -> None:
    publish(store)

    assert row_of(store, manifest, photos, LOGISTIC).rows == ()


def test_the_deepest_well_known_net_is_taken_where_there_are_several(store: Store) -> None:
    record = publish(store)
    several = [replace_record(record, name, net) for name, net in (("b", "B"), ("z", "D"), ("d", "D"), ("e", "E"))]

    assert weights_to_use(several).name == "d"
    assert weights_to_use([]) is None


def replace_record(record, name: str, net: str):
    return record.model_copy(update={"name": name, "net": net})


def test_a_picture_in_the_wrong_folder_is_suspected(store: Store, manifest: Manifest, photos: Path) -> None:
    publish(store)

    row_of(store, manifest, photos)

    found = read_json(store.schedule(SCHEDULE) / "suspects.json")
    (wrong,) = [one for one in found["suspects"] if "not & coffee" in one["path"]]
    assert (wrong["class"], wrong["neighbours_class"]) == ("coffee", "cat")
    assert wrong["nearest"].startswith(("train/cat/", "val/cat/"))
    assert found["pictures"] == len(manifest.split("train")) + len(manifest.split("val"))


def test_features_of_pictures_that_changed_are_one_line(store: Store, photos: Path, tmp_path: Path) -> None:
    from vggcore.errors import DatasetError

    publish(store)
    copied = tmp_path / "copied"
    shutil.copytree(photos, copied)
    manifest = scan(Data(root=copied), store.root, threads=1)
    (copied / "test" / "cat" / "cat-000.jpg").write_bytes(b"no picture")

    with pytest.raises(DatasetError, match=r"cat-000\.jpg: "):
        row_of(store, manifest, copied)


def test_the_row_is_the_same_whoever_asks(store: Store, manifest: Manifest, photos: Path) -> None:
    publish(store)

    first, again = (row_of(store, manifest, photos).rows[0] for _ in range(2))

    assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
