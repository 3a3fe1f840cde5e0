"""A pipeline whose champion is a linear stage: after more pictures it is fitted again, and only those go through the net."""

import re
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deploy.ticks import Ticks
from tests.end_to_end.command import vggrow
from tests.pipelines.photo_folders import make_photo_folder
from tests.training.small_published import publish
from training.store import open_store, read_json

RECIPE = """
name = "photos"
[data]
root = "photos"
[net]
width = 0.0625
crop = 32
initialise = "he"
[train]
max_epochs = 1
[[stage]]                            # so bad that the linear stage is chosen
name = "A-32"
net = "A"
scale = 32
learning_rate = 1e-9
[[stage]]
name = "linear"
net = "A"
width = 1.0
head = "linear"
init_from = "weights:small/a"
fit = "logistic"
features = { groups = [1, 2], scales = [32] }
[evaluate]
stages = ["A-32", "linear"]
protocol = "centre"
views = "flips"
[register]
stage = "best on val"
"""
PIPELINE = """
name = "weekly"
recipe = "photos.toml"
[start]
warm = "champion"
learning_rate = 1e-9
[gate]                 # one use, and a lenient one: 15 gate pictures could not show a gain otherwise
alpha = 0.5
planned_uses = 1
max_class_drop = 1.0
[run]
store = "store"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tick is done: a linear stage is champion of three classes."""
    home = tmp_path_factory.mktemp("retrain-linear")
    photos = make_photo_folder(home / "photos", per_class=12, split=True, size=(48, 72))
    shutil.copytree(make_photo_folder(home / "gate", per_class=5, size=(48, 72), seed=1), photos / "gate")
    publish(open_store(home / "store"))
    (home / "photos.toml").write_text(RECIPE)
    (home / "pipeline.toml").write_text(PIPELINE)
    done = vggrow("retrain", home / "pipeline.toml")
    assert done.returncode == 0, done.stderr
    return home


def test_a_linear_champion_is_fitted_again_and_only_new_pictures_go_through_the_net(folder: Path, tmp_path: Path) -> None:
    store = folder / "store"
    more = make_photo_folder(tmp_path / "more", per_class=4, size=(48, 72), seed=2)
    for path in more.glob("*/*.jpg"):
        shutil.copy(path, folder / "photos" / "train" / path.parent.name / f"more-{path.name}")

    second = vggrow("retrain", folder / "pipeline.toml")

    assert second.returncode == 0, second.stderr
    one, two = Ticks.of(open_store(store), "weekly").all()
    assert (one.outcome, one.records["register"]["stage"]) == ("promoted", "linear")
    assert two.outcome in ("promoted", "refused") and two.records["register"]["stage"] == "linear-warm"
    assert "start: stage linear from version 1, the champion" in second.stdout
    assert re.findall(r"features of (\w+): (\d+) pictures computed", second.stderr) == [("train", "12")]
    about = read_json(store / "stages" / two.records["register"]["stage_key"] / "stage.json")
    assert about is not None and about["stage"]["init_from"] == f"stage:{one.records['register']['stage_key']}"
    assert two.records["gate"]["decision"]["use"] is not None       # asked, with both models' answers to the gate pictures
    aliases = MlflowClient(f"sqlite:///{store / 'mlflow.db'}").get_registered_model("photos").aliases
    assert str(aliases["champion"]) == ("2" if two.outcome == "promoted" else "1")


@pytest.mark.slow
def test_after_a_class_that_is_no_longer_made_the_whole_schedule_is_trained_on_the_others(folder: Path) -> None:
    for place in (folder / "photos").glob("*/coffee"):
        shutil.rmtree(place)

    stopped = vggrow("retrain", folder / "pipeline.toml")
    accepted = vggrow("retrain", folder / "pipeline.toml", "--accept", "coffee is no longer made")

    assert stopped.returncode == 2 and "class 'coffee' is gone" in stopped.stdout + stopped.stderr
    assert accepted.returncode in (0, 3), accepted.stdout + accepted.stderr
    last = Ticks.of(open_store(folder / "store"), "weekly").all()[-1]
    assert last.records["decide"]["accepted"] == "coffee is no longer made" and last.finished
    about = read_json(folder / "store" / "stages" / last.records["register"]["stage_key"] / "stage.json")
    assert about is not None and about["classes"] == ["cat", "flower"] and about["stage"]["name"] == "linear"
