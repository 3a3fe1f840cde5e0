"""What can be seen of a stage weeks later: its logs, and what the machine did, through a kill and beside another stage."""

import json
import re
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.end_to_end.command import Running, vggrow, wait_until
from tests.end_to_end.test_side_by_side import SIDE_BY_SIDE

pytestmark = pytest.mark.slow
SECOND = '[[stage]]\nname = "C-36"\nnet = "C"\nscale = 36\n[register]\nstage = "A-36"\n'


def folders(store: Path) -> dict[str, Path]:
    """The stages' folders by name."""
    return {json.loads(path.read_text())["name"]: path.parent for path in (store / "stages").glob("*/stage.json")}


def samples(folder: Path) -> list[dict]:
    path = folder / f"system-{socket.gethostname()}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}}")] if path.exists() else []


@pytest.mark.timeout(900)
def test_a_killed_and_restarted_stage_has_each_sample_once_and_a_log_of_both_starts(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    recipe, store = make_recipe(epochs=30, every="5 iterations"), tmp_path / "store"
    words = ("train", recipe, "--store", store, "--workers", 2, "--threads", 1)
    first = Running(*words, log=tmp_path / "first.log")
    try:
        wait_until(lambda: any(len(samples(one)) > 3 for one in folders(store).values()), timeout_s=300, running=first)
        wait_until(lambda: "checkpoint of" in (folders(store)["A-36"] / "logs" / "worker-0.log").read_text(), timeout_s=120)
    finally:
        first.kill_everything()

    again = vggrow(*words, timeout_s=600)

    assert again.returncode == 0, again.stderr
    folder = folders(store)["A-36"]
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "photos"]
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'A-36'")
    points = client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")
    rows = samples(folder)
    assert [point.step for point in points] == [row["step"] for row in rows] == list(range(len(rows)))
    assert [point.timestamp for point in points] == [row["at"] for row in rows]
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    assert sorted(logs) == ["conductor.log", "worker-0.log", "worker-1.log"]
    assert [log.count("begins") for log in logs.values()] == [2, 2, 2]
    assert re.search(r"trains net A, S=36, from iteration [1-9]\d* ", logs["worker-1.log"])
    assert [logs["worker-0.log"].count(f"epoch {epoch} of at most 30") >= 1 for epoch in (1, 30)] == [True, True]
    assert "epoch" not in logs["worker-1.log"].partition("trains net")[2].partition("\n")[2].partition("trains net")[0]
    assert "INFO" not in first.output() + again.stderr


@pytest.mark.timeout(900)
def test_two_stages_side_by_side_have_their_own_logs(make_recipe, tmp_path):
    recipe, store = make_recipe(epochs=3, more=SECOND), tmp_path / "store"

    done = vggrow("train", recipe, "--store", store, *SIDE_BY_SIDE, timeout_s=800)

    assert done.returncode == 0, done.stderr
    for name, folder in folders(store).items():
        other = {"A-36": "C-36", "C-36": "A-36"}[name]
        for who in ("conductor", "worker-0"):
            text = (folder / "logs" / f"{who}.log").read_text()
            assert name in text and other not in text
