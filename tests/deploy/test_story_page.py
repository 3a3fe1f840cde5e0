"""The story's page from records as ticks write them: each day, the gate's numbers, and nothing from elsewhere."""

import json
import re

import numpy as np
import pytest

from deploy.gate import GateRules, Score, decide
from deploy.story_page import gate_sizes, write_page
from deploy.ticks import Tick

LABELS = np.array([1] * 68 + [0] * 32)


def score(version: int, right: int) -> Score:
    """A model that is right on the first so many of 100 gate pictures."""
    said = np.where(np.arange(100) < right, LABELS, 1 - LABELS)
    posteriors = np.eye(2, dtype=np.float32)[said]
    contents = tuple(f"{place:032x}" for place in range(100))
    name, classes = f"models:/cells/{version}", ("defective", "functional")
    return Score(name, classes, contents, LABELS, posteriors, "centre", (72,), size_mib=1.0, latency_ms=1.0)


def tick(number: int, outcome: str, champion: int, decision: dict | None = None, version: int | None = None) -> Tick:
    at = f"2026-03-0{number + 1}T08:00:00.000Z"
    reason = decision["reason"] if decision else f"/somewhere/story/pictures: the reason of {number}"
    records = {
        "scan": {"at": at, "summary": {"classes": {"defective": 32, "functional": 68}}, "drift": None},
        "decide": {"at": at},
        "notify": {"at": at, "outcome": outcome, "reason": reason, "champion": {"version": str(champion)}},
    }
    if version is not None:
        records["register"] = {"at": at, "version": str(version), "test_top1_accuracy": 0.7}
        records["gate"] = {"at": at, "outcome": outcome, "reason": reason, "decision": decision}
    return Tick(number, records)


def day(number: int, outcome: str) -> dict:
    typed = {"words": "vggrow retrain pipeline.toml", "ended": "exit 0", "seconds": 3.0, "output": "<b>&"}
    told = {"event": "e", "verified": True, "body": {"outcome": outcome, "version": None}}
    return {
        "number": number, "title": f"title {number}", "when": f"2026-03-0{number + 1}T09:00+01:00", "happened": [],
        "expected": "", "typed": [typed], "ticks": [number], "messages": [told], "outcome": outcome,
    }  # fmt: skip


@pytest.fixture
def page(tmp_path) -> str:
    """Four days: a champion, a better one, one that is refused, and the first again."""
    rules = GateRules(max_class_drop=1.0)
    better, worse = (decide(score(new, right), score(old, other), rules, use=new - 1).to_json()
                     for new, right, old, other in ((2, 90, 1, 60), (3, 70, 2, 90)))  # fmt: skip
    ticks = [
        tick(1, "promoted", 1, version=1), tick(2, "promoted", 2, better, 2), tick(3, "refused", 2, worse, 3),
        tick(4, "nothing new", 1),
    ]  # fmt: skip
    days = [day(number, outcome) for number, outcome in enumerate(("promoted", "promoted", "refused", "rolled back"), 1)]
    folder = tmp_path / "story"
    folder.mkdir()
    (folder / "story.json").write_text(json.dumps({"took_s": 60.0, "days": days}))

    write_page(folder, ticks, tmp_path / "page.html")

    return (tmp_path / "page.html").read_text()


def test_the_page_has_each_day_with_the_gates_numbers_and_each_version_on_the_drawing(page):
    for words in ("v1 60.0%", "v2 90.0%", "v3 70.0%", "On 100 gate pictures the challenger was right 30 times", "0.00096"):
        assert words in page, words
    assert page.count("<article") == 4 and page.count("data:image/png") == 2


def test_the_champions_line_steps_up_on_promotion_stays_on_refusal_and_falls_on_rollback(page):
    (line,) = re.findall(r'<path d="(M[^"]+)" fill="none"', page)
    first, *later = (float(y) for y in re.findall(r"(?:M[\d.]+ |V)([\d.]+)", line))

    assert later[0] < first and later[1] == later[0] and later[2] == first        # y counts downwards


def test_the_page_fetches_nothing_and_escapes_what_commands_said(page):
    assert all(found.startswith(("#", "data:")) for found in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert not re.search(r"url\(|@import|<script", page)
    assert "&lt;b&gt;&amp;" in page


def test_the_gate_of_the_story_sees_the_expected_gain_nearly_always_and_a_small_one_seldom():
    chances = dict(gate_sizes(GateRules()))

    assert chances[500] > 0.95 and chances[100] < 0.3
