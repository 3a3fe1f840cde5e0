"""The cluster of this session: the one that `make cluster-up` started, else one that is started and ended here."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.end_to_end.conftest import RECIPE
from tests.pipelines.photo_folders import make_photo_folder


@contextmanager
def borrowed(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, up; ended afterwards unless it was up before. Skips the tests where nobody may make one."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    was_up = cluster.problems() == []
    try:
        cluster.up()
        yield cluster
    finally:
        if not was_up:
            cluster.down()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head, two nodes with one CPU each, an MLflow server."""
    with borrowed(Cluster(os.environ.get("VGGROW_CLUSTER", "vgc"))) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def shared_photos(cluster: Cluster) -> Path:
    """60, 15 and 15 colour JPEGs of three classes, where every node sees them."""
    folder = cluster.shared / "photos"
    return folder if folder.exists() else make_photo_folder(folder, per_class=20, split=True, size=(48, 72))


@pytest.fixture(scope="session")
def write_recipe(shared_photos: Path) -> Callable[..., Path]:
    """Writes a recipe for the photos into a folder of the client: one narrow net A at crop 32."""

    def write(folder: Path, *, epochs: int, seed: int = 3) -> Path:
        path = folder / "photos.toml"
        text = RECIPE.format(root=shared_photos, epochs=epochs, every="5 iterations")
        path.write_text(text.replace("seed = 3", f"seed = {seed}"))
        return path

    return write
