"""Promotion and rollback on real stores and a real server: decided once, recorded, and whole after any kill."""

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from mlflow import MlflowClient

import deploy.promote
from deploy.contenders import compare
from deploy.gate import GateRules
from deploy.gate_evidence import uses
from deploy.promote import promote, rollback
from deploy.registry import CHAMPION
from pipelines.manifest import read_manifest, write_manifest
from pipelines.scan import scan
from tests.deploy.gate_store import (
    BARE,
    LEAKY,
    SAYER,
    SKILLED,
    SPLIT,
    build,
    decide_on,
    fingerprint_of,
    killed_at,
    make_pictures,
    show,
    tree,
    write_model,
)
from training.store import Store
from vggcore.errors import DatasetError, RegistryError
from vggcore.recipe import Data

EASY = GateRules(max_class_drop=1.0)


def test_a_challenger_that_is_better_becomes_champion_and_all_of_it_is_recorded(shelf):
    shelf.register("solar", SAYER, SKILLED)
    shelf.client.update_model_version("solar", "2", description="Trained on Monday.")

    outcome = decide_on(shelf)

    assert (outcome.action, outcome.version, outcome.champion_before) == ("promoted", "2", "1"), outcome.reason
    assert shelf.aliases("solar") == {"champion": "2", "previous": "1"}
    tags = shelf.tags("solar", "2")
    assert tags["vggrow.decision"] == "promoted" and tags["vggrow.decided_by"] == "ann"
    assert tags["vggrow.decision_reason"] == outcome.reason and tags["vggrow.champion_before"] == "solar/1"
    assert tags["vggrow.decided_at"].endswith("Z")
    description = shelf.client.get_model_version("solar", "2").description
    assert description.startswith("**promoted** on ") and description.endswith("\n\nTrained on Monday.")
    found = shelf.decision()
    pictures = len(shelf.gate.contents)
    assert found["counts"] == {
        "both_right": pictures // 2, "only_challenger": pictures // 2, "only_champion": 0, "both_wrong": 0,
    }  # fmt: skip
    assert (found["use"], found["version"], found["gate_list"]) == (1, "2", shelf.gate.digest)
    assert "decision.png" in [item.path for item in shelf.client.list_artifacts(shelf.run_id)]
    (line,) = shelf.history("solar")
    assert (line["sequence"], line["action"], line["version"], line["champion_before"]) == (1, "promoted", "2", "1")
    assert not (shelf.root / "registry" / "solar" / "pending.json").exists()


def test_one_that_is_not_better_is_refused_recorded_and_no_longer_the_challenger(shelf):
    shelf.register("solar", SKILLED, SAYER)

    outcome = decide_on(shelf)

    assert outcome.action == "refused" and outcome.champion == "1"
    assert shelf.aliases("solar") == {"champion": "1"}
    assert shelf.tags("solar", "2")["vggrow.decision"] == "refused"
    assert shelf.client.get_model_version("solar", "2").description.startswith("**refused** on ")
    assert [line["action"] for line in shelf.history("solar")] == ["refused"]
    assert shelf.decision()["promote"] is False


def test_the_same_question_again_is_neither_counted_nor_written_again(shelf):
    shelf.register("solar", SKILLED, SAYER)
    first = decide_on(shelf)
    before = tree(shelf.root), show(shelf, "solar")

    again = decide_on(shelf, "models:/solar/2")
    by_name = decide_on(shelf)

    assert (again.action, again.reason) == ("refused", first.reason) == (by_name.action, by_name.reason)
    assert (tree(shelf.root), show(shelf, "solar")) == before
    assert len(uses(shelf.gate)) == 1


def test_other_rules_are_another_question_and_another_use_and_alpha_is_spent(shelf):
    shelf.register("solar", SKILLED, SAYER)
    decide_on(shelf, rules=GateRules(planned_uses=1))

    second = decide_on(shelf, "models:/solar/2", rules=GateRules(planned_uses=1, metric="balanced"))
    third = decide_on(shelf, "models:/solar/2")     # 52 planned uses: this would be the third of them

    assert [line["challenger"] for line in uses(shelf.gate)] == ["solar/2"] * 3
    assert "this is use 2 of the gate list, planned for 1" in second.reason
    assert "the uses before it had 0.1 of alpha 0.05" in third.reason


def test_what_is_champion_already_is_done(shelf):
    shelf.register("solar", SAYER, SKILLED)
    decide_on(shelf)
    before = tree(shelf.root), show(shelf, "solar")

    outcomes = [decide_on(shelf, model) for model in ("solar", "models:/solar@champion", "models:/solar/2")]

    assert {outcome.action for outcome in outcomes} == {"already champion"}
    assert (tree(shelf.root), show(shelf, "solar")) == before


def test_a_dry_run_says_the_same_and_changes_and_counts_nothing(shelf):
    shelf.register("solar", SAYER, SKILLED)
    shutil.rmtree(shelf.gate.folder / "scores")
    before = tree(shelf.root), show(shelf, "solar")

    rehearsed = decide_on(shelf, dry_run=True)

    assert (tree(shelf.root), show(shelf, "solar")) == before
    assert rehearsed.dry_run and rehearsed.action == "promoted"
    assert decide_on(shelf).reason == rehearsed.reason


def test_by_hand_the_gate_is_not_asked_and_the_reason_is_kept(shelf):
    shelf.register("solar", SKILLED, SAYER)

    outcome = decide_on(shelf, force="the customer wants it")

    assert outcome.action == "promoted" and shelf.aliases("solar") == {"champion": "2", "previous": "1"}
    assert shelf.tags("solar", "2")["vggrow.decision_reason"] == "promoted by hand: the customer wants it"
    assert shelf.history("solar")[0]["forced"] is True
    assert uses(shelf.gate) == []


@pytest.mark.parametrize(
    ("challenger", "change", "words"),
    [
        (LEAKY, None, "gate pictures seen in training: "),
        (BARE, None, "no gate list for its pictures"),
        (SKILLED, ("stages", SKILLED, "stage.json"), f"stage {SKILLED} is not in store"),
        (SKILLED, ("stages", SAYER, "stage.json"), f"stage {SAYER} is not in store"),
        (SKILLED, ("stages", SKILLED, "result.json"), "has no result"),
        (SKILLED, ("schedules", SKILLED, "stages.json"), "no schedule has the recipe and library versions"),
        (SKILLED, ("data",), "are not in the store"),
    ],
    ids=["leak", "no gate", "no stage", "no ancestor", "no result", "no code", "no data"],
)
def test_leaks_and_a_broken_lineage_refuse_before_the_list_is_looked_at(shelf, challenger, change, words):
    shelf.register("solar", SAYER, challenger)
    if change == ("data",):
        for folder in (shelf.root / "data").glob("?" * 32):
            (folder / "manifest.parquet").unlink()
    elif change is not None:
        shelf.root.joinpath(*change).unlink()

    outcome = decide_on(shelf, rules=EASY)
    again = decide_on(shelf, rules=EASY)

    assert outcome.action == "refused" and words in outcome.reason
    assert again.reason == outcome.reason
    assert shelf.aliases("solar") == {"champion": "1", "challenger": "2"}   # it waits for a person
    assert uses(shelf.gate) == [] and len(shelf.history("solar")) == 1


def test_a_near_duplicate_of_a_gate_picture_in_a_training_manifest_is_a_leak(shelf):
    shelf.register("solar", SAYER, SKILLED)
    fingerprint = fingerprint_of(shelf, SKILLED)
    manifest = read_manifest(shelf.root / "data" / fingerprint)
    place = manifest.table["split"].to_pylist().index("train")
    hashes = manifest.table["dhash"].to_pylist()
    hashes[place] = int(shelf.gate.dhashes[0]) ^ 0b11
    number = manifest.table.column_names.index("dhash")
    column = pa.array(hashes, pa.uint64())
    table = manifest.table.set_column(number, manifest.table.schema.field("dhash"), column)
    write_manifest(dataclasses.replace(manifest, table=table), shelf.root / "data" / fingerprint)

    outcome = decide_on(shelf)

    assert outcome.action == "refused"
    assert f"{manifest.table['path'][place]} in train of A-b, near to one" in outcome.reason


def test_a_stage_tag_that_is_not_what_the_package_says_is_a_broken_lineage(shelf):
    shelf.register("solar", SAYER, LEAKY, tagged=SAYER)

    outcome = decide_on(shelf)

    assert outcome.action == "refused" and f"its tag names stage {SAYER}, its package {LEAKY}" in outcome.reason


def test_a_first_version_needs_the_floor_and_a_lineage_but_no_gate(shelf):
    shelf.register("solar", BARE)
    shelf.client.delete_registered_model_alias("solar", CHAMPION)

    low = decide_on(shelf, floor=0.9)
    good = decide_on(shelf, floor=0.5)

    assert (low.action, good.action) == ("refused", "promoted")
    assert shelf.aliases("solar") == {"champion": "1"}
    assert [line["action"] for line in shelf.history("solar")] == ["refused", "promoted"]


def test_rollback_puts_the_previous_champion_back_and_the_gate_alone_does_not_promote_the_other_again(shelf):
    shelf.register("solar", SAYER, SKILLED)
    decide_on(shelf)

    back = rollback(shelf.client, store=shelf.store, name="solar", reason="complaints", by="bob")
    again = decide_on(shelf, "models:/solar/2")

    assert (back.action, back.version, back.champion_before) == ("rolled back", "1", "2")
    assert shelf.aliases("solar") == {"champion": "1"}
    assert shelf.history("solar")[1]["reason"] == "rolled back to version 1: complaints"
    assert again.action == "refused" and "this version was rolled back on" in again.reason
    assert decide_on(shelf, "models:/solar/2", force="mended").action == "promoted"
    assert shelf.aliases("solar") == {"champion": "2", "previous": "1"}
    assert "vggrow.rolled_back" not in shelf.tags("solar", "2")
    assert [line["sequence"] for line in shelf.history("solar")] == [1, 2, 3, 4]


def test_to_a_production_model_the_version_is_copied_once_and_becomes_its_champion(shelf):
    shelf.register("candidates", SAYER, SKILLED)

    first = promote(shelf.client, store=shelf.store, model="models:/candidates/1", to="solar")
    second = decide_on(shelf, "models:/candidates/2", to="solar")
    third = decide_on(shelf, "models:/candidates/2", to="solar")

    assert (first.action, first.model, first.version) == ("promoted", "solar", "1")
    assert (second.action, second.version, second.champion_before) == ("promoted", "2", "1")
    assert third.action == "already champion"
    assert shelf.aliases("solar") == {"champion": "2", "previous": "1"}
    assert shelf.aliases("candidates") == {"champion": "1"}
    assert shelf.tags("candidates", "2")["vggrow.decision"] == shelf.tags("solar", "2")["vggrow.decision"] == "promoted"
    assert len(shelf.client.search_model_versions("name = 'solar'")) == 2


def test_the_champion_is_scored_again_when_the_list_is_renewed_and_the_count_begins_anew(shelf):
    shelf.register("solar", SKILLED, SAYER)
    decide_on(shelf)
    old = shelf.gate

    scan(Data(root=shelf.pictures, split=SPLIT), shelf.root, threads=1, renew_gate=True)
    outcome = decide_on(shelf, "models:/solar/2")

    assert shelf.gate.digest != old.digest and outcome.decision["use"] == 1
    assert len(list((old.folder / "scores").iterdir())) == len(list((shelf.gate.folder / "scores").iterdir())) == 2
    assert len(uses(old)) == len(uses(shelf.gate)) == 1
    assert sum(outcome.decision["counts"].values()) == len(shelf.gate.contents)


def test_scores_are_kept_and_another_decision_reads_them(shelf, monkeypatch):
    shelf.register("solar", SKILLED, SAYER)
    decide_on(shelf)
    kept = {path: path.stat().st_mtime_ns for path in (shelf.gate.folder / "scores").rglob("*") if path.is_file()}

    decide_on(shelf, "models:/solar/2", rules=GateRules(metric="balanced"))

    assert {path: path.stat().st_mtime_ns for path in (shelf.gate.folder / "scores").rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize(("change", "words"), [("gone", "cannot be read"), ("changed", "has changed since")])
def test_a_gate_picture_that_is_gone_or_changed_is_named_and_nothing_is_decided(shelf, tmp_path, change, words):
    shelf.register("solar", SAYER, SKILLED)
    fingerprint = fingerprint_of(shelf, SKILLED)
    manifest = read_manifest(shelf.root / "data" / fingerprint)
    pictures = shutil.copytree(shelf.pictures, tmp_path / "pictures")
    write_manifest(dataclasses.replace(manifest, root=pictures), shelf.root / "data" / fingerprint)
    path = pictures / str(manifest.split("gate").paths[0])
    path.unlink() if change == "gone" else path.write_bytes(b"other")

    with pytest.raises(DatasetError, match=rf"{path.name}: gate picture .*{words}"):
        decide_on(shelf)

    assert shelf.aliases("solar") == {"champion": "1", "challenger": "2"}
    assert shelf.history("solar") == [] and uses(shelf.gate) == []


def test_compare_shows_the_gates_evidence_and_leaves_no_trace(shelf):
    shelf.register("solar", SAYER, SKILLED)
    before = show(shelf, "solar")

    decision = compare(shelf.client, store=shelf.store, a="models:/solar/2", b=f"{SAYER}")

    assert decision.promote and decision.counts["only_challenger"] == len(shelf.gate.contents) // 2
    assert show(shelf, "solar") == before and uses(shelf.gate) == [] and shelf.history("solar") == []


def test_models_of_other_classes_or_pictures_are_not_compared(shelf, tmp_path):
    manifest = read_manifest(shelf.root / "data" / fingerprint_of(shelf, SKILLED))
    eels = write_model(tmp_path / "eels", manifest, SKILLED, classes=("blue", "eel", "red"))
    other = scan(Data(root=make_pictures(tmp_path / "others", seed=7), split=SPLIT), shelf.root, threads=1)
    stage = json.loads((shelf.root / "stages" / SAYER / "stage.json").read_text())
    (shelf.root / "stages" / SAYER / "stage.json").write_text(json.dumps({**stage, "fingerprint": other.fingerprint}))

    with pytest.raises(DatasetError, match=r"know other classes.*eel"):
        compare(shelf.client, store=shelf.store, a=SKILLED, b=str(eels))
    with pytest.raises(DatasetError, match="learnt from other pictures"):
        compare(shelf.client, store=shelf.store, a=LEAKY, b=SAYER)
    with pytest.raises(DatasetError, match="no gate list for the pictures it learnt from"):
        compare(shelf.client, store=shelf.store, a=BARE, b=SAYER)


def test_a_challenger_with_other_classes_waits_for_a_person(shelf, tmp_path):
    shelf.register("solar", SAYER, SKILLED)
    manifest = read_manifest(shelf.root / "data" / fingerprint_of(shelf, SKILLED))
    folder = write_model(tmp_path / "eels", manifest, SKILLED, classes=("blue", "eel", "red"))
    shelf.log("eels", folder)
    shelf.register("fish", SAYER, "eels", tagged=SKILLED)

    outcome = decide_on(shelf, "fish")

    assert outcome.action == "refused"
    assert "classes that only the challenger has: 1 (eel)" in outcome.reason
    assert uses(shelf.gate) == [] and shelf.aliases("fish")["challenger"] == "2"


MISTAKES = [
    ("sola", r"no registered model 'sola'; did you mean 'solar'"),
    ("models:/solar@best", r"solar@best: no alias 'best'; aliases: 'challenger' \(version 2\), 'champion' \(version 1\)"),
    ("models:/solar/9", r"solar/9: no version '9'"),
    ("models:/solar/1/2", r"not a model's address"),
    ("runs:/abc", r"not a model's address"),
]


def test_what_is_not_in_the_registry_is_named(shelf):
    shelf.register("solar", SAYER, SKILLED)
    before = tree(shelf.root), show(shelf, "solar")

    for model, words in MISTAKES:
        with pytest.raises(RegistryError, match=words):
            decide_on(shelf, model)
    with pytest.raises(RegistryError, match="no previous champion to go back to"):
        rollback(shelf.client, store=shelf.store, name="solar")
    with pytest.raises(RegistryError, match="no registered model"):
        rollback(shelf.client, store=shelf.store, name="sola")

    assert (tree(shelf.root), show(shelf, "solar")) == before


def test_a_champion_deleted_while_models_are_scored_is_noticed(shelf, monkeypatch):
    """The version is deleted by another client between the scores and the lock; then the challenger is the first."""
    shelf.register("solar", SAYER, SKILLED)
    gather, deleted = deploy.promote.gather, []

    def gather_then_lose(*words, **how):
        found = gather(*words, **how)
        if not deleted:
            MlflowClient(shelf.tracking).delete_model_version("solar", "1")
            deleted.append(found)
        return found

    monkeypatch.setattr(deploy.promote, "gather", gather_then_lose)

    outcome = decide_on(shelf, floor=0.5)

    assert deleted[0].champion is not None
    assert outcome.action == "promoted" and "at or above the floor" in outcome.reason
    assert shelf.aliases("solar") == {"champion": "2"}
    assert uses(shelf.gate) == []


def test_a_promotion_killed_at_any_line_is_finished_by_the_same_command(shelf):
    line, kills = 1, 0
    while True:
        name = f"solar-{line}"
        shelf.register(name, SAYER, SKILLED)

        killed = killed_at(line, lambda name=name: decide_on(shelf, name, force="try"))
        halfway = shelf.aliases(name)
        after = decide_on(shelf, name, force="try")

        assert set(halfway.values()) <= {"1", "2"} and CHAMPION in halfway, (line, halfway)
        assert after.action in ("promoted", "already champion"), line
        assert shelf.aliases(name) == {"champion": "2", "previous": "1"}, line
        assert [entry["sequence"] for entry in shelf.history(name)] == [1], line
        assert shelf.tags(name, "2")["vggrow.decision"] == "promoted"
        assert not (shelf.root / "registry" / name / "pending.json").exists()
        kills += killed
        if not killed:
            break
        line += 4   # every fourth of them: the whole row takes minutes
    assert kills >= 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rollback_killed_at_any_line_is_finished_by_the_same_command_and_not_done_twice(shelf):
    line = 1
    while True:
        name = f"solar-{line}"
        shelf.register(name, SAYER, SKILLED)
        decide_on(shelf, name, force="try")

        killed = killed_at(line, lambda name=name: rollback(shelf.client, store=shelf.store, name=name))
        halfway = shelf.aliases(name)
        try:
            again = rollback(shelf.client, store=shelf.store, name=name)
        except RegistryError as error:   # the killed one had been done but for its last line
            assert "no previous champion" in str(error)
        else:
            assert again.action == "rolled back" and (again.version, again.champion_before) == ("1", "2")

        assert CHAMPION in halfway and set(halfway.values()) <= {"1", "2"}
        assert shelf.aliases(name) == {"champion": "1"}, line
        assert [entry["action"] for entry in shelf.history(name)] == ["promoted", "rolled back"], line
        if not killed:
            break
        line += 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_refusal_killed_on_the_way_is_counted_once(shelf):
    for line in (2, 12, 30):
        shelf.register(f"solar-{line}", SKILLED, SAYER)
        killed_at(line, lambda line=line: decide_on(shelf, f"solar-{line}"))

        outcome = decide_on(shelf, f"models:/solar-{line}/2")

        assert outcome.action == "refused"
        assert [entry["action"] for entry in shelf.history(f"solar-{line}")] == ["refused"]
    assert len(uses(shelf.gate)) == 3


def by_hand(tracking: str, store: str, version: int) -> tuple[str, str | None]:
    """One of many promoters: a process of its own."""
    outcome = promote(
        MlflowClient(tracking), store=Store(Path(store)), model=f"models:/solar/{version}", force=f"number {version}"
    )
    return outcome.action, outcome.champion_before


def by_gate(tracking: str, store: str, _: int) -> tuple[str, str | None]:
    """One of several that promote the same challenger."""
    outcome = promote(MlflowClient(tracking), store=Store(Path(store)), model="models:/fields/2")
    return outcome.action, outcome.champion_before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_promoters_at_once_on_one_server_make_one_history(mlflow_server, tmp_path):
    shelf = build(tmp_path, mlflow_server, (SAYER, SKILLED))
    shelf.register("solar", *[SAYER] * 21)
    shelf.register("fields", SAYER, SKILLED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deploy.promote", "deploy.predict", "training.evaluate", "deploy.judge"])

    with context.Pool(20) as pool:
        some = pool.starmap(by_hand, [(mlflow_server, str(shelf.root), version) for version in range(2, 22)], chunksize=1)
        others = pool.starmap(by_gate, [(mlflow_server, str(shelf.root), number) for number in range(3)], chunksize=1)

    lines = shelf.history("solar")
    assert [action for action, _ in some] == ["promoted"] * 20
    assert [line["sequence"] for line in lines] == list(range(1, 21))
    assert [line["champion_before"] for line in lines] == ["1", *(line["version"] for line in lines[:-1])]
    assert sorted(int(line["version"]) for line in lines) == list(range(2, 22))
    assert shelf.aliases("solar") == {"champion": lines[-1]["version"], "previous": lines[-1]["champion_before"]}
    for line in lines:
        assert shelf.tags("solar", line["version"])["vggrow.champion_before"] == f"solar/{line['champion_before']}"
    assert sorted(action for action, _ in others) == ["already champion"] * 2 + ["promoted"]
    assert shelf.aliases("fields") == {"champion": "2", "previous": "1"}
    assert len(shelf.history("fields")) == len(uses(shelf.gate)) == 1
