"""A challenger with new classes is judged on the champion's: a picture of an old class called a new one is an error."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from deploy.decision_page import decision_of_json, decision_text
from deploy.gate import GateRules, Score, decide
from deploy.gate_chart import decision_figure
from deploy.gate_classes import NewClass, new_class_figures, new_class_text
from deploy.new_classes import person_check, promote_command

OLD, GROWN = ("fine", "broken"), ("fine", "broken", "aardvark")
PICTURES = 400     # the first 300 are fine


def score(model: str, classes: tuple[str, ...], answers: np.ndarray) -> Score:
    """A Score with these answers, (pictures,) numbers of classes."""
    posteriors = np.zeros((PICTURES, len(classes)), np.float32)
    posteriors[np.arange(PICTURES), answers] = 1
    labels = (np.arange(PICTURES) >= 300).astype(np.int64)
    contents = tuple(f"{number:032x}" for number in range(PICTURES))
    return Score(model, classes, contents, labels, posteriors, "centre", (32,), 1.0, 1.0)


def answers(*, wrong: dict[int, int], called: int = 2) -> np.ndarray:
    """The right answers but for so many pictures at the end of each class, which are called `called`."""
    found = (np.arange(PICTURES) >= 300).astype(np.int64)
    for label, (stop, number) in enumerate(((300, wrong.get(0, 0)), (400, wrong.get(1, 0)))):
        assert label in (0, 1)
        found[stop - number : stop] = called
    return found


def flipped(*, fine: int, broken: int) -> np.ndarray:
    """A champion's answers: so many of each class taken for the other one, from the beginning."""
    found = (np.arange(PICTURES) >= 300).astype(np.int64)
    found[:fine], found[300 : 300 + broken] = 1, 0
    return found


CHAMPION = score("1", OLD, flipped(fine=80, broken=30))
RIGHT = answers(wrong={})
TABLE = [
    # what the challenger answers, its classes, what fails, words of the reason
    (RIGHT, GROWN, None, "gained 27.5 points"),
    (RIGHT, (*GROWN, "bee"), None, "gained 27.5 points"),
    (answers(wrong={0: 10, 1: 3}), GROWN, None, "right 110 times where the champion was not, and 13"),
    (answers(wrong={0: 80}), GROWN, "better", "right 110 times where the champion was not, and 80"),
    (answers(wrong={1: 55}), GROWN, "class recalls", "class 'broken' went from 70.0 to 45.0 %"),
    (RIGHT, ("aardvark", *OLD), "classes", "only the challenger has: 1 (aardvark)"),
    (RIGHT, ("broken", "fine", "aardvark"), "classes", "only the challenger has: 1 (aardvark)"),
    (np.zeros(PICTURES, int), ("fine", "aardvark"), "classes", "only the champion: 1 (broken)"),
    (RIGHT, ("broken", "fine"), "classes", "another order"),
]


@pytest.mark.parametrize(("given", "classes", "fails", "words"), TABLE)
def test_the_gate_judges_new_classes_by_what_they_do_to_the_old_ones(given, classes, fails, words):
    challenger = score("2", classes, given)

    decision = decide(challenger, CHAMPION, GateRules(), use=1)

    failed = [check.name for check in decision.checks if not check.passed]
    assert (decision.promote, failed[:1]) == (fails is None, [fails] if fails else [])
    assert words in decision.reason
    if fails != "classes":
        assert [one.name for one in decision.classes] == list(OLD)      # the new ones have no gate picture and no part in it
        assert "more have no gate picture" not in " ".join(check.found for check in decision.checks)


def test_an_old_picture_called_a_new_class_is_an_error_though_its_own_class_comes_next():
    challenger = score("2", GROWN, answers(wrong={}))
    posteriors = challenger.posteriors.copy()
    posteriors[:100] = (0.45, 0.05, 0.5)      # of the old classes alone the first would win

    decision = decide(replace(challenger, posteriors=posteriors), CHAMPION, GateRules(), use=1)

    assert decision.counts["only_champion"] == 20 and decision.classes[0].challenger_recall == pytest.approx(2 / 3)


def test_what_a_new_class_does_on_test_is_counted_from_the_confusion_matrix():
    confusion = np.array([[8, 0, 2, 0], [1, 7, 1, 0], [3, 1, 6, 0], [0, 0, 0, 0]])

    found = new_class_figures((*GROWN, "bee"), confusion, ("aardvark", "bee"))

    assert found == (
        NewClass("aardvark", 10, 0.6, 6 / 9, (("fine", 3), ("broken", 1)), (("fine", 2), ("broken", 1))),
        NewClass("bee", 0, None, None),
    )
    assert [new_class_text(asdict(one)) for one in found] == [
        "new class 'aardvark': recall 60.0 %, precision 66.7 % on 10 test pictures of it; taken for 'fine' 3 times, 'broken'"
        " 1 time; taken from 'fine' 2 times, 'broken' 1 time",
        "new class 'bee': no picture on test",
    ]
    (silent,) = new_class_figures(("a", "b"), np.array([[4, 0], [3, 0]]), ("b",))
    assert "recall 0.0 %, never answered on 3 test pictures" in new_class_text(asdict(silent))


def test_a_decision_keeps_the_new_classes_through_json_and_shows_them():
    found = new_class_figures(GROWN, np.array([[8, 0, 2], [1, 7, 1], [3, 1, 6]]), ("aardvark",))

    decision = decide(score("2", GROWN, answers(wrong={})), CHAMPION, GateRules(), use=1, new_classes=found)
    kept = json.loads(json.dumps(decision.to_json(), allow_nan=False))

    assert decision_of_json(kept) == decision
    assert "new class 'aardvark': recall 60.0 %" in decision_text(kept)
    assert decision_figure(decision)[:4] == b"\x89PNG"


def test_a_person_is_asked_about_new_classes_alone_with_the_whole_command(tmp_path):
    rules = GateRules(metric="balanced", min_gain=0.01, max_size_mib=10.0)

    command = promote_command(
        "photos", "2", store=tmp_path / "a store", tracking="http://ann:secret@mlflow:5000", rules=rules
    )
    waits, same, by_hand = person_check(OLD, GROWN, command), person_check(OLD, OLD, command), person_check(OLD, GROWN, None)

    assert command == (
        f"vggrow models promote models:/photos/2 --store '{tmp_path / 'a store'}' --tracking http://mlflow:5000"
        " --metric balanced --min-gain 0.01 --max-size-mib 10.0"
    )
    assert (waits.passed, same.passed, by_hand.passed) == (False, True, True)
    assert waits.found == "class 'aardvark' is new since the champion" and f"`{command}`" in waits.wanted
