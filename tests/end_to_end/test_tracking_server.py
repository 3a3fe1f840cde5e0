"""A real MLflow server over HTTP: everything is there, also when the server was down in the middle of a stage."""

import json
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.deploy.mlflow_server import free_port, running
from tests.end_to_end.command import Running, vggrow, wait_until

EPOCHS = 40


def epochs_done(store: Path) -> int:
    found = [path.read_text().count('"epoch"') for path in (store / "stages").glob("*/history.jsonl")]
    return sum(found)


@pytest.mark.slow
def test_a_server_that_is_down_for_a_while_costs_no_point_and_doubles_none(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    address = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
        "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    recipe, store = make_recipe(epochs=EPOCHS), tmp_path / "store"

    def server(log: str):
        return running(command, log=tmp_path / log, address=f"{address}/health", cwd=tmp_path)

    with server("first.log"):
        train = Running("train", recipe, "--store", store, "--tracking", address, log=tmp_path / "train.log")
        wait_until(lambda: epochs_done(store) >= 3, timeout_s=120, running=train)
    wait_until(lambda: epochs_done(store) >= 8, timeout_s=60, running=train)
    with server("second.log"):
        code = train.wait(180)
        assert code == 0, train.output()
        client = MlflowClient(address)
        (experiment,) = [one for one in client.search_experiments() if one.name == "photos"]
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        history = client.get_metric_history(runs["A-36"].info.run_id, "val_top1_accuracy")
        losses = client.get_metric_history(runs["A-36"].info.run_id, "train_loss")
        processor = client.get_metric_history(runs["A-36"].info.run_id, "system/cpu_utilization_percentage")
        model = vggrow("models", "show", "photos", "--tracking", address, "--store", store, "--json")

    (journal,) = (store / "stages").glob("*/history.jsonl")
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [(point.step, point.value) for point in history] == [
        (row["iteration"], row["val_top1_accuracy"]) for row in rows if "epoch" in row
    ]
    assert len(history) == EPOCHS
    (machine,) = (store / "stages").glob("*/system-*.jsonl")
    samples = [json.loads(line) for line in machine.read_text().splitlines()]
    assert [(point.step, point.timestamp) for point in processor] == [(row["step"], row["at"]) for row in samples]
    assert [row["step"] for row in samples] == list(range(len(samples)))
    assert [point.step for point in losses] == sorted({point.step for point in losses})
    assert {name: run.info.status for name, run in runs.items()} == {"photos": "FINISHED", "A-36": "FINISHED"}
    assert train.output().count("MLflow does not answer") == 1
    assert json.loads(model.stdout)["aliases"] == {"champion": "1"}
