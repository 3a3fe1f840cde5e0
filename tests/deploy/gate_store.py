"""A store with a real gate list and models of known skill: one tells red from blue pictures, the other always says blue."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from PIL import Image

import deploy.decision_record
from deploy.cli import main
from deploy.contenders import compare
from deploy.decision_history import history
from deploy.package import upload, write_package
from deploy.promote import Outcome, promote
from deploy.registry import CHALLENGER, CHAMPION, MODEL_ID_TAG, STAGE_KEY_TAG, TOP1_TAG
from deploy.tracking_address import artifact_location, check_tracking, resolve_tracking, using_tracking
from pipelines.gate_list import GateList, read_gate
from pipelines.manifest import Manifest
from pipelines.scan import scan
from tests.deploy.small_model import stage_settings
from training.store import Store
from vggcore.nets import build_net
from vggcore.recipe import Data, Split
from vggcore.weights import save_weights
from vggcore.whole_file import write_json, write_text

CLASSES = ("blue", "red")
SPLIT = Split(by="stratified", val=0.1, test=0.2, gate=0.2)
SETTINGS = stage_settings(head="compact", crop=32, scale=(32, 32), standardise=False, dropout=0.0)
# Stage keys by what the model does; "leaky" is skilled too, but its parent learnt from gate pictures.
SAYER, SKILLED, LEAKY, LEAKY_PARENT, BARE = "a" * 16, "b" * 16, "c" * 16, "d" * 16, "e" * 16
SKILL = {SAYER: False, SKILLED: True, LEAKY: True, BARE: True}


def state(*, skilled: bool, classes: int = 2) -> dict[str, torch.Tensor]:
    """Weights that hand the red channel above its mean through every layer; without skill the last layer ignores it."""
    net = build_net("A", classes=classes, head="compact", width=1 / 16, crop=32, dropout=0.0)
    weights = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    for name, value in weights.items():
        if value.ndim == 4:
            value[0, 0, 1, 1] = 1.0
        elif name == "classifier.1.weight":
            value[0, 0] = 1.0
    weights["classifier.4.bias"][0] = 1.0
    weights["classifier.4.weight"][1, 0] = 0.1 if skilled else 0.0
    return weights


def make_pictures(root: Path, *, each: int = 60, seed: int = 0) -> Path:
    """blue/ and red/ with `each` PNG pictures of coarse noise, no two alike."""
    draws = np.random.default_rng(seed)
    for label, low, high in (("blue", 0, 80), ("red", 170, 255)):
        (root / label).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            coarse = draws.integers(0, 256, (9, 10, 3), dtype=np.uint8)
            coarse[:, :, 0] = draws.integers(low, high, (9, 10), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC)
            picture.save(root / label / f"{label}-{seed}-{number:03}.png")
    return root


def write_stage(store: Path, key: str, fingerprint: str, *, parent: str | None = None) -> None:
    """A finished stage as training leaves it, on record in a schedule of its own."""
    folder = store / "stages" / key
    save_weights(state(skilled=SKILL.get(key, True)), folder / "checkpoints" / "iteration-1" / "model.safetensors")
    about = {"stage": SETTINGS, "name": f"A-{key[0]}", "key": key, "fingerprint": fingerprint, "classes": CLASSES}
    write_json(folder / "stage.json", {**about, "parent": parent and {"net": "A", "key": parent}})
    write_json(folder / "result.json", {"checkpoint": "iteration-1", "val_top1_accuracy": 0.8})
    schedule = store / "schedules" / key
    write_text(schedule / "recipe.toml", "# as given\n")
    stages = [{"name": about["name"], "key": key}]
    write_json(schedule / "stages.json", {"stages": stages, "versions": {"torch": torch.__version__}})


def write_model(folder: Path, manifest: Manifest, key: str, *, classes: tuple[str, ...] = CLASSES, **changes: Any) -> Path:
    """The package of the model with this stage key."""
    arguments = {
        "state": state(skilled=SKILL[key], classes=len(classes)),
        "settings": SETTINGS,
        "classes": classes,
        "colour": manifest.colour,
        "protocol": "centre",
        "scales": (32,),
        "lineage": {"stage_key": key, "fingerprint": manifest.fingerprint},
    }
    write_package(folder, **{**arguments, **changes})
    return folder


@dataclass
class GateStore:
    """A store, its MLflow, and the logged models by stage key."""

    root: Path
    tracking: str
    client: MlflowClient
    run_id: str
    models: dict[str, str]       # stage key: model id
    pictures: Path

    @property
    def store(self) -> Store:
        return Store(self.root)

    @property
    def gate(self) -> GateList:
        """The list in force."""
        (home,) = (self.root / "gates").iterdir()
        found = read_gate(home)
        assert found is not None
        return found

    def log(self, name: str, folder: Path) -> None:
        """A package as one more logged model of the run, known as `name`."""
        experiment = self.client.get_run(self.run_id).info.experiment_id
        logged = self.client.create_logged_model(experiment, name="model", source_run_id=self.run_id)
        upload(self.tracking, logged, folder)
        self.models[name] = logged.model_id

    def register(self, name: str, *keys: str, tagged: str | None = None, top1: float = 0.8) -> None:
        """Registers models as versions 1, 2, ... of `name`: the first is champion, the last challenger."""
        self.client.create_registered_model(name)
        for number, key in enumerate(keys, start=1):
            model_id = self.models[key]
            tags = {STAGE_KEY_TAG: tagged or key, MODEL_ID_TAG: model_id, TOP1_TAG: f"{top1}"}
            with using_tracking(self.tracking):
                self.client.create_model_version(
                    name, source=f"models:/{model_id}", run_id=self.run_id, tags=tags, model_id=model_id
                )
            if number in (1, len(keys)):
                alias = CHAMPION if number == 1 else CHALLENGER
                self.client.set_registered_model_alias(name, alias, str(number))

    def aliases(self, name: str) -> dict[str, str]:
        return {alias: str(version) for alias, version in self.client.get_registered_model(name).aliases.items()}

    def tags(self, name: str, version: str) -> dict[str, str]:
        return dict(self.client.get_model_version(name, version).tags)

    def history(self, name: str) -> list[dict[str, Any]]:
        return history(self.store, name)

    def decision(self) -> dict[str, Any]:
        """decision.json on the run."""
        with using_tracking(self.tracking):
            uri = f"runs:/{self.run_id}/decision.json"
            return dict(mlflow.artifacts.load_dict(uri))


def build(root: Path, tracking: str, keys: tuple[str, ...]) -> GateStore:
    """Pictures scanned with a gate, stages, and the models of `keys` logged at `tracking`, without the check that loads."""
    check_tracking(tracking)
    store, pictures = root / "store", make_pictures(root / "pictures")
    manifest = scan(Data(root=pictures, split=SPLIT), store, threads=1)
    elsewhere = scan(Data(root=pictures, split=Split(by="hash")), root / "elsewhere", threads=1)   # knows no gate
    shutil.copytree(root / "elsewhere" / "data" / elsewhere.fingerprint, store / "data" / elsewhere.fingerprint)
    for key, fingerprint, parent in (
        (SAYER, manifest.fingerprint, None),
        (SKILLED, manifest.fingerprint, SAYER),
        (LEAKY, manifest.fingerprint, LEAKY_PARENT),
        (LEAKY_PARENT, elsewhere.fingerprint, None),
        (BARE, elsewhere.fingerprint, None),
    ):
        write_stage(store, key, fingerprint, parent=parent)
    client = MlflowClient(tracking)
    experiment = client.create_experiment("gate", artifact_location=artifact_location(tracking, store))
    run_id = client.create_run(experiment).info.run_id
    client.set_terminated(run_id)
    models = {}
    for key in keys:
        folder = write_model(root / "packages" / key, manifest, key)
        logged = client.create_logged_model(experiment, name="model", source_run_id=run_id)
        upload(tracking, logged, folder)
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        models[key] = logged.model_id
    return GateStore(store, tracking, client, run_id, models, pictures)


def copy_of(made: GateStore, root: Path) -> GateStore:
    """The same store for one test: files copied, the database with them; logged models are read where they were."""
    shutil.copytree(made.root, root / "store")
    tracking = f"sqlite:///{root / 'store' / 'mlflow.db'}"
    return GateStore(root / "store", tracking, MlflowClient(tracking), made.run_id, dict(made.models), made.pictures)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, SQLite's own apart: reading writes there too."""
    files = [path for path in folder.rglob("*") if path.is_file() and "mlflow.db" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "locks" not in path.parts}


def show(store: GateStore, name: str) -> str:
    """Everything the registry holds about a model, to compare before and after."""
    model = store.client.get_registered_model(name)
    found = [(v.version, dict(v.tags), v.description) for v in store.client.search_model_versions(f"name = '{name}'")]
    return json.dumps([dict(model.aliases), sorted(found)], sort_keys=True)


def decide_on(shelf: GateStore, model: str = "solar", **how: Any) -> Outcome:
    """Asks the gate, as Ann."""
    return promote(shelf.client, store=shelf.store, model=model, by="ann", **how)


def fingerprint_of(shelf: GateStore, key: str) -> str:
    """Of the pictures that a stage learnt from."""
    return str(json.loads((shelf.root / "stages" / key / "stage.json").read_text())["fingerprint"])


def entry_point(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of the vggrow command, by its real entry point in this process: the libraries are loaded here."""
    monkeypatch.setattr("sys.argv", ["vggrow", *map(str, words)])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


class Killed(BaseException):
    """As SIGKILL: nothing of ours may catch it."""


def killed_at(line: int, act: Callable[[], object]) -> bool:
    """Runs `act` and stops it before the line-th line of what changes anything; whether it came that far."""
    return killed_or_counted(line, act)[0]


def killed_or_counted(line: int, act: Callable[[], object]) -> tuple[bool, int]:
    """As killed_at, with how many such lines there were."""
    names = ("begin", "finish", "with_copy", "record", "move_champion", "move_back", "drop_challenger")
    codes = {getattr(deploy.decision_record, name).__code__ for name in names}
    lines = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal lines
        if frame.f_code not in codes:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except Killed:
        return True, lines
    finally:
        sys.settrace(before)
    return False, lines


@pytest.fixture(scope="session")
def made_shelf(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> GateStore:
    """The store that each test gets a copy of."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    root = tmp_path_factory.mktemp("gate")
    (root / "store").mkdir()
    shutil.copy(empty_database, root / "store" / "mlflow.db")
    found = build(root, resolve_tracking(None, root / "store"), (SAYER, SKILLED, LEAKY, BARE))
    packages = [str(root / "packages" / key) for key in (SKILLED, SAYER)]
    compare(found.client, store=found.store, a=packages[0], b=packages[1])   # the scores are kept in the store from now on
    return found


@pytest.fixture
def shelf(made_shelf: GateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GateStore]:
    """A copy, used from an empty working folder, which must stay empty."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    yield copy_of(made_shelf, tmp_path)
    assert list((tmp_path / "empty").iterdir()) == []
