"""MLflow's runs of stages, in a real sqlite file."""

from pathlib import Path

from mlflow import MlflowClient

from training.store import open_store
from training.track import open_tracker
from vggcore.recipe import parse_recipe
from vggcore.schedule import EXEMPT, resolve_stages

RECIPE = 'name = "photos"\n[data]\nroot = "photos"\n[[stage]]\nname = "A-256"\nnet = "A"\nscale = 256\n'


def test_a_stages_run_that_a_kill_left_without_its_settings_gets_them_from_the_next_command(tmp_path):
    (tmp_path / "photos").mkdir()
    (stage,) = resolve_stages(parse_recipe(RECIPE, place="photos.toml", folder=Path(tmp_path)))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = {"recipe_name": "photos", "schedule_key": "1" * 16, "tags": {}, "artifact_location": tmp_path.as_uri()}
    tracker = open_tracker(uri, open_store(tmp_path / "store"), **words)
    client = MlflowClient(uri)
    half = client.create_run(tracker.experiment_id, run_name="A-256", tags={"vggrow.stage_key": "2" * 16}).info.run_id

    first, again = tracker.child_run(stage, "2" * 16), tracker.child_run(stage, "2" * 16)

    assert first == again == half
    wanted = {name: str(value) for name, value in stage.model_dump(mode="json", exclude=set(EXEMPT)).items()}
    assert client.get_run(half).data.params == wanted
