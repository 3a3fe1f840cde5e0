import base64
import json
import subprocess
import sys

import mlflow
import pytest
import requests
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import invocations
from pandas import DataFrame

from deploy.package import MODEL_FILE, WEIGHTS_FILE, log_package
from deploy.predict import Direct
from tests.deploy.mlflow_server import free_port, running
from tests.deploy.small_model import CLASSES, package, small_net, stage_settings
from vggcore.errors import RegistryError, StoreError

BARE = """
import sys
sys.path = [place for place in sys.path if place]
sys.modules.update(dict.fromkeys(("vggcore", "pipelines", "training", "deploy")))
try:
    import vggcore
    raise SystemExit("vggcore can be imported")
except ImportError:
    pass
import base64, json, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/small@champion")
table = pandas.DataFrame({"image": [base64.b64encode(open(path, "rb").read()).decode() for path in sys.argv[2:]]})
print(json.dumps(model.predict(table, params={"top_k": 2}).to_dict(orient="records")))
"""


def images(paths):
    return [base64.b64encode(path.read_bytes()).decode() for path in paths]


def direct_answers(logged, top_k):
    model = Direct(model=logged.package / MODEL_FILE, weights=logged.package / WEIGHTS_FILE)
    return model.predict(DataFrame({"image": images(logged.pictures)}), {"top_k": top_k}).to_dict(orient="records")


def same(found, wanted):
    assert [row["class"] for row in found] == [row["class"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-6)
        assert [place["class"] for place in row["top"]] == [place["class"] for place in other["top"]]


def test_the_champion_loads_and_answers_where_our_packages_and_pickle_are_out_of_reach(logged, tmp_path):
    environment = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

    done = subprocess.run(
        [sys.executable, "-I", "-c", BARE, logged.tracking, *map(str, logged.pictures)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    same(json.loads(done.stdout.splitlines()[-1]), direct_answers(logged, top_k=2))
    assert "hint" not in done.stderr   # MLflow's advice to add type hints, at every load


def test_a_logged_model_belongs_to_its_run_and_its_experiment_and_lies_in_the_store(logged):
    client = MlflowClient(logged.tracking)

    model = client.get_logged_model(logged.model_uri.removeprefix("models:/"))

    run = client.get_run(logged.run_id)
    assert run.info.status == "FINISHED"
    assert (model.source_run_id, model.experiment_id) == (run.info.run_id, run.info.experiment_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert model.artifact_location.startswith((logged.store / "artifacts").as_uri())


def test_a_logged_model_states_what_goes_in_what_comes_out_and_what_it_needs(logged):
    folder = logged.model_folder

    about = mlflow.models.Model.load(str(folder))

    assert about.signature.inputs.input_names() == ["image"]
    assert about.signature.outputs.input_names() == ["class", "probability", "top"]
    assert [(parameter.name, parameter.default) for parameter in about.signature.params] == [("top_k", 5)]
    assert about.metadata == {"stage_key": "0123456789abcdef", "fingerprint": "f" * 32}
    needs = (folder / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in needs] == ["mlflow", "torch", "safetensors", "pillow", "numpy", "pandas"]
    assert all("==" in line and "+" not in line for line in needs)
    assert not list(folder.rglob("*.pkl"))


def test_a_package_that_the_run_has_is_not_logged_twice(logged):
    again = log_package(tracking=logged.tracking, run_id=logged.run_id, folder=logged.package)

    assert again == logged.model_uri
    assert len(MlflowClient(logged.tracking).get_run(logged.run_id).outputs.model_outputs) == 1


def test_a_model_that_answers_with_no_numbers_is_refused_before_it_can_be_registered(logged, tmp_path):
    settings = stage_settings()
    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in small_net(settings).state_dict().items()}
    package(tmp_path, settings, state=state)

    with pytest.raises(RegistryError, match="add up to nan, wanted 3 and 1"):
        log_package(tracking=logged.tracking, run_id=logged.run_id, folder=tmp_path)

    client = MlflowClient(logged.tracking)
    experiment = client.get_run(logged.run_id).info.experiment_id
    assert [model.model_uri for model in client.search_logged_models([experiment])] == [logged.model_uri]


def test_a_model_whose_upload_was_broken_off_is_removed_and_the_whole_one_found(logged):
    client = MlflowClient(logged.tracking)
    whole = client.get_logged_model(logged.model_uri.removeprefix("models:/"))
    client.create_logged_model(whole.experiment_id, name="model", source_run_id=logged.run_id, tags=whole.tags)

    again = log_package(tracking=logged.tracking, run_id=logged.run_id, folder=logged.package)

    assert again == logged.model_uri
    assert [model.model_id for model in client.search_logged_models([whole.experiment_id])] == [whole.model_id]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": stage_settings(width=0.125)}, r"classifier\.0\.bias is \(256,\), wanted \(512,\)"),
        ({"settings": stage_settings("B")}, r"net B: features\.\d+\.bias is"),
        ({"classes": (*CLASSES, "rust")}, r"classifier\.6\.bias is \(3,\), wanted \(4,\)"),
    ],
)
def test_weights_of_another_net_are_refused_and_nothing_is_written(tmp_path, changes, words):
    with pytest.raises(StoreError, match=words):
        package(tmp_path, stage_settings(), **changes)

    assert list(tmp_path.iterdir()) == []


def test_answers_and_errors_pass_through_the_code_of_mlflows_server(logged):
    model = mlflow.pyfunc.load_model(str(logged.model_folder))
    table = {"columns": ["image"], "data": [[image] for image in images(logged.pictures)]}

    def post(body):
        return invocations(json.dumps(body), "application/json", model, model.metadata.get_input_schema())

    good = post({"dataframe_split": table, "params": {"top_k": 2}})
    table["data"][1] = ["no picture"]
    with pytest.raises(MlflowException) as caught:
        post({"dataframe_split": table})

    same(json.loads(good.response)["predictions"], direct_answers(logged, top_k=2))
    assert caught.value.get_http_status_code() == 400
    assert "row 1: not base64" in caught.value.message


@pytest.mark.slow
def test_mlflow_serves_it_with_answers_as_json_and_a_clear_400(logged, tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    folder = logged.model_folder
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(folder), "--env-manager", "local",
        "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
    ]  # fmt: skip
    table = {"columns": ["image"], "data": [[image] for image in images(logged.pictures)]}

    with running(command, log=tmp_path / "serve.log", address=f"{address}/ping", cwd=tmp_path):
        good = requests.post(f"{address}/invocations", json={"dataframe_split": table, "params": {"top_k": 2}}, timeout=60)
        table["data"][1] = ["no picture"]
        bad = requests.post(f"{address}/invocations", json={"dataframe_split": table}, timeout=60)

    assert good.status_code == 200, good.text
    same(good.json()["predictions"], direct_answers(logged, top_k=2))
    assert bad.status_code == 400
    assert "row 1: not base64" in bad.json()["message"]
    assert "stack_trace" not in bad.json()
