"""The gate refuses what it must and says why, promotes what is shown, and treats equal models as it promises."""

import io
import json
import math
import re
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy.gate import GateRules, Score, decide, first_decision
from deploy.gate_chart import decision_figure, power_figure
from vggcore.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 2000
# Seeds are fixed; a rate over 2,000 pairs has a standard error of 0.0049 at 0.05, of which three are allowed.
ALLOWED = 0.05 + 3 * math.sqrt(0.05 * 0.95 / PAIRS)


def score(model, right, labels, *, classes=("fine", "broken"), **facts):
    """A Score that has exactly these pictures right."""
    right, labels = np.asarray(right, bool), np.asarray(labels, np.int64)
    posteriors = np.zeros((len(labels), len(classes)), np.float32)
    posteriors[np.arange(len(labels)), np.where(right, labels, (labels + 1) % len(classes))] = 1
    known = {
        "contents": tuple(f"{7919 * number % 100_003:032x}" for number in range(len(labels))),
        "protocol": "dense",
        "scales": (256,),
        "size_mib": 12.5,
        "latency_ms": 8.0,
    }
    return Score(model=model, classes=classes, labels=labels, posteriors=posteriors, **{**known, **facts})


def pair(only_challenger, only_champion, pictures=333, *, rare=0, rare_changes=(0, 0), **facts):
    """Challenger and champion that differ on so many pictures of class 0, and as `rare_changes` on `rare` of class 1."""
    place = np.arange(pictures)
    new, old = place >= only_champion, ~((place >= only_champion) & (place < only_champion + only_challenger))
    gained, lost = rare_changes
    few = np.arange(rare)
    new = np.append(new, few >= lost)
    old = np.append(old, ~((few >= lost) & (few < lost + gained)))
    labels = np.append(np.zeros(pictures, int), np.ones(rare, int))
    return score("2", new, labels, **facts), score("1", old, labels, **facts)


def failed(decision):
    """The names of the conditions that did not hold."""
    return [check.name for check in decision.checks if not check.passed]


BETTER = pair(40, 10)


def test_a_challenger_shown_to_be_better_is_promoted():
    decision = decide(*BETTER, GateRules(), use=1)

    assert decision.promote and failed(decision) == []
    assert decision.p_value == pytest.approx(sum(math.comb(50, k) for k in range(40, 51)) / 2**50)
    assert decision.alpha_k == 0.05 / 52
    assert decision.gain == pytest.approx(30 / 333)
    assert 0 < decision.gain_low < decision.gain
    assert decision.counts == {"both_right": 283, "only_challenger": 40, "only_champion": 10, "both_wrong": 0}
    assert re.fullmatch(
        r"promoted: on 333 gate pictures the challenger was right 40 times where the champion was not, and 10 times the"
        r" other way round; that happens by chance with p = [\d.e-]+, at or below 0\.00096; top-1 accuracy gained 9\.0"
        r" points, at least \d\.\d with 95 % confidence",
        decision.reason,
    )


def test_a_gain_that_chance_explains_is_refused_in_words_a_manager_understands():
    decision = decide(*pair(9, 6), GateRules(), use=1)

    assert not decision.promote
    assert decision.reason.startswith(
        "refused: on 333 gate pictures the challenger was right 9 times where the champion was not, and 6 times the other"
        " way round; that happens by chance with p = 0.304, above 0.00096; with this split a gain of 3.9 points is"
        " needed, and it was 0.9"
    )
    assert decision.needed_gain == pytest.approx(13 / 333)     # 14 of 15: 16 / 2^15 is below 0.05 / 52
    assert 0.4 < decision.power < 0.8


def test_the_needed_gain_is_needed():
    assert not decide(*pair(25, 8), GateRules(), use=1).promote
    enough = decide(*pair(26, 7), GateRules(), use=1)
    assert enough.promote and enough.gain == pytest.approx(enough.needed_gain)


def test_with_balanced_accuracy_a_rare_class_weighs_as_much_as_a_common_one():
    rules = GateRules(metric="balanced", planned_uses=1)
    models = pair(4, 10, 900, rare=60, rare_changes=(14, 1))

    balanced, top1 = decide(*models, rules, use=1), decide(*models, replace(rules, metric="top1"), use=1)

    assert balanced.promote and not top1.promote
    assert balanced.gain == pytest.approx((13 / 60 - 6 / 900) / 2)
    assert "with every class weighing the same" in balanced.reason


REFUSALS = {
    "classes": [
        (lambda new, old: (replace(new, classes=("broken", "fine")), old), "another order"),
        (
            lambda new, old: (replace(new, classes=("fine", "cracked")), old),
            r"only the challenger has: 1 \(cracked\); only the champion: 1 \(broken\)",
        ),
    ],
    "pictures": [
        (lambda new, old: (replace(new, contents=("f" * 32, *new.contents[1:])), old), "1 pictures only the challenger"),
        (lambda new, old: (new, replace(old, contents=(old.contents[1], *old.contents[1:]))), "a picture stands twice"),
        (lambda new, old: (replace(new, labels=np.append(1, new.labels[1:])), old), "1 pictures have another label"),
        (lambda new, old: pair(0, 0, 0), "no picture"),
    ],
    "protocol": [   # a linear head's own, "pooled", is the one exception: see below
        (lambda new, old: (new, replace(old, protocol="centre")), "by dense at 256, the champion by centre at 256"),
        (lambda new, old: (replace(new, scales=(256, 384)), old), "dense at 256, 384"),
    ],
}


@pytest.mark.parametrize(("name", "change", "words"), [(name, *row) for name, rows in REFUSALS.items() for row in rows])
def test_models_that_cannot_be_compared_are_refused_without_numbers(name, change, words):
    decision = decide(*change(*BETTER), GateRules(), use=1)

    assert not decision.promote and failed(decision) == [name]
    assert re.match(rf"refused: .*{words}.*; expected ", decision.reason)
    assert decision.p_value is decision.gain is decision.counts is None
    json.dumps(decision.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("name", "facts", "rules", "words"),
    [
        ("uses", {"use": 53}, {}, "this is use 53 of the gate list, planned for 52; expected .*renew"),
        ("uses", {"use": 2, "spent": 0.05}, {}, "the uses before it had 0.05 of alpha 0.05, and this one wants 0.000962"),
        ("leaks", {"use": 1, "leaks": ["a/1.png", "b/2.png"]}, {}, r"seen in training: 2 \(a/1.png, b/2.png\)"),
        ("leaks", {"use": 1, "leaks": list("abcde")}, {}, r"5 \(a, b, c, \.\.\.\)"),
        ("lineage", {"use": 1, "lineage_problems": ["stage 3f is not in the store"]}, {}, "stage 3f is not in the store"),
        ("gain", {"use": 1}, {"min_gain": 0.08}, r"gained 9\.0 points, at least \d\.\d.*a lower bound above 8\.0 points"),
        ("size", {"use": 1}, {"max_size_mib": 10}, "takes 12.5 MiB; expected at most 10 MiB"),
        ("latency", {"use": 1}, {"max_latency_ms": 5}, "latency: 8.0 ms a picture; expected at most 5 ms"),
    ],
)
def test_a_better_challenger_is_refused_for_any_one_condition(name, facts, rules, words):
    decision = decide(*BETTER, GateRules(**rules), **facts)

    assert not decision.promote and failed(decision)[0] == name
    assert re.search(words, decision.reason)


def test_a_linear_head_and_what_stands_beside_it_are_compared_as_they_are_served():
    new, old = pair(40, 10)
    linear = {"protocol": "pooled", "scales": (96, 160)}

    for models in ((replace(new, **linear), old), (new, replace(old, **linear))):
        decision = decide(*models, GateRules(), use=1)
        check = next(check for check in decision.checks if check.name == "protocol")
        assert check.passed and "pooled at" in check.found


def test_all_planned_uses_can_be_had_and_no_more_than_alpha_is_spent():
    rules, share, spent, passed = GateRules(), 0.05 / 52, 0.0, 0
    for use in range(1, 54):
        decision = decide(*BETTER, rules, use=use, spent=spent)
        passed += decision.promote
        spent += share

    assert passed == 52 and decision.alpha_k == 0


def test_a_latency_that_was_not_measured_does_not_hold_the_budget():
    new, old = BETTER

    decision = decide(replace(new, latency_ms=None), old, GateRules(max_latency_ms=5), use=1)

    assert failed(decision) == ["latency"] and "not measured" in decision.reason


def test_all_failed_conditions_are_named():
    decision = decide(*pair(9, 6), GateRules(max_size_mib=1), use=60, leaks=["a"])

    assert failed(decision) == ["uses", "leaks", "better", "gain", "size"]
    assert decision.reason.endswith("(failed as well: leaks, better, gain, size)")
    assert decision.needed_gain == math.inf and decision.to_json()["needed_gain"] is None


def test_a_class_that_is_shown_to_have_fallen_too_far_is_refused():
    decision = decide(*pair(60, 5, rare=60, rare_changes=(1, 12)), GateRules(), use=1)

    assert failed(decision) == ["class recalls"]
    assert "class 'broken' went from 98.3 to 80.0 % on 60 pictures (change -18.3 points, interval -" in decision.reason
    assert decision.classes[1].high < 0


def test_a_fall_in_a_small_class_that_chance_explains_is_let_through_and_said():
    decision = decide(*pair(60, 5, rare=8, rare_changes=(0, 1)), GateRules(), use=1)

    assert decision.promote
    assert decision.classes[1].change == -0.125 and decision.classes[1].low < -0.125 and decision.classes[1].high >= 0
    words = next(check.found for check in decision.checks if check.name == "class recalls")
    assert "lowest change: class 'broken' went from 100.0 to 87.5 %" in words
    assert "can't be excluded in 1 of 2 classes" in words


def test_a_fall_that_is_shown_but_small_is_within_the_rule():
    models = pair(200, 5, 3000, rare=1000, rare_changes=(5, 45))

    assert decide(*models, GateRules(), use=1).promote
    assert failed(decide(*models, GateRules(max_class_drop=0.03), use=1)) == ["class recalls"]


def test_a_rare_class_that_is_lost_altogether_is_refused_from_five_pictures_on():
    assert failed(decide(*pair(60, 5, rare=5, rare_changes=(0, 5)), GateRules(), use=1)) == ["class recalls"]
    assert failed(decide(*pair(60, 5, rare=4, rare_changes=(0, 4)), GateRules(), use=1)) == []


def test_models_without_any_change_in_their_classes_seldom_fail_for_a_class():
    rng, fallen, runs = np.random.default_rng(3), 0, 200
    classes = tuple(f"class {number}" for number in range(20))

    for _ in range(runs):
        labels = np.repeat(np.arange(20), 25)
        models = [score(model, rng.random(500) < 0.8, labels, classes=classes) for model in ("2", "1")]
        decision = decide(*models, GateRules(), use=1)
        fallen += "class recalls" in failed(decision)

    assert fallen / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_classes_without_a_gate_picture_are_said():
    decision = decide(*pair(40, 10, classes=("fine", "broken", "dirty")), GateRules(), use=1)

    assert decision.promote and [one.name for one in decision.classes] == ["fine"]
    assert any("2 more have no gate picture" in check.found for check in decision.checks)


@pytest.mark.parametrize("metric", ["top1", "balanced"])
def test_of_2000_equal_pairs_at_most_the_promised_share_is_promoted(metric):
    rng, rules = np.random.default_rng(1), GateRules(metric=metric, planned_uses=1, max_class_drop=1.0)
    promoted = 0

    for _ in range(PAIRS):
        pictures = int(np.exp(rng.uniform(np.log(30), np.log(3000))))
        labels = (rng.random(pictures) < rng.choice([0.02, 0.1, 0.5])).astype(int)
        skill = np.where(labels == 1, 0.7, 0.9)
        new, old = rng.random((2, pictures)) < skill
        promoted += decide(score("2", new, labels), score("1", old, labels), rules, use=1).promote

    assert promoted / PAIRS <= ALLOWED
    assert promoted > 0


small_pairs = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*(st.lists(kind, min_size=n, max_size=n) for kind in (st.booleans(), st.booleans(), st.integers(0, 2))))
)
THREE = ("a", "b", "c")
metrics = st.sampled_from(["top1", "balanced"])


@settings(max_examples=60, deadline=None)
@given(small_pairs, metrics, st.randoms(use_true_random=False))
def test_the_order_of_pictures_and_of_classes_does_not_matter(models, metric, random):
    new, old, labels = map(np.array, models)
    rules, order, names = GateRules(metric=metric), list(range(len(labels))), random.sample(range(3), 3)
    random.shuffle(order)
    contents = np.array([f"{number:032x}" for number in range(len(labels))])
    first = [score(m, r, labels, classes=THREE, contents=tuple(contents)) for m, r in (("2", new), ("1", old))]
    renamed = np.array(names)[labels]
    classes = tuple(THREE[names.index(place)] for place in range(3))

    here = decide(*first, rules, use=1)
    there = decide(
        score("2", new[order], renamed[order], classes=classes, contents=tuple(contents[order])),
        score("1", old, renamed, classes=classes, contents=tuple(contents)),
        rules,
        use=1,
    )

    assert (here.promote, here.reason.split("lowest change")[0]) == (there.promote, there.reason.split("lowest change")[0])
    assert (here.p_value, here.counts) == (pytest.approx(there.p_value), there.counts)
    assert here.gain_low == pytest.approx(there.gain_low)
    assert sorted(here.classes, key=lambda one: one.name) == sorted(there.classes, key=lambda one: one.name)


@settings(max_examples=60, deadline=None)
@given(small_pairs, metrics, st.data())
def test_a_challenger_right_on_more_is_never_worse_off(models, metric, data):
    new, old, labels = map(np.array, models)
    more = new | np.array(data.draw(st.lists(st.booleans(), min_size=len(new), max_size=len(new))))
    rules, champion = GateRules(metric=metric, planned_uses=1), score("1", old, labels, classes=THREE)

    before = decide(score("2", new, labels, classes=THREE), champion, rules, use=1)
    after = decide(score("3", more, labels, classes=THREE), champion, rules, use=1)

    assert after.p_value <= before.p_value * (1 + 1e-9)
    assert after.gain_low >= before.gain_low - 1e-9
    assert set(failed(after)) <= set(failed(before))


@settings(max_examples=30, deadline=None)
@given(small_pairs, metrics)
def test_two_models_never_both_win_against_each_other(models, metric):
    new, old, labels = models
    one, other = score("2", new, labels, classes=THREE), score("1", old, labels, classes=THREE)
    rules = GateRules(metric=metric, planned_uses=1, max_class_drop=1.0)

    here, there = decide(one, other, rules, use=1), decide(other, one, rules, use=1)

    assert not (here.promote and there.promote)
    assert here.gain == pytest.approx(-there.gain)
    assert here.counts["only_champion"] == there.counts["only_challenger"]
    assert not decide(one, one, rules, use=1).promote


@pytest.mark.parametrize("number", [0, 99_999])
def test_a_posterior_that_is_no_number_counts_as_wrong(number):
    new, old = BETTER
    posteriors = np.full_like(new.posteriors, np.nan)

    decision = decide(replace(new, posteriors=posteriors), old, GateRules(planned_uses=1 + number // 100), use=1)

    assert not decision.promote and decision.counts["only_challenger"] == decision.counts["both_right"] == 0


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"metric": "auc"}, "metric is 'auc', wanted 'top1' or 'balanced'"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": 0.9}, "alpha is 0.9, wanted a chance above 0, at most 0.5"),
        ({"planned_uses": 0}, "planned_uses is 0"),
        ({"planned_uses": 2.5}, "planned_uses is 2.5, wanted a whole number"),
        ({"planned_uses": 10**6}, "planned_uses is 1000000, wanted at most 2500 at alpha 0.05"),
        ({"min_gain": -0.1}, "min_gain is -0.1"),
        ({"max_class_drop": 1.5}, "max_class_drop is 1.5"),
        ({"max_size_mib": 0}, "max_size_mib is 0"),
        ({"max_latency_ms": math.inf}, "max_latency_ms is inf"),
    ],
)
def test_rules_that_no_decision_could_follow_are_an_error(rule, words):
    with pytest.raises(RecipeError, match=re.escape(f"gate: {words}")):
        GateRules(**rule)


def test_a_first_version_becomes_champion_from_the_floor_on():
    at, below, broken = (first_decision(top1, 0.8) for top1 in (0.8, 0.7999, math.nan))

    assert at.promote and at.reason == "promoted: test top-1 accuracy is 0.8000, at or above the floor 0.8000"
    assert not below.promote and "0.7999; expected 0.8000 or above" in below.reason
    assert not broken.promote
    json.dumps([each.to_json() for each in (at, below, broken)], allow_nan=False)


def test_a_decision_as_json_holds_all_the_evidence():
    decision = decide(*pair(60, 5, rare=8, rare_changes=(0, 1)), GateRules(metric="balanced"), use=3)

    found = json.loads(json.dumps(decision.to_json(), allow_nan=False))

    assert found["promote"] is decision.promote and found["reason"] == decision.reason
    assert found["counts"]["only_champion"] == 6 and found["use"] == 3
    assert found["classes"][1]["name"] == "broken" and found["classes"][1]["pictures"] == 8
    assert {"name", "passed", "found", "wanted"} == set(found["checks"][0])
    assert (found["challenger"], found["champion"]) == ("2", "1")


@pytest.mark.parametrize(("pictures", "classes", "limit_s"), [(3000, 2, 1.0), (50_000, 1000, 5.0)])
@pytest.mark.parametrize("metric", ["top1", "balanced"])
def test_a_decision_is_quick(pictures, classes, limit_s, metric):
    rng = np.random.default_rng(5)
    labels, names = rng.integers(0, classes, pictures), tuple(map(str, range(classes)))
    models = [score(m, rng.random(pictures) < 0.8, labels, classes=names) for m in ("2", "1")]

    began = time.process_time()
    decide(*models, GateRules(metric=metric), use=1)

    assert time.process_time() - began < limit_s


@pytest.mark.parametrize(
    "decision",
    [
        decide(*BETTER, GateRules(), use=1),
        decide(*pair(9, 6, rare=5, classes=("$x$ & <", "b" * 60)), GateRules(metric="balanced"), use=1),
        decide(*pair(9, 6, rare=5, classes=("壊れた", "良い\u2028\x85")), GateRules(), use=1),
        decide(*pair(9, 6), GateRules(), use=99),
        decide(*pair(0, 0, 0), GateRules(), use=1),
        first_decision(0.5, 0.6),
    ],
    ids=["promoted", "odd names", "other script", "spent", "empty", "first"],
)
def test_each_decision_has_a_picture(decision):
    picture = Image.open(io.BytesIO(decision_figure(decision)))

    assert picture.format == "PNG" and picture.width > 900
    assert np.asarray(picture.convert("L")).std() > 5


def test_the_power_figure_in_the_documents_is_the_one_the_code_draws():
    kept, drawn = (ROOT / "docs/explanation/gate-power.svg").read_text(encoding="utf-8"), power_figure()

    for text in (kept, drawn):
        words = ["".join(element.itertext()) for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
        assert {"333 pictures", "each of 52 uses, 0.05 / 52"} <= set(words)
        assert "<image" not in text
    curves = [re.findall(r'<path d="([^"]+)" clip-path', text) for text in (kept, drawn)]
    numbers = [[float(number) for curve in each for number in re.findall(r"-?\d+\.?\d*", curve)] for each in curves]
    assert len(curves[0]) >= 8
    np.testing.assert_allclose(numbers[0], numbers[1], atol=0.01)
