"""[register] weights and [evaluate] views: what is measured is what is registered and served, each choice a version."""

import json

import pytest
from mlflow import MlflowClient

from tests.end_to_end.command import vggrow
from tests.end_to_end.test_resume import stage_folder

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


def test_averaged_and_last_weights_of_one_stage_are_two_versions_each_measured_over_its_views(averaged, tmp_path):
    store = tmp_path / "store"
    first = vggrow("train", averaged, "--store", store)
    averaged.write_text(averaged.read_text().replace('weights = "average"', 'weights = "last"'))
    second = vggrow("train", averaged, "--store", store)
    again = vggrow("train", averaged, "--store", store)

    assert (first.returncode, second.returncode, again.returncode) == (0, 0, 0), first.stderr + second.stderr + again.stderr
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
        done = vggrow("evaluate", f"models:/photos/{version}", "--store", store, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["views"], found["scales"]) == ("flips", [36])
        assert found["loss"] == pytest.approx(by_weights[weights]["loss"], abs=1e-6)
    assert len({round(one["loss"], 7) for one in facts}) == 2
    plain = vggrow("evaluate", "models:/photos/2", "--store", store, "--views", "none", "--json")
    assert "views" not in json.loads(plain.stdout)

    turned = vggrow("evaluate", "models:/photos/2", "--store", store, "--views", "turns")
    assert turned.returncode == 2
    assert turned.stderr.strip().endswith("turning them would mislead it; leave --views out, or give flips")
