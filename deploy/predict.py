"""What a model says of pictures: any MODEL opened, wherever it lies, and answers by served_model.py's code alone."""

import base64
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from torch import Tensor

from deploy.package import LOGGED_NAME, MODEL_FILE, WEIGHTS_FILE, check_state, describe_model
from deploy.registry import get_version
from deploy.served_model import VggModel, decode_picture
from deploy.tracking_address import check_tracking, one_line, using_tracking
from training.parents import recorded_colour
from training.store import Store
from vggcore.errors import DatasetError, RegistryError, StoreError
from vggcore.recipe import nearest
from vggcore.schedule import Stage
from vggcore.weights import load_weights

logger = logging.getLogger(__name__)

PICTURES_AT_ONCE = 16   # encoded pictures held in memory at a time
STAGE_KEY = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Predictor:
    """An opened model: its class list in order, what model.json says of it, and where it was found."""

    model: str
    classes: tuple[str, ...]
    description: dict[str, Any]
    served: Any                      # what has predict(table, params=...): MLflow's pyfunc model, or Direct

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights under torchvision's names."""
        served = self.served.python_model if isinstance(self.served, Direct) else self.served.unwrap_python_model()
        return cast("dict[str, Tensor]", served.weights)

    def predict(self, paths: Sequence[Path | str], top_k: int = 5) -> list[dict[str, Any]]:
        """For each picture {"path": ..., "top": [{"class", "probability"}, ...]}, the most probable first.

        All pictures are decoded before the first is classified. Raises DatasetError that names a file that is absent or
        no picture; no answer is given then.
        """
        if top_k < 1:
            raise DatasetError(f"top-k is {top_k}, wanted 1 or more")
        for path in paths:
            check_picture(Path(path))
        answers = []
        for start in range(0, len(paths), PICTURES_AT_ONCE):
            some = paths[start : start + PICTURES_AT_ONCE]
            table = pd.DataFrame({"image": [base64.b64encode(Path(path).read_bytes()).decode() for path in some]})
            found = self.served.predict(table, params={"top_k": top_k})
            answers += [{"path": str(path), "top": top} for path, top in zip(some, found["top"], strict=True)]
        return answers


class Direct:
    """served_model.py run from its artifacts without an MLflow model around them."""

    def __init__(self, *, model: Path, weights: Path) -> None:
        self.context = SimpleNamespace(artifacts={"model": str(model), "weights": str(weights)})
        self.python_model = cast(Any, VggModel())
        self.python_model.load_context(self.context)

    def predict(self, table: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        """As MLflow's pyfunc model."""
        return cast(pd.DataFrame, self.python_model.predict(self.context, table, params))


def open_model(model: str, *, store: Path, tracking: str, known: Sequence[str] = ()) -> Predictor:
    """Opens MODEL: models:/name@alias, models:/name/version, runs:/<run id>[/path], a folder, or a stage of the store.

    A folder holds a package or an MLflow model. A stage is named as in its recipe, or by its key. The tracking server
    is asked only for the first two, and first whether it answers. Raises RegistryError for what is not there; `known` are
    names of something else that could have been meant.
    """
    if model.startswith(("models:", "runs:")):
        check_tracking(tracking)
        return open_registered(model, tracking)
    folder = Path(model)
    if (folder / MODEL_FILE).is_file():
        return direct(model, folder / MODEL_FILE, folder / WEIGHTS_FILE)
    if (folder / "MLmodel").is_file():
        return from_mlflow(model, folder)
    if folder.is_file():
        raise RegistryError(f"{model}: a file, wanted models:/name@champion, a package's folder, or a stage's name")
    stage = find_stage(model, store)
    if stage is not None:
        return open_stage(model, stage, store)
    if folder.is_dir():
        raise RegistryError(f"{model}: a folder without {MODEL_FILE} or MLmodel; name the folder of a package or model")
    raise RegistryError(f"{model}: no such model{stage_hint(model, store, known)}")


def open_registered(model: str, tracking: str) -> Predictor:
    """Opens models:/... or runs:/...; we resolve the URI, so that each thing that is absent has its own message."""
    client = MlflowClient(tracking)
    uri = resolve_models_uri(model, client) if model.startswith("models:") else resolve_runs_uri(model, client)
    # download_artifacts has arguments for both URIs, yet resolves models:/ at the process-wide ones (MLflow 3.17.2).
    with tempfile.TemporaryDirectory() as downloads, using_tracking(tracking):
        # Where artifacts lie on a disk that we see, nothing is copied: their own path comes back.
        elsewhere = None if tracking.startswith("sqlite:") else downloads
        try:
            folder = mlflow.artifacts.download_artifacts(uri, dst_path=elsewhere)
        except (MlflowException, OSError) as error:
            raise RegistryError(f"{model}: its files cannot be fetched: {one_line(error)}") from error
        return from_mlflow(model, Path(folder))


def resolve_models_uri(model: str, client: MlflowClient) -> str:
    """models:/name/version for an alias or a version that is there, models:/m-... as it is; else RegistryError."""
    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([^/@]+))?", model)
    if found is None:
        raise RegistryError(f"{model}: not a model's address, wanted models:/name@alias or models:/name/version")
    name, alias, version = found.groups()
    if alias is None and version is None:
        if re.fullmatch(r"m-[0-9a-f]{32}", name):
            return model
        raise RegistryError(f"{model}: neither alias nor version; add @champion, or /1")
    return f"models:/{name}/{get_version(client, name, alias=alias, version=version).version}"


def resolve_runs_uri(model: str, client: MlflowClient) -> str:
    """runs:/<run id>/<path>, the path being our own where none is given; RegistryError when there is no such run."""
    run_id, _, path = model.removeprefix("runs:").lstrip("/").partition("/")
    try:
        client.get_run(run_id)
    except MlflowException as error:
        raise RegistryError(f"{model}: no run {run_id!r}; run ids are on MLflow's page, and in the report") from error
    return f"runs:/{run_id}/{path or LOGGED_NAME}"


def from_mlflow(model: str, folder: Path) -> Predictor:
    """Opens an MLflow model's folder; RegistryError for one that Vggrow did not package."""
    if not (folder / "MLmodel").is_file():
        raise RegistryError(f"{model}: holds no MLflow model")
    with pickle_refused():
        try:
            served = mlflow.pyfunc.load_model(str(folder))
        except (MlflowException, ValueError, KeyError, OSError) as error:
            raise RegistryError(f"{model}: does not load: {one_line(error)}") from error
    inner = served.unwrap_python_model() if hasattr(served, "unwrap_python_model") else None
    description = getattr(inner, "description", None)
    if not isinstance(description, dict) or "classes" not in description:
        raise RegistryError(f"{model}: not a model that vggrow packaged")
    return Predictor(model=model, classes=tuple(description["classes"]), description=description, served=served)


@contextmanager
def pickle_refused() -> Iterator[None]:
    """No pickle is read in the block, whatever a model's folder holds: unpickling runs any code that is in it."""
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION as ALLOWED

    before = ALLOWED.get_raw()
    ALLOWED.set(False)
    try:
        yield
    finally:
        if before is None:
            ALLOWED.unset()
        else:
            ALLOWED.set(before)


def direct(model: str, description: Path, weights: Path) -> Predictor:
    """Opens model.json and weights with this version's served_model.py; no code is taken from the package's folder."""
    if not weights.is_file():
        raise RegistryError(f"{model}: {weights.name} is missing beside {description.name}; package the model again")
    try:
        served = Direct(model=description, weights=weights)
    except (ValueError, KeyError, OSError) as error:
        raise RegistryError(f"{model}: {description.name} or {weights.name} is broken: {one_line(error)}") from error
    told = served.python_model.description
    return Predictor(model=model, classes=tuple(told["classes"]), description=told, served=served)


def stages_in(store: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The finished stages of a store, each with its stage.json, the last finished first."""
    found = []
    for result in (store / "stages").glob("*/result.json"):
        try:
            found.append((result.parent, json.loads((result.parent / "stage.json").read_text(encoding="utf-8"))))
        except (OSError, ValueError) as error:
            raise StoreError(f"{result.parent}: stage.json cannot be read ({error}); train the stage again") from error
    return sorted(found, key=lambda stage: (stage[0] / "result.json").stat().st_mtime_ns, reverse=True)


def find_stage(name: str, store: Path) -> tuple[Path, dict[str, Any]] | None:
    """The finished stage of this name or key; of several with one name (other settings, other pictures) the newest."""
    by_key = STAGE_KEY.fullmatch(name) is not None
    found = [stage for stage in stages_in(store) if name == (stage[1]["key"] if by_key else stage[1]["name"])]
    if len(found) > 1:
        logger.warning(
            "stage %r: %d finished ones in %s; the newest is used, %s (give a key to choose another: %s)",
            name, len(found), store, found[0][1]["key"], ", ".join(about["key"] for _, about in found[1:]),
        )  # fmt: skip
    return found[0] if found else None


def stage_hint(name: str, store: Path, known: Sequence[str]) -> str:
    """What could have been meant, for an error's end."""
    names = sorted({about["name"] for _, about in stages_in(store)} | set(known))
    if not names:
        return f"; wanted models:/name@alias, runs:/..., a folder, or a stage of {store}, which has none finished"
    return nearest(name, names)


def open_stage(model: str, stage: tuple[Path, dict[str, Any]], store: Path) -> Predictor:
    """Opens a finished stage's result, dense at its default test scales, a linear head at its own; nothing is copied."""
    folder, about = stage
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    weights = folder / "checkpoints" / result["checkpoint"] / WEIGHTS_FILE
    colour = recorded_colour(Store(store), about["key"])
    check_state(load_weights(weights), about["stage"], about["classes"])
    settled = Stage.model_validate_json(json.dumps(about["stage"]))
    description = describe_model(
        settings=about["stage"],
        classes=about["classes"],
        colour=colour,
        protocol="pooled" if settled.head == "linear" else "dense",
        scales=settled.default_test_scales,
        lineage={"stage_key": about["key"], "fingerprint": about["fingerprint"]},
    )
    with tempfile.TemporaryDirectory() as scratch:
        model_file = Path(scratch) / MODEL_FILE
        model_file.write_text(json.dumps(description), encoding="utf-8")
        return direct(model, model_file, weights)


def check_picture(path: Path) -> None:
    """DatasetError that names the file when it is absent, unreadable or no whole picture."""
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); name a picture's file") from error
    try:
        decode_picture(encoded)
    except ValueError as error:
        raise DatasetError(f"{path}: {str(error).replace('; send ', '; give ')}") from error


def check_classes(model_classes: Sequence[str], data_classes: Sequence[str]) -> None:
    """DatasetError that names the difference unless both are the same classes, in whatever order."""
    absent = [name for name in model_classes if name not in data_classes]
    unknown = [name for name in data_classes if name not in model_classes]
    if absent or unknown:
        have = "has" if len(absent) == 1 else "have"
        parts = [f"the model's {', '.join(map(repr, absent))} {have} no pictures"] if absent else []
        parts += [f"the model does not know {', '.join(map(repr, unknown))}"] if unknown else []
        raise DatasetError(
            f"classes of model and pictures differ: {'; '.join(parts)}; expected pictures of each of its classes and of no"
            " other, a folder a class"
        )
