"""New class folders beside a champion's: order kept, rows kept, a person asked, the new class answered; killed on the way."""

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from deploy.ticks import Tick, Ticks
from tests.end_to_end.command import Running, vggrow, wait_until
from tests.end_to_end.conftest import RECIPE
from tests.pipelines.photo_folders import make_photo_folder
from training.store import Store
from vggcore.weights import load_weights

# A first champion that has learnt next to nothing, so that 24 gate pictures can show that the next one is better.
PIPELINE = """
name = "growing"
recipe = "photos.toml"
[start]
warm = "champion"
learning_rate = 1e-3
[gate]
alpha = 0.5
planned_uses = 4
max_class_drop = 1.0
new_classes = "{who}"
[run]
store = "store"
"""
SPLITS = ("train", "val", "test")
COLOURS = {"cat": (1, 0.2, 0.2), "flower": (0.2, 1, 0.2), "aardvark": (0.2, 0.2, 1), "ant": (1, 1, 0.2), "bee": (0.2, 1, 1)}


@dataclass
class Growing:
    """A pipeline on photographs whose classes become more."""

    folder: Path

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    @property
    def pipeline(self) -> Path:
        return self.folder / "pipeline.toml"

    def decided_by(self, who: str) -> None:
        self.pipeline.write_text(PIPELINE.format(who=who))

    def ticks(self) -> list[Tick]:
        return Ticks.of(self.store, "growing").all()

    def aliases(self) -> dict[str, str]:
        client = MlflowClient(f"sqlite:///{self.store.root / 'mlflow.db'}")
        return {alias: str(version) for alias, version in client.get_registered_model("photos").aliases.items()}

    def stage(self, tick: Tick) -> dict:
        return json.loads((self.store.stage(tick.records["register"]["stage_key"]) / "stage.json").read_text())

    def add_class(self, name: str, source: str, seed: int, *, only: int | None = None) -> None:
        """A new class: crops of one photograph in a colour of its own; only: so many pictures, all to train on."""
        made = make_photo_folder(self.folder / f"more-{name}", per_class=12, split=True, size=(48, 72), seed=seed)
        for split in SPLITS if only is None else SPLITS[:1]:
            shutil.copytree(made / split / source, self.photos / split / name)
            for path in sorted((self.photos / split / name).iterdir())[only or 1000 :]:
                path.unlink()
        tint(self.photos, name)


def tint(photos: Path, name: str) -> None:
    """Gives each picture of a class that class's colour, so that so small a net tells them apart within a few epochs."""
    for path in photos.glob(f"*/{name}/*.jpg"):
        pixels = np.asarray(Image.open(path)) * np.array(COLOURS[name])
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)


def last_rows(store: Store, key: str) -> list[list[float]]:
    """The first weights of the last layer's rows, as far as training has left them."""
    checkpoint = json.loads((store.stage(key) / "result.json").read_text())["checkpoint"]
    weights = load_weights(store.stage(key) / "checkpoints" / checkpoint / "model.safetensors")
    return weights["classifier.6.weight"].tolist()


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> Iterator[Growing]:
    """The champion knows "cat" and "flower"."""
    found = Growing(tmp_path_factory.mktemp("growing"))
    make_photo_folder(found.photos, per_class=20, split=True, size=(48, 72))
    gate = make_photo_folder(found.folder / "more-gate", per_class=12, size=(48, 72), seed=1)
    shutil.copytree(gate, found.photos / "gate")
    for split in (*SPLITS, "gate"):
        shutil.rmtree(found.photos / split / "coffee")
    tint(found.photos, "cat")
    tint(found.photos, "flower")
    text = RECIPE.format(root=found.photos, epochs=20, every="5min").replace("learning_rate = 1e-3", "learning_rate = 1e-9")
    (found.folder / "photos.toml").write_text(text)
    found.decided_by("person")
    done = vggrow("retrain", found.pipeline, timeout_s=900)
    assert done.returncode == 0, done.stderr
    yield found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_third_folder_waits_for_a_person_whose_command_makes_it_champion(growing):
    growing.add_class("aardvark", "coffee", 2)
    waits = vggrow("retrain", growing.pipeline, timeout_s=900)
    tick, before = growing.ticks()[-1], growing.aliases()
    command = waits.stdout.partition("decision: run `")[2].partition("`")[0]
    promoted = vggrow(*shlex.split(command)[1:], timeout_s=900)
    history = vggrow("history", growing.pipeline)
    picture = min((growing.photos / "test" / "aardvark").iterdir())
    seen = vggrow("predict", "models:/photos@champion", picture, "--store", growing.store.root)

    assert waits.returncode == 0, waits.stderr
    assert "start: stage A-36 from version 1, the champion, with new class 'aardvark'" in waits.stdout
    assert (tick.number, tick.outcome) == (2, "waits for a person") and len(growing.ticks()) == 2
    assert "new class 'aardvark': recall " in waits.stdout and "new class 'aardvark': recall " in history.stdout
    assert before == {"champion": "1", "challenger": "2"}
    about = growing.stage(tick)
    assert about["classes"] == ["cat", "flower", "aardvark"] and about["stage"]["new_rows"] == "means"
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    assert "--force" not in command and growing.aliases() == {"champion": "2", "previous": "1"}
    assert seen.returncode == 0 and "aardvark" in seen.stdout.splitlines()[0], seen.stdout + seen.stderr
    schedule = growing.store.root / "schedules" / tick.records["register"]["schedule_key"]
    assert "New classes" in (schedule / "report.html").read_text()
    plan = vggrow("plan", schedule / "recipe.toml", "--store", growing.store.root, "--json")
    assert [stage["key"] for stage in json.loads(plan.stdout)["stages"]] == [about["key"]]   # the kept recipe says it all


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_more_at_once_one_of_a_single_picture_are_decided_by_the_gate_if_the_pipeline_says_so(growing, tmp_path):
    growing.add_class("bee", "cat", 4, only=1)
    growing.add_class("ant", "flower", 5)
    growing.decided_by("gate")
    record = growing.store.root / "retraining" / "growing" / "ticks" / "3" / "train.json"
    running = Running("retrain", growing.pipeline, log=tmp_path / "log")
    try:
        wait_until(lambda: record.exists() or running.process.poll() is not None, timeout_s=900)
    finally:
        running.kill_everything()
    left = growing.ticks()[-1].outcome

    done = vggrow("retrain", growing.pipeline, timeout_s=900)

    tick = growing.ticks()[-1]
    assert left == "unfinished: evaluate"
    assert done.returncode == 0, done.stderr
    assert tick.outcome in ("promoted", "refused") and tick.records["gate"]["decision"]["p_value"] is not None
    assert growing.stage(tick)["classes"] == ["cat", "flower", "aardvark", "ant", "bee"]
    assert "new class 'ant': " in done.stdout and "new class 'bee': no picture on test" in done.stdout
    assert growing.aliases()["champion"] == ("3" if tick.outcome == "promoted" else "2")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_by_hand_a_stage_of_the_store_brings_its_order_and_a_class_that_is_gone_is_refused(growing, tmp_path):
    key = growing.stage(growing.ticks()[1])["key"]
    photos = Path(shutil.copytree(growing.photos, tmp_path / "photos"))
    for split in SPLITS:
        for name in ("ant", "bee"):
            shutil.rmtree(photos / split / name, ignore_errors=True)
        shutil.copytree(photos / split / "cat", photos / split / "bat")
        (photos / split / "bat" / "cat-000.jpg").unlink()
    by_hand = tmp_path / "hand.toml"
    text = RECIPE.format(root=photos, epochs=1, every="5min").replace('initialise = "he"\n', "")
    by_hand.write_text(text + f'init_from = "stage:{key}"\nlearning_rate = 1e-12\n')

    done = vggrow("train", by_hand, "--store", growing.store.root, timeout_s=900)
    random = tmp_path / "random.toml"
    random.write_text(by_hand.read_text() + 'new_rows = "random"\n')
    plans = [vggrow("plan", path, "--store", growing.store.root, "--json") for path in (by_hand, random)]
    for split in SPLITS:
        shutil.rmtree(photos / split / "flower")
    gone = vggrow("train", by_hand, "--store", growing.store.root)

    assert done.returncode == 0, done.stderr
    keys = [json.loads(plan.stdout)["stages"][0]["key"] for plan in plans]
    about = json.loads((growing.store.stage(keys[0]) / "stage.json").read_text())
    assert about["classes"] == ["cat", "flower", "aardvark", "bat"] and keys[0] != keys[1]
    rows, parents = last_rows(growing.store, keys[0]), last_rows(growing.store, key)
    assert rows[:3] == [pytest.approx(row, abs=1e-6) for row in parents] and any(rows[3])
    assert gone.returncode == 2 and len(gone.stderr.strip().splitlines()[-1:]) == 1
    assert f"init_from 'stage:{key}' knows the classes cat, flower, aardvark" in gone.stderr
    assert "but the pictures have cat, aardvark, bat" in gone.stderr
