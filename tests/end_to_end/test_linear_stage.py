"""A linear stage from the command line: published weights, a logistic fit, a registered version that answers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from deploy.cli import main
from tests.end_to_end.command import SIGINT, Running, vggrow, wait_until
from tests.training.small_published import publish
from training.store import open_store

RECIPE = """
name = "photos"
seed = 3
[data]
root = "{root}"
[[stage]]
name = "linear"
net = "A"
head = "linear"
init_from = "weights:small/a"
fit = "logistic"
features = {{ groups = [1, 2], scales = [32, 48] }}
"""


class Trained:
    """What `vggrow train` left, and said."""

    def __init__(self, folder: Path, photos: Path) -> None:
        self.store, self.recipe = folder / "store", folder / "linear.toml"
        publish(open_store(self.store))
        self.recipe.write_text(RECIPE.format(root=photos))
        self.done = vggrow("train", self.recipe, "--store", self.store)
        assert self.done.returncode == 0, self.done.stderr

    @property
    def stage(self) -> Path:
        (folder,) = (self.store / "stages").iterdir()
        return folder


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("linear"), photos)


def said(words: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["vggrow", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_person_sees_features_and_the_penalty_that_was_chosen(trained: Trained) -> None:
    result = json.loads((trained.stage / "result.json").read_text())

    assert "linear: net A, logistic fit at Q=32, 48, from weights:small/a" in trained.done.stderr
    assert re.search(r"linear: features of (train|val): \d+ pictures computed", trained.done.stderr)
    assert f"linear: C {result['C']:g}, " in trained.done.stderr
    assert "15 pictures, pooled, Q = 32, 48 for linear" in trained.done.stdout
    assert "models:/photos@champion" in trained.done.stdout


def test_mlflow_has_a_point_a_penalty_and_the_settings_that_count(trained: Trained) -> None:
    client = MlflowClient(f"sqlite:///{trained.store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("photos")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`vggrow.kind` = 'stage'")

    points = {name: client.get_metric_history(run.info.run_id, name) for name in ("C", "val_loss", "val_top1_accuracy")}

    assert run.info.status == "FINISHED"
    assert {name: [point.step for point in found] for name, found in points.items()} == {
        name: list(range(1, 10)) for name in points
    }
    assert [point.value for point in points["C"]] == sorted(point.value for point in points["C"])
    assert run.data.params["fit"] == "logistic" and "learning_rate" not in run.data.params
    assert run.data.tags["vggrow.init_from"] == "weights:small/a"


def test_the_same_command_again_trains_nothing(trained: Trained) -> None:
    before = (trained.stage / "result.json").stat().st_mtime_ns

    done = vggrow("train", trained.recipe, "--store", trained.store)

    assert done.returncode == 0 and "linear: done before" in done.stderr
    assert (trained.stage / "result.json").stat().st_mtime_ns == before


def test_every_command_reads_a_linear_stage(
    trained: Trained, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> str:
        code, out, err = said([*words, "--store", trained.store], monkeypatch, capsys)
        assert code == 0, err
        return out

    picture = next((photos / "test" / "cat").iterdir())
    answers = json.loads(run("predict", "models:/photos@champion", picture, "--json"))
    assert np.isclose(sum(one["probability"] for one in answers[0]["top"]), 1, atol=1e-5)
    found = json.loads(run("evaluate", "linear", "--json"))
    assert (found["protocol"], found["scales"], found["pictures"]) == ("pooled", [32, 48], 15)
    facts = json.loads(next(trained.store.glob("evaluations/*/*/evaluation.json")).read_text())
    assert found["top1_accuracy"] == facts["top1_accuracy"] and np.isclose(found["loss"], facts["loss"], atol=1e-5)
    (planned,) = json.loads(run("plan", trained.recipe, "--json"))["stages"]
    assert planned["status"] == "done" and planned["max_epochs"] == 0
    text = run("plan", trained.recipe)
    assert "logistic fit" in text and "conv1_1, conv2_1 from weights:small/a, with its mean; fitted: fc1" in text
    monkeypatch.chdir(trained.store.parent)
    (schedule,) = json.loads(run_status(trained.store, monkeypatch, capsys))
    assert schedule["stages"][0]["state"] == "finished" and schedule["stages"][0]["max_epochs"] is None
    assert "pooled" in run("models", "show", "photos")


def run_status(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    code, out, err = said(["status", store, "--json"], monkeypatch, capsys)
    assert code == 0, err
    return out


def test_the_page_shows_the_penalties(trained: Trained) -> None:
    page = next(trained.store.glob("schedules/*/report.html")).read_text()

    assert "<h3>Penalties</h3>" in page
    assert "9 penalties, C from 0.0001 to 1; the least loss on val" in page
    assert "32, 48" in page and "logistic fit" in page
    assert "Suspected labels</h2>" in page and "by the features of linear" in page


@pytest.mark.parametrize("option", [("--protocol", "dense"), ("--scales", "40")])
def test_a_linear_model_is_not_evaluated_in_another_way(
    option: tuple[str, str], trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(["evaluate", "linear", *option, "--store", trained.store], monkeypatch, capsys)

    assert code == 2
    assert f"error: {option[0]} has no effect on linear: a linear head sees whole pictures at Q = 32, 48" in err


def test_ctrl_c_among_the_features_closes_the_run_and_loses_nothing(photos: Path, tmp_path: Path, trained: Trained) -> None:
    store, recipe = tmp_path / "store", tmp_path / "linear.toml"
    publish(open_store(store))
    recipe.write_text(RECIPE.format(root=photos).replace("[32, 48]", "[96, 160]"))
    running = Running("train", recipe, "--store", store, "--threads", 1, log=tmp_path / "log")
    wait_until(lambda: any(store.glob("features/*/features.json")), timeout_s=120, running=running)

    running.send(SIGINT)
    code = running.wait(60)

    assert code == 130, running.output()
    assert "Traceback" not in running.output()
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("photos")
    assert {run.info.status for run in client.search_runs([experiment.experiment_id])} == {"KILLED"}
    again = vggrow("train", recipe, "--store", store)
    assert again.returncode == 0, again.stderr
    assert {run.info.status for run in client.search_runs([experiment.experiment_id])} == {"FINISHED"}
