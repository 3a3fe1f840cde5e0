import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow import MlflowClient

from deploy.registry import (
    DECIDED_TAG,
    due_alias,
    find_version,
    get_model,
    get_version,
    list_models,
    model_text,
    models_text,
    register_candidate,
    show_model,
)
from deploy.tracking_address import resolve_tracking
from vggcore.errors import RegistryError, StoreError


class Shelf:
    """A sqlite store with a run and one logged model, and candidates of it."""

    def __init__(self, store):
        self.store = store
        self.client = MlflowClient(resolve_tracking(None, store))
        self.run_id = self.client.create_run("0").info.run_id
        self.model = self.client.create_logged_model("0", name="model", source_run_id=self.run_id)

    def register(self, stage_key, test_top1, *, floor=0.5, name="solar"):
        return register_candidate(
            self.client, store=self.store, name=name, model_uri=f"models:/{self.model.model_id}", run_id=self.run_id,
            stage_key=stage_key, tags={"vggrow.net": "D", "vggrow.recipe": name}, test_top1=test_top1, floor=floor,
        )  # fmt: skip

    def aliases(self):
        return show_model(self.client, "solar").aliases


@pytest.fixture
def shelf(tmp_path, monkeypatch, empty_database):
    (tmp_path / "store").mkdir()
    shutil.copy(empty_database, tmp_path / "store" / "mlflow.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield Shelf(tmp_path / "store")
    assert list((tmp_path / "elsewhere").iterdir()) == [], "MLflow wrote to the working folder"


def test_the_first_version_at_the_floor_is_champion_and_later_ones_are_challengers(shelf):
    first = shelf.register("a" * 16, 0.5)
    second = shelf.register("b" * 16, 0.9)
    third = shelf.register("c" * 16, 0.1)

    assert (first.version, first.alias, first.uri) == ("1", "champion", "models:/solar@champion")
    assert (second.version, second.alias) == ("2", "challenger")
    assert (third.version, third.alias, third.uri) == ("3", "challenger", "models:/solar@challenger")
    assert shelf.aliases() == {"champion": "1", "challenger": "3"}


def test_a_version_below_the_floor_gets_no_alias_and_the_reason_is_said(shelf):
    low = shelf.register("a" * 16, 0.4)
    good = shelf.register("b" * 16, 0.6)

    assert (low.alias, low.uri) == (None, "models:/solar/1")
    assert "0.4000 is below the floor 0.5000" in low.reason
    assert good.alias == "champion"


def test_the_same_stage_again_is_the_same_version_and_moves_no_alias(shelf):
    first, second, third = shelf.register("a" * 16, 0.6), shelf.register("b" * 16, 0.6), shelf.register("c" * 16, 0.6)
    shelf.client.delete_registered_model_alias("solar", "challenger")   # as when the gate has refused it

    again = [shelf.register(key * 16, 0.6) for key in "abc"]

    assert [found.version for found in again] == [first.version, second.version, third.version]
    assert again[0] == first
    assert again[2].alias is None
    assert shelf.aliases() == {"champion": "1"}


def test_a_lowered_floor_makes_the_waiting_version_champion(shelf):
    shelf.register("a" * 16, 0.4)

    again = shelf.register("a" * 16, 0.4, floor=0.3)

    assert (again.version, again.alias) == ("1", "champion")


def test_a_registration_broken_off_after_the_version_is_finished_by_the_next_one(shelf):
    shelf.register("a" * 16, 0.6)
    shelf.client.delete_registered_model_alias("solar", "champion")
    shelf.client.delete_model_version_tag("solar", "1", DECIDED_TAG)

    again = shelf.register("a" * 16, 0.6)

    assert (again.version, again.alias) == ("1", "champion")
    assert shelf.aliases() == {"champion": "1"}


def test_two_commands_at_once_make_one_version(shelf):
    shelf.register("f" * 16, 0.6)   # the database is made before the race

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shelf.register("a" * 16, 0.6), range(4)))

    assert {registered.version for registered in found} == {"2"}
    assert len(show_model(shelf.client, "solar").versions) == 2


def test_a_lock_that_another_command_holds_is_said(shelf, monkeypatch):
    from filelock import FileLock

    import deploy.registry

    monkeypatch.setattr(deploy.registry, "LOCK_S", 0.2)
    (shelf.store / "locks").mkdir()

    with FileLock(shelf.store / "locks" / "registry-solar.lock"), pytest.raises(StoreError, match="another command"):
        shelf.register("a" * 16, 0.6)


@pytest.mark.parametrize(
    ("version", "aliases", "top1", "wanted", "words"),
    [
        ("1", {}, 0.5, "champion", "at or above the floor"),
        ("1", {}, 0.49, None, "below the floor"),
        ("2", {"champion": "1"}, 0.2, "challenger", "version 1 is the champion"),
        ("2", {"champion": "1", "challenger": "3"}, 0.9, None, "version 3 came later"),
        ("10", {"champion": "1", "challenger": "9"}, 0.9, "challenger", "version 1"),
        ("1", {"champion": "1"}, 0.9, "champion", "at or above"),
        ("2", {"challenger": "1"}, 0.9, "champion", "at or above"),
    ],
)
def test_the_alias_of_a_new_version_follows_from_those_there_are(version, aliases, top1, wanted, words):
    alias, reason = due_alias(version, aliases, test_top1=top1, floor=0.5)

    assert alias == wanted
    assert words in reason


def test_models_are_listed_and_shown_with_aliases_tags_and_runs(shelf):
    shelf.register("a" * 16, 0.6)
    shelf.register("b" * 16, 0.7)
    shelf.register("c" * 16, 0.7, name="pets")

    listed, shown = list_models(shelf.client), show_model(shelf.client, "solar")

    assert [(model.name, model.aliases) for model in listed] == [
        ("pets", {"champion": "1"}),
        ("solar", {"champion": "1", "challenger": "2"}),
    ]
    assert [(line.version, line.aliases) for line in shown.versions] == [("2", ("challenger",)), ("1", ("champion",))]
    newest = shown.versions[0]
    assert newest.run_id == shelf.run_id
    assert newest.source == f"models:/{shelf.model.model_id}"
    assert newest.tags["vggrow.net"] == "D"
    assert newest.tags["vggrow.stage_key"] == "b" * 16
    assert newest.tags["vggrow.test_top1_accuracy"] == "0.700000"
    assert newest.created.endswith("+00:00")


def test_models_are_told_in_lines_that_a_terminal_shows(shelf):
    shelf.register("a" * 16, 0.6)
    shelf.register("b" * 16, 0.7)

    listed, shown = models_text(list_models(shelf.client)), model_text(show_model(shelf.client, "solar"))

    assert listed.startswith("solar  challenger is version 2, champion is version 1  (changed 20")
    blocks = shown.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [
        "solar: 2 versions", "version 2 (challenger)", "version 1 (champion)",
    ]  # fmt: skip
    told = {tuple(line.split(maxsplit=1)) for line in blocks[1].splitlines()[1:]}
    assert {("uri", "models:/solar/2"), ("run", shelf.run_id), ("test_top1_accuracy", "0.700000"), ("net", "D")} <= told
    assert "no model is registered yet" in models_text([])


def test_an_empty_registry_says_so(shelf):
    assert list_models(shelf.client) == []
    with pytest.raises(RegistryError, match="no model is registered yet"):
        get_model(shelf.client, "solar")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"name": "sollar", "alias": "champion"}, ["'sollar'", "did you mean 'solar'"]),
        ({"name": "cats", "alias": "champion"}, ["'cats'", "there are 'solar'"]),
        ({"name": "solar", "alias": "previous"}, ["no alias 'previous'", "'champion' (version 1)", "versions: 1, 2"]),
        ({"name": "solar", "version": "9"}, ["no version '9'", "'challenger' (version 2)", "versions: 1, 2"]),
    ],
)
def test_what_is_not_in_the_registry_is_refused_with_what_there_is(shelf, asked, words):
    shelf.register("a" * 16, 0.6)
    shelf.register("b" * 16, 0.7)

    with pytest.raises(RegistryError) as caught:
        get_version(shelf.client, **{"alias": None, "version": None, **asked})

    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_stage_that_was_never_registered_has_no_version(shelf):
    shelf.register("a" * 16, 0.6)

    model_id = shelf.client.get_model_version("solar", "1").tags["vggrow.model_id"]
    assert find_version(shelf.client, "solar", "b" * 16, model_id) is None
    assert find_version(shelf.client, "solar", "a" * 16, "m-another") is None
    assert find_version(shelf.client, "solar", "a" * 16, model_id).version in (1, "1")
