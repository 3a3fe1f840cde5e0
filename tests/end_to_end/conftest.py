"""What the end-to-end tests share: a folder of real JPEGs and a small recipe for it."""

from pathlib import Path

import pytest

from tests.pipelines.photo_folders import make_photo_folder

RECIPE = """
name = "photos"
seed = 3
[data]
root = "{root}"
standardise = true
[net]
width = 0.0625
crop = 32
dropout = 0.2
initialise = "he"
[train]
global_batch = 9
learning_rate = 1e-3
patience = 100
max_epochs = {epochs}
checkpoint_every = "{every}"
[[stage]]
name = "A-36"
net = "A"
scale = 36
"""


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """train/ val/ test/ with three classes of colour JPEGs: 60, 15 and 15 pictures."""
    return make_photo_folder(tmp_path_factory.mktemp("photos"), per_class=20, split=True, size=(48, 72))


@pytest.fixture
def make_recipe(photos, tmp_path):
    """Writes a recipe for the photos: one stage of a narrow net A at crop 32."""

    def make(*, epochs: int = 2, every: str = "5min", more: str = "", name: str = "photos.toml") -> Path:
        path = tmp_path / name
        path.write_text(RECIPE.format(root=photos, epochs=epochs, every=every) + more)
        return path

    return make
