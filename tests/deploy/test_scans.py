"""A recipe may say in which order known classes stand: the scan's pictures are the same, and so is their fingerprint."""

import pytest

from deploy.scans import known_manifest, scan_data
from pipelines.manifest import read_manifest
from tests.pipelines.photo_folders import make_photo_folder
from training.store import open_store
from vggcore.errors import DatasetError
from vggcore.recipe import Data


def test_classes_stand_as_listed_with_others_after_them_and_the_scan_is_one(tmp_path):
    store = open_store(tmp_path / "store")
    plain = Data(root=make_photo_folder(tmp_path / "photos", per_class=4, split=True, size=(36, 40)))
    listed = plain.model_copy(update={"classes": ("flower", "coffee")})

    by_name, ordered = scan_data(plain, store, threads=1), scan_data(listed, store, threads=1)

    assert (by_name.classes, ordered.classes) == (("cat", "coffee", "flower"), ("flower", "coffee", "cat"))
    assert by_name.fingerprint == ordered.fingerprint and by_name.table == ordered.table
    labels = [ordered.classes[label] for label in ordered.split("train").labels]
    assert labels == [path.split("/")[1] for path in ordered.split("train").paths]
    assert known_manifest(listed, store).classes == ordered.classes and known_manifest(plain, store).classes == by_name.classes
    assert read_manifest(store.data(ordered.fingerprint)).classes == by_name.classes      # nothing of an order is kept
    with pytest.raises(DatasetError, match=r"^\[data\] classes: no picture of class 'fox' below .*found 'cat', 'coffee'"):
        scan_data(plain.model_copy(update={"classes": ("cat", "fox")}), store, threads=1)
