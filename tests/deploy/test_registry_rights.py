"""Who may promote: on a server with users, who trains cannot touch the production model, and who releases can."""

from collections.abc import Iterator

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

from deploy.gate_evidence import uses
from deploy.promote import promote
from tests.deploy.gate_store import SAYER, SKILLED, GateStore, build, show, tree
from tests.deploy.mlflow_server import ADMIN, ADMIN_PASSWORD, server_with_users
from tests.end_to_end.command import vggrow
from vggcore.errors import RegistryError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PASSWORD = "a-password-of-the-test"
TRAINER = {"MLFLOW_TRACKING_USERNAME": "trainer", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
RELEASER = {"MLFLOW_TRACKING_USERNAME": "releaser", "MLFLOW_TRACKING_PASSWORD": PASSWORD}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Iterator[GateStore]:
    """Candidates and a production model on a server with users, set up by its admin as docs/how-to/registry.md says."""
    folder = tmp_path_factory.mktemp("users")
    with pytest.MonkeyPatch.context() as patch, server_with_users(folder) as address:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN_PASSWORD)
        shelf = build(folder, address, (SAYER, SKILLED))
        shelf.register("candidates", SAYER, SKILLED)
        promote(shelf.client, store=shelf.store, model="models:/candidates/1", to="production")
        shelf.client.create_registered_model("closed")
        users = get_app_client("basic-auth", tracking_uri=address)
        for name in ("trainer", "releaser"):
            users.create_user(name, PASSWORD)
        users.grant_user_permission("trainer", "registered_model", "candidates", "EDIT")
        users.grant_user_permission("trainer", "registered_model", "closed", "DENY")
        users.grant_user_permission("releaser", "registered_model", "production", "EDIT")
        yield shelf


def state(shelf: GateStore) -> tuple[object, ...]:
    """Everything that a promotion could change."""
    kept = {path: text for path, text in tree(shelf.root).items() if "scores" not in path}
    return kept, show(shelf, "candidates"), show(shelf, "production"), uses(shelf.gate)


def one_line(text: str) -> str:
    """The one error line of a command."""
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in text
    return line


def test_who_trains_cannot_promote_to_production_nor_roll_back_and_nothing_changes(shelf):
    where = ["--store", shelf.root, "--tracking", shelf.tracking]
    before = state(shelf)

    promoted = vggrow("models", "promote", "candidates", "--to", "production", *where, **TRAINER)
    forced = vggrow(
        "models", "promote", "candidates", "--to", "production", "--force", "--reason", "now", *where, **TRAINER
    )
    back = vggrow("models", "rollback", "production", *where, **TRAINER)

    for done in (promoted, forced, back):
        assert (done.returncode, done.stdout) == (2, "")
        assert "models:/production: the MLflow server does not let trainer change this model" in one_line(done.stderr)
        assert "ask for the permission EDIT" in done.stderr
    assert state(shelf) == before


def test_who_trains_cannot_move_productions_alias_by_mlflows_own_client(shelf, monkeypatch):
    before = state(shelf)
    with monkeypatch.context() as trainer:
        for name, value in TRAINER.items():
            trainer.setenv(name, value)

        with pytest.raises(MlflowException, match="Permission denied"):
            MlflowClient(shelf.tracking).set_registered_model_alias("production", "champion", "1")
        with pytest.raises(RegistryError, match="models:/closed: the MLflow server does not let trainer"):
            promote(shelf.client, store=shelf.store, model="candidates", to="closed")

    assert state(shelf) == before


def test_who_releases_promotes_and_what_may_not_be_written_on_the_candidate_is_said(shelf):
    where = ["--store", shelf.root, "--tracking", shelf.tracking]

    first = vggrow("models", "promote", "candidates", "--to", "production", *where, **RELEASER)
    again = vggrow("models", "promote", "candidates", "--to", "production", *where, **RELEASER)

    assert first.returncode == 0, first.stderr
    assert "models:/production/2: promoted" in first.stdout
    assert (again.returncode, again.stdout) == (0, "models:/production/2: already champion\n")
    assert shelf.aliases("production") == {"champion": "2", "previous": "1"}
    assert len(shelf.client.search_model_versions("name = 'production'")) == 2
    tags = shelf.tags("production", "2")
    assert (tags["vggrow.decision"], tags["vggrow.decided_by"]) == ("promoted", "releaser")
    assert "models:/candidates/2: the decision cannot be written on it" in first.stderr
    assert shelf.aliases("candidates")["challenger"] == "2"
    assert [(line["action"], line["by"]) for line in shelf.history("production")][1:] == [("promoted", "releaser")]
    assert not (shelf.root / "registry" / "production" / "pending.json").exists()
