"""[register] weights and [evaluate] views: what is measured is what is registered and served, each choice a version."""

import json

import pytest
from mlflow import MlflowClient

from deploy.judge import evaluation_text, judge
from tests.end_to_end.command import vggrow
from tests.end_to_end.test_resume import stage_folder
from training.store import Store
from vggcore.errors import RecipeError

SETTINGS = """
[augment]
flip_vertical = true
[evaluate]
protocol = "centre"
views = "flips"
[register]
weights = "average"
"""


@pytest.fixture
def averaged(make_recipe):
    """A recipe whose stage keeps an average; registered are the averaged weights, measured over four views."""
    path = make_recipe(epochs=3, more=SETTINGS)
    path.write_text(path.read_text().replace("patience = 100\n", "patience = 100\naverage = 2\n"))
    return path


@pytest.mark.timeout(900)
def test_averaged_and_last_weights_of_one_stage_are_two_versions_each_measured_over_its_views(averaged, tmp_path):
    store = tmp_path / "store"
    first = vggrow("train", averaged, "--store", store)
    averaged.write_text(averaged.read_text().replace('weights = "average"', 'weights = "last"'))
    second = vggrow("train", averaged, "--store", store)

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "centre, Q = 36, flips for A-36" in first.stdout
    assert "evaluating on test, centre, flips, weights average" in first.stderr
    folder = stage_folder(store)
    assert len((folder / "starts.jsonl").read_text().splitlines()) == 1        # trained once
    result = json.loads((folder / "result.json").read_text())
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    versions = sorted(client.search_model_versions("name = 'photos'"), key=lambda version: int(version.version))
    assert [version.tags.get("vggrow.weights") for version in versions] == ["average", None]
    assert versions[0].tags["vggrow.weights_digest"] == result["weights"]["average"]["digest"]
    assert {version.tags["vggrow.views"] for version in versions} == {"flips"}
    run = client.get_run(versions[0].run_id)
    assert (run.data.tags["vggrow.weights"], run.data.tags["vggrow.views"]) == ("last", "flips")      # of the last evaluation

    facts = [json.loads(path.read_text()) for path in store.glob("evaluations/*/*/evaluation.json")]
    by_weights = {one.get("weights", "last"): one for one in facts}
    assert by_weights.keys() == {"last", result["weights"]["average"]["digest"]}
    for version, weights in ((1, result["weights"]["average"]["digest"]), (2, "last")):
        found = measured(store, version)
        assert (found["views"], found["scales"]) == ("flips", [36])
        assert found["loss"] == pytest.approx(by_weights[weights]["loss"], abs=1e-6)
    assert len({round(one["loss"], 7) for one in facts}) == 2
    assert "views" not in measured(store, 2, views="none") and "Q = 36, flips" in evaluation_text(measured(store, 1))
    with pytest.raises(RecipeError, match="--views turns: the model was not trained on turned pictures"):
        measured(store, 2, views="turns")


def measured(store, version: int, views=None) -> dict[str, object]:
    """What `vggrow evaluate` finds of a version on test."""
    return judge(
        f"models:/photos/{version}", source=None, split="test", protocol=None, scales=None, views=views, device="cpu",
        store=Store(store), tracking=f"sqlite:///{store / 'mlflow.db'}",
    )  # fmt: skip
