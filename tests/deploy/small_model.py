"""A very small net with known random weights, its package, and a store in which it is logged and registered."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from deploy.package import log_package, write_package
from deploy.registry import register_candidate
from deploy.tracking_address import artifact_location, check_tracking, resolve_tracking
from pipelines.colour import Colour
from vggcore.initialise import initialise_net
from vggcore.nets import Vgg, build_net
from vggcore.recipe import Features, Head, NetName
from vggcore.schedule import Stage
from vggcore.weights import save_weights

CLASSES = ("brick", "coffee", "grass")
COLOUR = Colour(
    mean=np.array([121.0, 110.5, 98.25]),
    deviation=np.array([61.0, 58.5, 63.0]),
    axes=np.eye(3),
    eigenvalues=np.array([0.05, 0.01, 0.002]),
)
STAGE_KEY = "0123456789abcdef"
FINGERPRINT = "f" * 32


def stage_settings(net: NetName = "A", head: Head = "paper", **changes: Any) -> dict[str, Any]:
    """A resolved stage at width 1/16 and crop 64, as stage.json has it."""
    stage = Stage(
        name=f"{net}-72", net=net, scale=(72, 72), init_from=None, seed=3, head=head, width=1 / 16, crop=64, dropout=0.5,
        initialise="he", standardise=True, flip=True, colour=0.1, global_batch=8, momentum=0.9, weight_decay=5e-4,
        learning_rate=1e-2, drops=3, patience=5, max_epochs=2, precision="fp32", channels_last=True, compile=False,
        micro_batch=0, checkpoint_every={"seconds": 300.0},
    )  # fmt: skip
    return {**stage.model_dump(mode="json"), **changes}


def small_net(settings: dict[str, Any]) -> Vgg:
    """The net of these settings in eval mode, with He's weights and biases that are not zero."""
    shape = {name: settings[name] for name in ("head", "width", "crop", "dropout")}
    if settings["features"]:
        shape["features"] = Features.model_validate_json(json.dumps(settings["features"]))
    net = build_net(settings["net"], classes=len(CLASSES), **shape)
    initialise_net(net, "he", width=settings["width"], seed=settings["seed"], name=settings["name"])
    for place, (name, parameter) in enumerate(net.named_parameters()):
        if name.endswith("bias"):
            parameter.data += 0.01 * (place % 5 - 2)
    return net.eval()


def package(folder: Path, settings: dict[str, Any], /, **changes: Any) -> Vgg:
    """Writes the package of small_net(settings), dense at 64 and 80, with the arguments changed; gives the net."""
    net = small_net(settings)
    arguments = {
        "state": net.state_dict(),
        "settings": settings,
        "classes": CLASSES,
        "colour": COLOUR,
        "protocol": "dense",
        "scales": (64, 80),
        "lineage": {"stage_key": STAGE_KEY, "fingerprint": FINGERPRINT},
    }
    write_package(folder, **{**arguments, **changes})
    return net


def noise(seed: int, height: int = 90, width: int = 131) -> np.ndarray:
    """A picture (height, width, 3) uint8 of soft random blobs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Logged:
    """A store with one package, logged and registered as champion of model "small", and one finished stage."""

    store: Path
    tracking: str
    package: Path
    run_id: str
    model_uri: str
    pictures: list[Path]

    @property
    def model_folder(self) -> Path:
        """Where the logged model's files lie in a store without a server."""
        return self.store / "artifacts" / "models" / self.model_uri.removeprefix("models:/") / "artifacts"


def log_small(store: Path, tracking: str, pictures: list[Path]) -> Logged:
    """Packages, logs and registers the small net at `tracking`."""
    check_tracking(tracking)
    client = MlflowClient(tracking)
    experiment = client.create_experiment("small", artifact_location=artifact_location(tracking, store))
    run = client.create_run(experiment)
    client.set_terminated(run.info.run_id)
    package(store / "package", stage_settings())
    model_uri = log_package(tracking=tracking, run_id=run.info.run_id, folder=store / "package")
    register_candidate(
        client, store=store, name="small", model_uri=model_uri, run_id=run.info.run_id, stage_key=STAGE_KEY,
        tags={"vggrow.net": "A"}, test_top1=0.8, floor=0.5,
    )  # fmt: skip
    return Logged(store, tracking, store / "package", run.info.run_id, model_uri, pictures)


def write_stage(store: Path, *, key: str = STAGE_KEY, name: str = "A-72") -> None:
    """A finished stage of the store, as training leaves it, with the small net's weights."""
    settings = {**stage_settings(), "name": name}
    folder = store / "stages" / key
    save_weights(small_net(stage_settings()).state_dict(), folder / "checkpoints" / "iteration-7" / "model.safetensors")
    about = {"stage": settings, "name": name, "key": key, "parent": None, "fingerprint": FINGERPRINT}
    (folder / "stage.json").write_text(json.dumps({**about, "classes": CLASSES}))
    (folder / "result.json").write_text(json.dumps({"checkpoint": "iteration-7", "val_top1_accuracy": 0.8}))
    data = store / "data" / FINGERPRINT
    data.mkdir(parents=True, exist_ok=True)
    (data / "colour.json").write_text(json.dumps(COLOUR.to_json()))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three picture files of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "wide.png", folder / "tall.jpg", folder / "square.bmp"]
    for seed, (path, (height, width)) in enumerate(zip(paths, ((90, 131), (200, 70), (64, 64)), strict=True)):
        Image.fromarray(noise(seed, height, width)).save(path)
    return paths


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite file with MLflow's tables and nothing in them, to be copied: making them takes seconds."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def logged(tmp_path_factory: pytest.TempPathFactory, pictures: list[Path], empty_database: Path) -> Logged:
    """The small net in a sqlite store; logged from an empty working folder, which must stay empty."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    store, empty = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("empty")
    shutil.copy(empty_database, store / "mlflow.db")
    before = Path.cwd()
    os.chdir(empty)
    try:
        found = log_small(store, resolve_tracking(None, store), pictures)
    finally:
        os.chdir(before)
    assert list(empty.iterdir()) == [], "MLflow wrote to the working folder"
    write_stage(store)
    return found
