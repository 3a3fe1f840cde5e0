"""What machines do while a stage trains: sampled into journals, and from there to MLflow, each sample once."""

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from tests.end_to_end.command import wait_until
from training.history import parse_rows
from training.stage_job import Superseded
from training.store import Store
from training.system_metrics import Machine, MachineReader, Sampler, SystemTail, next_step, sampling_interval_s
from training.track import StageRun, Tracker
from vggcore.errors import TrackingError

EVERY_S = 0.02
CPU = "cpu_utilization_percentage"


def sampled(folder: Path, machine: Machine, *, samples: int, may_write=lambda: None) -> list[dict]:
    """The rows of a machine's journal after one start that took so many samples more, at least."""
    path = folder / f"system-{machine.name}.jsonl"
    before = len(rows_of(path))
    sampler = Sampler(folder, machine, every_s=EVERY_S, gpus=False, may_write=may_write)
    sampler.start()
    wait_until(lambda: len(rows_of(path)) >= before + samples, timeout_s=30)
    sampler.close()
    return rows_of(path)


def rows_of(path: Path) -> list[dict]:
    return parse_rows(path.read_text().splitlines()) if path.exists() else []


def test_names_are_mlflows_own():
    theirs = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= set(monitor.aggregate_metrics())

    assert set(MachineReader(gpus=False).metrics()) == theirs


def test_steps_count_on_over_starts_also_after_a_kill_in_the_middle_of_a_line(tmp_path):
    here = Machine("here", None)
    first = sampled(tmp_path, here, samples=3)
    with (tmp_path / "system-here.jsonl").open("a") as file:
        file.write('{"step": 99, "at": 17')

    rows = sampled(tmp_path, here, samples=2)

    assert len(rows) > len(first) and [row["step"] for row in rows] == list(range(len(rows)))
    assert abs(rows[-1]["at"] / 1000 - time.time()) < 60
    assert [row["at"] for row in rows] == sorted({row["at"] for row in rows})


def test_a_stage_that_is_over_at_once_has_a_sample_too(tmp_path):
    sampler = Sampler(tmp_path, Machine("here", None), every_s=10.0, gpus=False, may_write=lambda: None)
    sampler.start()

    sampler.close()

    (row,) = rows_of(tmp_path / "system-here.jsonl")
    assert row["step"] == 0 and 0 <= row["metrics"][CPU] <= 100


def test_two_machines_have_names_of_their_own_and_another_that_goes_on_counts_on(tmp_path):
    one, two = (sampled(tmp_path, Machine(name, name), samples=2) for name in ("node8", "node7"))
    tail = SystemTail(tmp_path)
    found = tail.new_samples()
    alone = sampled(tmp_path, Machine("node9", None), samples=1)

    assert {name for name, *_ in found if name.endswith(CPU)} == {f"system/node7/{CPU}", f"system/node8/{CPU}"}
    for name, rows in (("node8", one), ("node7", two)):
        values = [(value, at, step) for found_name, value, at, step in found if found_name == f"system/{name}/{CPU}"]
        assert values == [(row["metrics"][CPU], row["at"], row["step"]) for row in rows]
    assert [step for *_, step in found] == sorted(step for *_, step in found)
    assert alone[0]["step"] > two[-1]["step"] >= len(one) + 1
    assert {name.count("/") for name, *_ in tail.new_samples()} == {1}      # only what is new: system/cpu_...


def test_an_orphan_adds_no_sample(tmp_path):
    def superseded() -> None:
        raise Superseded

    sampler = Sampler(tmp_path, Machine("here", None), every_s=EVERY_S, gpus=False, may_write=superseded)
    sampler.start()
    sampler.join(timeout=30)

    assert not sampler.is_alive() and next_step(tmp_path) == 0


def test_mlflows_own_variables_turn_it_off_and_set_its_pace(monkeypatch):
    assert sampling_interval_s() == 10.0
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "2.5")
    assert sampling_interval_s() == 2.5
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "often")
    with pytest.raises(TrackingError, match="INTERVAL=often: not a number of seconds"):
        sampling_interval_s()
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    assert sampling_interval_s() == 0.0


def test_mlflow_has_each_sample_once_with_its_own_time_though_a_request_failed_half_way(tmp_path):
    store = Store(tmp_path / "store")
    folder = store.stage("k")
    folder.mkdir(parents=True)
    rows = sampled(folder, Machine("here", None), samples=4)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("photos", artifact_location=str(tmp_path / "artifacts"))
    run = StageRun(client.create_run(experiment).info.run_id, 7, SystemTail(folder))
    tracker = Tracker(client, experiment_id=experiment, parent_run_id="", store=store)
    run.samples = run.machines.new_samples()[: 8 * 2]
    tracker.push(run)

    run.samples, run.stale = SystemTail(folder).new_samples(), True      # what it knows of the server is lost
    tracker.push(run)
    more = sampled(folder, Machine("here", None), samples=2)
    run.samples = run.machines.new_samples()[-8 * 5 :]
    tracker.push(run)

    points = client.get_metric_history(run.run_id, f"system/{CPU}")
    assert [(point.step, point.timestamp, point.value) for point in points] == [
        (row["step"], row["at"], row["metrics"][CPU]) for row in more
    ]
    assert len(points) == len(more) > len(rows)
    assert len({key for key in client.get_run(run.run_id).data.metrics if key.startswith("system/")}) == 8
    assert json.loads((folder / "system-here.jsonl").read_text().splitlines()[0])["step"] == 0
