"""Models with new classes on a real store: a person's command asks the gate on the old classes, and packages keep the order."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deploy.contenders import compare
from deploy.gate_evidence import uses
from pipelines.gate_list import read_gate
from pipelines.manifest import read_manifest
from pipelines.scan import scan
from tests.deploy.gate_store import (
    SAYER,
    SKILLED,
    SPLIT,
    GateStore,
    decide_on,
    fingerprint_of,
    killed_at,
    make_pictures,
    state,
    write_model,
)
from vggcore.recipe import Data
from vggcore.whole_file import write_json

GROWN = ("blue", "red", "aardvark")     # the champion's order; the new class would sort first


def weights(*, greedy: bool = False) -> dict:
    """Tells red from blue; greedy: all that is not red it calls an aardvark."""
    found = state(skilled=True, classes=3)
    found["classifier.4.bias"][2] = 2.0 if greedy else -10.0
    return found


@pytest.fixture
def grown(shelf, tmp_path) -> GateStore:
    """Models "fish" and "greedy": the champion knows two classes, the challenger a third one after them."""
    manifest = read_manifest(shelf.root / "data" / fingerprint_of(shelf, SKILLED))
    for name, greedy in (("fish", False), ("greedy", True)):
        shelf.log(name, write_model(tmp_path / name, manifest, SKILLED, classes=GROWN, state=weights(greedy=greedy)))
        shelf.register(name, SAYER, name, tagged=SKILLED)
    path = shelf.root / "stages" / SAYER / "stage.json"
    about = json.loads(path.read_text())
    shelf.client.set_model_version_tag("fish", "1", "vggrow.stage_key", SAYER)
    shelf.client.set_model_version_tag("greedy", "1", "vggrow.stage_key", SAYER)
    facts = {"protocol": "centre", "scales": [32], "split": "test", "fingerprint": about["fingerprint"], "classes": list(GROWN)}
    write_json(
        shelf.root / "evaluations" / SKILLED / "0" / "evaluation.json",
        {**facts, "confusion": [[9, 0, 1], [0, 10, 0], [2, 0, 6]]},
    )
    return shelf


def test_with_new_classes_a_person_decides_and_the_command_then_asks_the_gate_without_force(grown):
    waits = decide_on(grown, "fish", person="vggrow models promote models:/fish/2")
    before = (grown.aliases("fish"), uses(grown.gate), grown.tags("fish", "2")["vggrow.decision"])
    again = decide_on(grown, "fish", person="vggrow models promote models:/fish/2")

    done = decide_on(grown, "fish")

    assert (waits.action, waits.reason) == (again.action, again.reason) and waits.decision["p_value"] is None
    assert waits.reason.startswith(
        "refused: class 'aardvark' is new since the champion; expected a person's decision: run `vggrow models"
        " promote models:/fish/2` to ask the gate"
    )
    assert before == ({"champion": "1", "challenger": "2"}, [], "refused")
    assert (done.action, done.champion) == ("promoted", "2") and len(uses(grown.gate)) == 1
    assert [line["action"] for line in grown.history("fish")] == ["refused", "promoted"]
    for outcome in (waits, done):
        (new,) = outcome.decision["new_classes"]
        assert (new["name"], new["recall"], new["precision"]) == ("aardvark", 0.75, 6 / 7)
        assert new["taken_for"] == (("blue", 2),) and new["taken_from"] == (("blue", 1),)


def test_a_challenger_that_calls_old_pictures_by_its_new_class_is_refused(grown):
    outcome = decide_on(grown, "greedy")

    assert outcome.action == "refused" and outcome.decision["p_value"] is not None
    blue = next(one for one in outcome.decision["classes"] if one["name"] == "blue")
    assert (blue["champion_recall"], blue["challenger_recall"]) == (1.0, 0.0)
    assert grown.aliases("greedy") == {"champion": "1"}


def test_compare_shows_the_same_and_not_the_other_way_round(grown, tmp_path):
    from vggcore.errors import DatasetError

    decision = compare(grown.client, store=grown.store, a="models:/fish/2", b="models:/fish/1")

    assert decision.promote and [one.name for one in decision.new_classes] == ["aardvark"]
    with pytest.raises(DatasetError, match=r"only the champion: 1 \(aardvark\)"):
        compare(grown.client, store=grown.store, a="models:/fish/1", b="models:/fish/2")


def test_a_renewed_list_has_the_new_class_and_still_judges_by_the_champions(grown, tmp_path):
    root = Path(shutil.copytree(grown.pictures, tmp_path / "pictures"))
    shutil.copytree(make_pictures(tmp_path / "more", each=30, seed=5) / "red", root / "aardvark")
    data, old = Data(root=root, split=SPLIT), grown.gate
    scanned = scan(data, grown.root, threads=1)
    scan(data, grown.root, threads=1, renew_gate=True)
    grown.register("plain", SAYER, SKILLED)

    promoted, plain = decide_on(grown, "fish"), decide_on(grown, "plain")

    assert Counter(scanned.split("gate").labels.tolist())[0] == 0 and scanned.classes[0] == "aardvark"   # no share of the old
    assert any("class 'aardvark' has no picture on the gate list" in note for note in scanned.notes)
    renewed = read_gate(old.home)      # the copied folder goes on with the list of the first
    listed = Counter(renewed.classes)
    assert renewed.digest != old.digest and listed["aardvark"] > 0
    assert promoted.action == "promoted"
    assert sum(promoted.decision["counts"].values()) == listed["blue"] + listed["red"]
    assert plain.action == "refused" and "gate classes unknown to it: 1 (aardvark)" in plain.reason
    assert not np.any([one["name"] == "aardvark" for one in promoted.decision["classes"]])


def test_a_wait_killed_at_any_line_is_recorded_once(grown):
    line = 1
    while killed_at(line, lambda: decide_on(grown, "fish", person="vggrow models promote models:/fish/2")):
        line += 7      # a prime step through the lines: each kill leaves what the next call finishes

    assert [one["action"] for one in grown.history("fish")] == ["refused"]
    assert uses(grown.gate) == [] and grown.aliases("fish") == {"champion": "1", "challenger": "2"}
