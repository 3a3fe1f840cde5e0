"""What a promotion may trip over: others who act meanwhile, names, deleted models, kept scores that are not what they say."""

import json

import pytest
from mlflow import MlflowClient

import deploy.promote
from deploy.contenders import compare
from deploy.gate import GateRules
from deploy.promote import promote, rollback
from deploy.registry import show_model
from deploy.tracking_address import using_tracking
from pipelines.manifest import read_manifest
from tests.deploy.gate_store import SAYER, SKILLED, GateStore, decide_on, fingerprint_of, killed_at, show, tree, write_model
from vggcore.errors import RegistryError


def to_production(shelf: GateStore, version: int, **how):
    return promote(shelf.client, store=shelf.store, model=f"models:/candidates/{version}", to="solar", **how)


def test_a_reason_with_a_line_separator_breaks_neither_the_history_nor_the_uses(shelf):
    shelf.register("solar", SAYER, SKILLED)
    decide_on(shelf, force="one\u2028two\x85three")

    decide_on(shelf, "models:/solar/1", force="back")

    assert [line["version"] for line in shelf.history("solar")] == ["2", "1"]
    assert shelf.history("solar")[0]["reason"] == "promoted by hand: one\u2028two\x85three"


def test_what_was_rolled_back_in_production_is_not_promoted_there_again_from_the_candidates(shelf):
    shelf.register("candidates", SAYER, SKILLED)
    to_production(shelf, 1)
    assert to_production(shelf, 2).action == "promoted"
    rollback(shelf.client, store=shelf.store, name="solar")

    again = to_production(shelf, 2)

    assert again.action == "refused" and "this version was rolled back on" in again.reason
    assert shelf.aliases("solar") == {"champion": "1"}
    assert to_production(shelf, 2, force="mended").action == "promoted"


def test_a_version_that_was_rolled_back_is_no_first_version_when_the_champion_is_deleted(shelf):
    shelf.register("solar", SAYER, SKILLED)
    decide_on(shelf)
    rollback(shelf.client, store=shelf.store, name="solar")
    shelf.client.delete_model_version("solar", "1")

    outcome = decide_on(shelf, "models:/solar/2")

    assert outcome.action == "refused" and "rolled back on" in outcome.reason
    assert shelf.aliases("solar") == {}


def test_rolled_back_while_it_is_scored_and_the_champion_is_the_same_as_before(shelf, monkeypatch):
    """Version 2 is promoted and rolled back by others between the scores and the lock: nothing looks changed but a tag."""
    shelf.register("solar", SAYER, SKILLED)
    gather, meanwhile = deploy.promote.gather, []

    def gather_and_wait(*words, **how):
        found = gather(*words, **how)
        if not meanwhile:
            meanwhile.append(True)
            decide_on(shelf, force="others")
            rollback(shelf.client, store=shelf.store, name="solar")
        return found

    monkeypatch.setattr(deploy.promote, "gather", gather_and_wait)

    outcome = decide_on(shelf)

    assert outcome.action == "refused" and "rolled back on" in outcome.reason
    assert shelf.aliases("solar")["champion"] == "1"


def test_a_copy_from_a_model_that_was_deleted_and_made_anew_is_not_taken_for_the_new_one(shelf):
    shelf.register("candidates", SAYER, SKILLED)
    to_production(shelf, 1)
    shelf.client.delete_registered_model("candidates")
    shelf.register("candidates", SKILLED)

    outcome = to_production(shelf, 1)

    assert (outcome.action, outcome.version) == ("promoted", "2")


def test_a_kept_score_is_of_the_weights_and_not_of_what_a_package_says_of_itself(shelf, tmp_path):
    """A package that says that it is stage b, but has the weights of a, is compared first; then b is promoted."""
    manifest = read_manifest(shelf.root / "data" / fingerprint_of(shelf, SKILLED))
    lie = write_model(tmp_path / "lie", manifest, SAYER, lineage={"stage_key": SKILLED, "fingerprint": manifest.fingerprint})
    for folder in (shelf.gate.folder / "scores").iterdir():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    assert not compare(shelf.client, store=shelf.store, a=str(lie), b=SAYER).promote

    shelf.register("solar", SAYER, SKILLED)
    assert decide_on(shelf).action == "promoted"


def test_both_are_scored_again_by_another_protocol(shelf, tmp_path):
    manifest = read_manifest(shelf.root / "data" / fingerprint_of(shelf, SKILLED))
    shelf.log("dense", write_model(tmp_path / "dense", manifest, SKILLED, protocol="dense", scales=(32, 36)))
    shelf.register("solar", SAYER, "dense", tagged=SKILLED)
    shelf.client.set_model_version_tag("solar", "1", "vggrow.stage_key", SAYER)
    scores = shelf.gate.folder / "scores"
    kept = set(scores.iterdir())

    outcome = decide_on(shelf)

    assert outcome.action == "promoted"
    assert "both by dense at 32, 36" in [check["found"] for check in outcome.decision["checks"]]
    new = [json.loads((folder / "score.json").read_text()) for folder in set(scores.iterdir()) - kept]
    assert [one["protocol"] for one in new] == ["dense", "dense"]


def test_a_typing_error_in_the_production_models_name_opens_no_second_door(shelf):
    shelf.register("candidates", SAYER, SKILLED)
    to_production(shelf, 1)
    before = tree(shelf.root), show(shelf, "candidates")

    with pytest.raises(RegistryError, match="--to soler: no registered model 'soler'; did you mean 'solar'"):
        promote(shelf.client, store=shelf.store, model="candidates", to="soler", force="now")

    assert (tree(shelf.root), show(shelf, "candidates")) == before
    assert sorted(model.name for model in shelf.client.search_registered_models()) == ["candidates", "solar"]


@pytest.mark.parametrize("name", ["..", "a:b", "o'brien", 'a"b', "x" * 201, "a\nb"])
def test_a_name_that_no_model_can_have_is_one_line_everywhere(shelf, name):
    shelf.register("solar", SAYER, SKILLED)
    before = tree(shelf.root)

    for act in (
        lambda: decide_on(shelf, to=name),
        lambda: rollback(shelf.client, store=shelf.store, name=name),
        lambda: show_model(shelf.client, name),
    ):
        with pytest.raises(RegistryError, match="not a registered model's name") as told:
            act()
        assert "\n" not in str(told.value)

    assert tree(shelf.root) == before


def test_a_promotion_to_production_killed_at_any_line_is_finished_with_one_copy(shelf):
    shelf.register("candidates", SAYER, SKILLED)
    line = 1
    while True:
        name = f"production {line}"
        shelf.client.create_registered_model(name)
        promote(shelf.client, store=shelf.store, model="models:/candidates/1", to=name, force="first")

        killed = killed_at(
            line, lambda name=name: promote(shelf.client, store=shelf.store, model="models:/candidates/2", to=name, force="try")
        )
        after = promote(shelf.client, store=shelf.store, model="models:/candidates/2", to=name, force="try")

        assert after.action in ("promoted", "already champion"), line
        assert shelf.aliases(name) == {"champion": "2", "previous": "1"}, line
        assert [entry["version"] for entry in shelf.history(name)] == ["1", "2"], line
        assert shelf.tags(name, "2")["vggrow.decision"] == "promoted"
        assert len(shelf.client.search_model_versions(f"name = '{name}'")) == 2
        assert not (shelf.root / "registry" / name / "pending.json").exists()
        if not killed:
            break
        line += 29   # a few of them here; the whole row is like that of test_promote.py


def test_a_plan_whose_champion_others_moved_is_dropped_and_the_next_command_goes_its_way(shelf):
    shelf.register("solar", SAYER, SKILLED, SKILLED)
    assert killed_at(6, lambda: decide_on(shelf, "models:/solar/2", force="try"))
    MlflowClient(shelf.tracking).set_registered_model_alias("solar", "champion", "3")

    outcome = decide_on(shelf, "models:/solar/1", force="mine")

    assert (outcome.action, outcome.champion_before) == ("promoted", "3")
    assert [line["version"] for line in shelf.history("solar")] == ["1"]
    assert not (shelf.root / "registry" / "solar" / "pending.json").exists()


def test_a_deleted_champion_leaves_no_alias_and_previous_is_still_the_way_back(shelf):
    shelf.register("solar", SAYER, SKILLED)
    decide_on(shelf)
    shelf.client.delete_model_version("solar", "2")

    back = rollback(shelf.client, store=shelf.store, name="solar")

    assert (back.action, back.version, back.champion_before) == ("rolled back", "1", None)
    assert shelf.aliases("solar") == {"champion": "1"}


def test_a_version_without_a_run_is_promoted_by_hand_all_the_same(shelf):
    shelf.register("solar", SAYER)
    model_id = shelf.models[SKILLED]
    with using_tracking(shelf.tracking):
        shelf.client.create_model_version(
            "solar", f"models:/{model_id}", model_id=model_id, tags={"vggrow.model_id": model_id}
        )

    outcome = decide_on(shelf, "models:/solar/2", force="from elsewhere")

    assert outcome.action == "promoted" and shelf.tags("solar", "2")["vggrow.decision"] == "promoted"


def test_rules_that_change_between_uses_do_not_spend_more_than_alpha(shelf):
    shelf.register("solar", SKILLED, SAYER)

    told = [decide_on(shelf, "models:/solar/2", rules=GateRules(planned_uses=uses)) for uses in (2, 3, 4)]

    assert "of alpha 0.05" not in told[1].reason
    assert "the uses before it had 0.0417 of alpha 0.05, and this one wants 0.0125" in told[2].reason
