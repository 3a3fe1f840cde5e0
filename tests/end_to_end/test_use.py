"""What a user does with a finished schedule: predict, evaluate, models, report, plan, doctor, and MLflow without us."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from tests.end_to_end.command import environment, vggrow
from tests.end_to_end.trained import Trained, train_once

CHAMPION = "models:/photos@champion"
CLASSES = ["cat", "coffee", "flower"]


@pytest.fixture(scope="module")
def trained(photos) -> Trained:
    """A-36 and B-36 from it, evaluated and registered."""
    return train_once(photos)


@pytest.fixture(scope="module")
def evaluation(trained) -> dict:
    """What train wrote about B-36: dense on test, with its folder under "folder"."""
    (path,) = (trained.store / "evaluations").glob("*/*/evaluation.json")
    return json.loads(path.read_text()) | {"folder": path.parent}


def use(trained: Trained, *words: object) -> str:
    """stdout of a command on the trained store, which must succeed and be quiet."""
    done = vggrow(*words, "--store", trained.store)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_training_ends_with_the_figures_the_model_and_where_to_look(trained, evaluation):
    said, progress = trained.said, trained.progress

    assert f"B-36     {100 * evaluation['top1_accuracy']:.1f}" in said
    assert "models:/photos@champion (version 1" in said and str(trained.store / "schedules") in said
    assert "Traceback" not in progress and "Warning" not in progress
    for line in ("[1/2] A-36: net A, S=36, from random weights", "[2/2] B-36: net B, S=36, from A-36", "A-36: epoch 2/2"):
        assert line in progress


def test_two_pictures_are_predicted_as_text_and_as_json(trained, photos):
    pictures = [photos / "test" / "cat" / "cat-000.jpg", photos / "test" / "flower" / "flower-001.jpg"]

    text = use(trained, "predict", CHAMPION, *pictures)
    answers = json.loads(use(trained, "predict", CHAMPION, *pictures, "--json"))
    best_two = json.loads(use(trained, "predict", CHAMPION, *pictures, "--json", "--top-k", 2))

    assert [answer["path"] for answer in answers] == list(map(str, pictures))
    for answer, line, two in zip(answers, text.splitlines(), best_two, strict=True):
        probabilities = [one["probability"] for one in answer["top"]]
        assert sorted(one["class"] for one in answer["top"]) == CLASSES
        assert sum(probabilities) == pytest.approx(1, abs=1e-5) and probabilities == sorted(probabilities, reverse=True)
        assert line == f"{answer['path']}: " + ", ".join(f"{one['class']} {one['probability']:.4f}" for one in answer["top"])
        assert two["top"] == answer["top"][:2]


def test_evaluating_the_champion_again_gives_the_figures_of_its_training(trained, evaluation):
    before = sorted(trained.store.rglob("*.parquet"))

    again = json.loads(use(trained, "evaluate", CHAMPION, "--json"))

    same = ("protocol", "scales", "split", "pictures", "top1_accuracy", "balanced_accuracy", "auc", "confusion", "classes")
    assert {name: again[name] for name in same} == {name: evaluation[name] for name in same}
    assert again["loss"] == pytest.approx(evaluation["loss"], abs=1e-6)
    assert sorted(trained.store.rglob("*.parquet")) == before


def test_a_stage_is_measured_by_centre_crops_too(trained):
    text = use(trained, "evaluate", "A-36", "--protocol", "centre", "--split", "val")

    assert text.startswith("A-36 (net A) on val of ") and "15 pictures" in text.splitlines()[0]
    assert "centre, Q = 36" in text and "(predicted)" in text


def test_the_registry_is_listed_and_shown(trained, evaluation):
    listed = json.loads(use(trained, "models", "list", "--json"))
    text = use(trained, "models", "list")
    shown = json.loads(use(trained, "models", "show", "photos", "--json"))
    shown_text = use(trained, "models", "show", "photos")

    assert [(model["name"], model["aliases"]) for model in listed] == [("photos", {"champion": "1"})]
    assert text.startswith("photos  champion is version 1")
    (version,) = shown["versions"]
    tags = version["tags"]
    assert (tags["vggrow.net"], tags["vggrow.stage"], tags["vggrow.recipe"]) == ("B", "B-36", "photos")
    assert tags["vggrow.fingerprint"] == evaluation["fingerprint"] and tags["vggrow.stage_key"] == evaluation["stage_key"]
    assert "version 1 (champion)" in shown_text and evaluation["stage_key"] in shown_text


def test_the_report_is_one_page_that_needs_nothing_else(trained, tmp_path):
    said = use(trained, "report", "--out", tmp_path / "page.html")

    page = (tmp_path / "page.html").read_text()
    assert said == f"{tmp_path / 'page.html'}\n" and list(tmp_path.iterdir()) == [tmp_path / "page.html"]
    assert page.count("</html>") == 1 and "A-36" in page and "B-36" in page
    wanted_by_the_browser = re.findall(r"<(?:link|script|img|iframe)[^>]*?(?:src|href)=[\"']?([^\"'> ]*)", page)
    assert all(address.startswith("data:") for address in wanted_by_the_browser), wanted_by_the_browser


def test_the_plan_says_what_is_to_do_and_afterwards_that_it_is_done(trained):
    after = json.loads(use(trained, "plan", trained.recipe, "--json"))

    before = json.loads(trained.plan_before)
    assert [stage["name"] for stage in before["stages"]] == ["A-36", "B-36"]
    assert {stage["status"] for stage in before["stages"]} == {"unknown"}      # the pictures had not been scanned
    assert {stage["status"] for stage in after["stages"]} == {"done"}


def test_the_plan_of_a_changed_stage_says_to_do(trained, tmp_path):
    changed = tmp_path / "changed.toml"
    changed.write_text(trained.recipe.read_text() + "learning_rate = 2e-3\n")

    text = use(trained, "plan", changed)

    a, b = (line for line in text.splitlines() if line.startswith(("A-36", "B-36")))
    assert "done" in a and "to do" in b


def test_summary_prints_the_papers_layers():
    done = vggrow("summary", "D", "--json")

    rows = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert sum(row["parameters"] for row in rows) == 138_357_544      # torchvision's VGG-16; 138 million in Table 2


def test_the_doctor_finds_this_machine_fit(trained):
    found = json.loads(use(trained, "doctor", "--json"))

    assert found["problems"] == 0
    assert {"python", "torch", "ray", "mlflow"} <= {finding["subject"] for finding in found["findings"]}


def test_a_second_scan_decodes_nothing(photos, tmp_path):
    first = vggrow("data", "scan", photos, "--store", tmp_path)
    facts = tmp_path / "data" / "facts.sqlite"
    before = (facts.read_bytes(), facts.stat().st_mtime_ns)

    second = vggrow("data", "scan", photos, "--store", tmp_path, "--json")

    assert first.returncode == second.returncode == 0, second.stderr
    assert first.stderr == second.stderr == ""
    assert (facts.read_bytes(), facts.stat().st_mtime_ns) == before
    found = json.loads(second.stdout)
    assert found["classes"] == CLASSES and found["pictures"]["train"] == dict.fromkeys(CLASSES, 20)
    assert f"fingerprint: {found['fingerprint']}" in first.stdout and "90 pictures in 3 classes" in first.stdout


ALONE = """
import base64, importlib.util, json, sys
import mlflow, pandas
assert not any(importlib.util.find_spec(name) for name in ("vggcore", "pipelines", "training", "deploy"))
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/photos@champion")
images = [base64.b64encode(open(path, "rb").read()).decode() for path in sys.argv[2:]]
table = model.predict(pandas.DataFrame({"image": images}), params={"top_k": 3})
print(json.dumps(table["top"].tolist()))
"""


@pytest.mark.slow      # tests/deploy/test_package.py asks the same of a smaller one
def test_mlflow_loads_the_champion_where_our_packages_are_not_and_it_answers_as_the_pipeline_did(
    trained, evaluation, photos, tmp_path
):
    measured = pyarrow.parquet.read_table(evaluation["folder"] / "posteriors.parquet").to_pylist()
    pictures = [photos / row["path"] for row in measured]
    ours = json.loads(use(trained, "predict", CHAMPION, *pictures, "--json"))
    hide = "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'editable' not in repr(one)]\n"
    alone = {name: value for name, value in environment().items() if name != "PYTHONPATH"}

    done = subprocess.run(
        [sys.executable, "-c", hide + ALONE, f"sqlite:///{trained.store / 'mlflow.db'}", *pictures],
        capture_output=True, text=True, cwd=tmp_path, env=alone, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == len(measured) == 15
    for answer, ours_here, row in zip(answers, ours, measured, strict=True):
        assert answer[0]["class"] == ours_here["top"][0]["class"]
        by_class = {one["class"]: one["probability"] for one in answer}
        assert np.abs(np.array([by_class[name] for name in CLASSES]) - row["posteriors"]).max() < 0.003


def artifacts(client: MlflowClient, run: Run, folder: str = "") -> set[str]:
    """The paths of a run's artifacts."""
    found: set[str] = set()
    for item in client.list_artifacts(run.info.run_id, folder):
        found |= artifacts(client, run, item.path) if item.is_dir else {item.path}
    return found


def test_mlflow_has_a_run_a_stage_below_the_schedules_own(trained, evaluation, tmp_path):
    client = MlflowClient(f"sqlite:///{trained.store / 'mlflow.db'}")

    runs = client.search_runs([client.get_experiment_by_name("photos").experiment_id])

    by_name = {run.info.run_name: run for run in runs}
    assert sorted(by_name) == ["A-36", "B-36", "photos"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    parent = by_name["photos"]
    assert {"recipe.toml", "manifest.json", "report.html"} <= artifacts(client, parent)
    for name, net in (("A-36", "A"), ("B-36", "B")):
        stage = by_name[name]
        assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert stage.data.params["net"] == net and stage.data.params["max_epochs"] == "2"
        assert {"train_loss", "val_loss", "val_top1_accuracy", "learning_rate"} <= set(stage.data.metrics)
        assert {"learning_curves.png", "training_views.png"} <= artifacts(client, stage)
    best = by_name["B-36"]
    assert best.data.metrics["test_top1_accuracy"] == evaluation["top1_accuracy"]
    assert {"test/confusion.png", "test/posteriors.parquet"} <= artifacts(client, best)
    recipe = Path(client.download_artifacts(parent.info.run_id, "recipe.toml", str(tmp_path)))
    assert recipe.read_text() == trained.recipe.read_text()
    for picture in ("learning_curves.png", "training_views.png", "test/confusion.png"):
        path = Path(client.download_artifacts(best.info.run_id, picture, str(tmp_path)))
        assert Image.open(io.BytesIO(path.read_bytes())).width > 100
