"""A pipeline whose champion is a linear stage: after more pictures it is fitted again, and only those go through the net."""

import re
import shutil
from pathlib import Path

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


def test_a_linear_champion_is_fitted_again_and_only_new_pictures_go_through_the_net(tmp_path: Path) -> None:
    photos, store = make_photo_folder(tmp_path / "photos", per_class=12, split=True, size=(48, 72)), tmp_path / "store"
    shutil.copytree(make_photo_folder(tmp_path / "gate", per_class=5, size=(48, 72), seed=1), photos / "gate")
    publish(open_store(store))
    (tmp_path / "photos.toml").write_text(RECIPE)
    (tmp_path / "pipeline.toml").write_text(PIPELINE)

    first = vggrow("retrain", tmp_path / "pipeline.toml")
    more = make_photo_folder(tmp_path / "more", per_class=4, size=(48, 72), seed=2)
    for path in more.glob("*/*.jpg"):
        shutil.copy(path, photos / "train" / path.parent.name / f"more-{path.name}")
    second = vggrow("retrain", tmp_path / "pipeline.toml")

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
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
