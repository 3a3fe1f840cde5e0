"""From a stage's result to a model version's files: weights, model.json, served_model.py, and their way into a run."""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus, Run
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property
from torch import Tensor, nn

from deploy import served_model
from deploy.tracking_address import using_tracking
from pipelines.colour import Colour
from vggcore.errors import RegistryError, StoreError
from vggcore.nets import Vgg, net_modules
from vggcore.recipe import Features, TestProtocol, TestViews
from vggcore.schedule import Stage
from vggcore.view_average import effective_views, turned_views
from vggcore.weights import save_weights
from vggcore.whole_file import write_json, write_text

MODEL_FILE, WEIGHTS_FILE, CODE_FILE = "model.json", "model.safetensors", "served_model.py"
LOGGED_NAME = "model"                   # the logged model's name in its run: runs:/<run id>/model
PACKAGE_TAG = "vggrow.package"          # on a logged model: the digest of its files, so that it comes in once
CHECKED_TAG = "vggrow.checked"          # on a logged model that loaded and predicted in a bare process
LIBRARIES = ("mlflow", "torch", "safetensors", "pillow", "numpy", "pandas")   # all that served_model.py imports
CHECK_S = 600                           # seconds for loading and predicting once: D from a slow server takes a while

TOP = Object([Property("class", DataType.string), Property("probability", DataType.double)])
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "image")]),
    outputs=Schema(
        [ColSpec(DataType.string, "class"), ColSpec(DataType.double, "probability"), ColSpec(Array(TOP), "top")]
    ),
    params=ParamSchema([ParamSpec("top_k", DataType.long, served_model.TOP_K)]),
)

# Run where our packages cannot be imported, installed or not: argv is the model's URI.
CHECK = """
import sys
sys.modules.update(dict.fromkeys(("vggcore", "pipelines", "training", "deploy")))   # None: importing one is an error
import base64, gc, io, json, mlflow, pandas
from PIL import Image
encoded = io.BytesIO()
Image.linear_gradient("L").save(encoded, "PNG")
model = mlflow.pyfunc.load_model(sys.argv[1])
table = pandas.DataFrame({"image": [base64.b64encode(encoded.getvalue()).decode()]})
print("ANSWER " + json.dumps(model.predict(table, params={"top_k": 1000000})["top"][0]), flush=True)
gc.freeze()                       # see deploy.cli.main
"""


def write_package(
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    classes: Sequence[str],
    colour: Colour,
    protocol: TestProtocol,
    scales: Sequence[int],
    views: TestViews = "none",
    lineage: Mapping[str, Any],
) -> None:
    """Writes model.safetensors, model.json and served_model.py to `folder`, each whole or not at all.

    state: the weights under torchvision's names. settings: a resolved stage, as stage.json has it under "stage".
    scales: test scales Q in pixels, none below the crop where the net has one. views: over which posteriors are averaged.
    lineage: where the model comes from, JSON. Raises StoreError where the weights are not those of the net that the settings
    describe.
    """
    description = describe_model(
        settings=settings, classes=classes, colour=colour, protocol=protocol, scales=scales, views=views, lineage=lineage
    )
    check_state(state, settings, classes)
    save_weights(dict(state), folder / WEIGHTS_FILE)
    write_text(folder / CODE_FILE, Path(served_model.__file__).read_text(encoding="utf-8"))
    write_json(folder / MODEL_FILE, description)


def describe_model(
    *,
    settings: Mapping[str, Any],
    classes: Sequence[str],
    colour: Colour,
    protocol: TestProtocol,
    scales: Sequence[int],
    views: TestViews = "none",
    lineage: Mapping[str, Any],
) -> dict[str, Any]:
    """What model.json holds; the arguments are write_package's."""
    crop, features = settings["crop"], settings.get("features")
    assert scales and (features or min(scales) >= crop), f"test scales {list(scales)} at crop {crop}"
    return {
        "format": served_model.FORMAT,
        "net": settings["net"],
        "classes": list(classes),
        "crop": crop,
        "mean": [float(level) for level in colour.mean],
        "deviation": [float(level) for level in colour.deviation] if settings["standardise"] else None,
        **({"view": "whole"} if settings.get("view") == "whole" else {}),
        "protocol": {
            "name": protocol,
            "scales": [int(scale) for scale in scales],
            **({"flip": bool(features["flip"])} if features else {}),
            **described_views(views, protocol, settings),
        },
        "layers": flat_layers(settings, classes),
        "lineage": dict(lineage),
        "stage": dict(settings),
    }


def described_views(views: TestViews, protocol: TestProtocol, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a protocol says of its views, their name and each one as [mirrored, quarter turns]; nothing where it adds none."""
    stage = Stage.model_validate_json(json.dumps(settings))
    views = effective_views(views, protocol, stage)
    if views == "none":
        return {}
    return {"views": views, "turned": [list(one) for one in turned_views(views, protocol, stage)]}


def empty_net(settings: Mapping[str, Any], classes: Sequence[str]) -> Vgg:
    """The net that the settings describe, without any memory for weights."""
    features = settings.get("features")      # packages of before linear heads have none
    with torch.device("meta"):
        return net_modules(
            settings["net"],
            classes=len(classes),
            features=Features.model_validate_json(json.dumps(features)) if features else None,
            **{name: settings[name] for name in ("head", "width", "crop", "dropout")},
        )


def check_state(state: Mapping[str, Tensor], settings: Mapping[str, Any], classes: Sequence[str]) -> None:
    """StoreError that names the first weight that is missing, unknown or of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in empty_net(settings, classes).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise StoreError(
                f"weights of net {settings['net']}: {name} is {found.get(name, 'absent')},"
                f" wanted {wanted.get(name, 'no such weight')}; they belong to another net, width, crop or class list"
            )


def flat_layers(settings: Mapping[str, Any], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The net as served_model.run_layers walks it: a dict a layer, weights by name; dropout is left out."""
    net = empty_net(settings, classes)
    layers: list[dict[str, Any]] = []
    for part in ("features", "classifier"):
        if part == "classifier" and net.head == "compact":
            layers.append({"kind": "average_pool", "window": net.map_side})
        for name, module in net.get_submodule(part).named_modules(prefix=part):
            weights = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
            match module:
                case nn.Conv2d():
                    layers.append({"kind": "conv", **weights, "padding": module.padding[0]})
                case nn.ReLU():
                    layers.append({"kind": "relu"})
                case nn.LocalResponseNorm(size=size, alpha=alpha, beta=beta, k=k):
                    layers.append({"kind": "lrn", "size": size, "alpha": alpha, "beta": beta, "k": k})
                case nn.MaxPool2d():
                    layers.append({"kind": "max_pool", "window": module.kernel_size, "stride": module.stride})
                    if int(name.removeprefix("features.")) in net.taps:
                        layers.append({"kind": "pool_places", "how": settings["features"]["pool"]})
                case nn.Linear():
                    first_of_paper = net.head == "paper" and all(layer["kind"] != "linear" for layer in layers)
                    layers.append({"kind": "linear", **weights, "window": net.map_side if first_of_paper else 1})
    return layers


def log_package(*, tracking: str, run_id: str, folder: Path) -> str:
    """Logs a package as a model of the run, loads and predicts once in a process without our packages; gives its URI.

    The URI is models:/<model id>. The run's state stays as it is, active or not. A package that the run already has is
    not logged again, and one that was broken off is removed. Raises RegistryError, and removes the logged model, when it
    does not load or does not predict.
    """
    client = MlflowClient(tracking)
    run = client.get_run(run_id)
    digest = package_digest(folder)
    logged = find_logged(client, run, digest)
    if logged is None:
        # Made by the client, in the run's own experiment: log_model itself would take the active one, or number 0 and
        # its ./mlruns (MLflow 3.17.2).
        logged = client.create_logged_model(
            run.info.experiment_id, name=LOGGED_NAME, source_run_id=run_id, tags={PACKAGE_TAG: digest}
        )
        upload(tracking, logged, folder)
    if CHECKED_TAG not in logged.tags:
        try:
            check_logged(tracking, logged.model_uri, folder)
        except RegistryError:
            client.delete_logged_model(logged.model_id)   # else runs:/<run id>/model would be this one
            raise
        client.set_logged_model_tags(logged.model_id, {CHECKED_TAG: "loaded and predicted"})
    return str(logged.model_uri)


def find_logged(client: MlflowClient, run: Run, digest: str) -> LoggedModel | None:
    """The run's logged model of this package; those whose upload was broken off are removed."""
    ready = None
    for logged in client.search_logged_models(
        [run.info.experiment_id],
        filter_string=f"tags.`{PACKAGE_TAG}` = '{digest}' AND source_run_id = '{run.info.run_id}'",
    ):
        if logged.status == LoggedModelStatus.READY:
            ready = logged
        else:
            client.delete_logged_model(logged.model_id)
    return ready


def upload(tracking: str, logged: LoggedModel, folder: Path) -> None:
    """Fills a logged model with the package as a pyfunc model from code."""
    description = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    with using_tracking(tracking), warnings.catch_warnings():
        warnings.simplefilter("ignore")   # MLflow advises an input example, which it would load the whole model to try
        Model.log(
            artifact_path=None,
            name=LOGGED_NAME,
            flavor=mlflow.pyfunc,
            run_id=logged.source_run_id,
            model_id=logged.model_id,
            python_model=str(folder.absolute() / CODE_FILE),
            artifacts={
                "model": str(folder.absolute() / MODEL_FILE),
                "weights": str(folder.absolute() / WEIGHTS_FILE),
            },
            signature=SIGNATURE,
            pip_requirements=pinned_requirements(),
            metadata=description["lineage"],
        )


def package_digest(folder: Path) -> str:
    """32 hex characters over the package's three files."""
    whole = blake2b(digest_size=16)
    for name in (MODEL_FILE, WEIGHTS_FILE, CODE_FILE):
        content = blake2b(digest_size=32)
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                content.update(chunk)
        whole.update(content.digest())
    return whole.hexdigest()


def pinned_requirements() -> list[str]:
    """served_model.py's libraries as installed here; a build's local part (+cpu, +cu130) is on no package index."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in LIBRARIES]


def check_logged(tracking: str, model_uri: str, folder: Path) -> None:
    """Loads a logged model and predicts once in a bare process: no pickle, none of our packages; else RegistryError."""
    classes = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))["classes"]
    with tempfile.TemporaryDirectory() as elsewhere:
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": tracking,
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "TMPDIR": elsewhere,   # what MLflow downloads from a server goes there, and with it
        }
        done = subprocess.run(
            [sys.executable, "-I", "-c", CHECK, model_uri],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHECK_S,
            check=False,
        )
    answers = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if done.returncode != 0 or len(answers) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RegistryError(f"{model_uri}: the packaged model does not load and predict on its own: {last[:300]}")
    top = json.loads(answers[0])
    total = sum(row["probability"] for row in top)
    if sorted(row["class"] for row in top) != sorted(classes) or not abs(total - 1) < 1e-3:
        raise RegistryError(
            f"{model_uri}: the packaged model answers {len(top)} classes with probabilities that add up to {total:.4f},"
            f" wanted {len(classes)} and 1; are its weights finite numbers?"
        )
