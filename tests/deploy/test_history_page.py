"""What people decided by hand stands beside the ticks; what the ticks decided does not stand twice."""

import json
from pathlib import Path

import pytest

from deploy.history_page import by_hand, history_text, write_page
from deploy.pipeline_file import Pipeline, load_pipeline
from deploy.ticks import Ticks
from training.store import Store

RECIPE = """
name = "solar"
[data]
root = "pictures"
[[stage]]
name = "A-256"
net = "A"
scale = 256
"""


@pytest.fixture
def pipeline(tmp_path) -> Pipeline:
    """One tick, which promoted version 2; then a person rolled it back."""
    (tmp_path / "solar.toml").write_text(RECIPE)
    (tmp_path / "pipeline.toml").write_text('name = "weekly"\nrecipe = "solar.toml"\n')
    found = load_pipeline(tmp_path / "pipeline.toml")
    tick = found.run.store / "retraining" / "weekly" / "ticks" / "1"
    tick.mkdir(parents=True)
    (tick / "scan.json").write_text(json.dumps({"at": "2026-11-24T02:30:00.000Z", "drift": None}))
    champion = {"version": "2", "test_top1_accuracy": 0.81}
    told = {"at": "2026-11-24T02:40:00.000Z", "outcome": "promoted", "reason": "better", "champion": champion}
    (tick / "notify.json").write_text(json.dumps(told))
    lines = [
        {"at": "2026-11-24T02:39:00Z", "by": "vggrow retrain weekly", "action": "promoted", "version": "2", "reason": "better"},
        {"at": "2026-11-25T09:00:00Z", "by": "ada", "action": "rolled back", "version": "1", "reason": "complaints <b>"},
    ]
    registry = found.run.store / "registry" / "solar"
    registry.mkdir(parents=True)
    (registry / "history.jsonl").write_text("".join(json.dumps(line | {"champion_before": "2"}) + "\n" for line in lines))
    return found


def ticks_of(pipeline: Pipeline):
    return Ticks.of(Store(pipeline.run.store), pipeline.name).all()


def test_the_terminal_shows_ticks_and_then_decisions_by_hand(pipeline):
    text = history_text(ticks_of(pipeline), by_hand(pipeline))

    assert text.splitlines()[1].startswith("1     2026-11-24 02:30  promoted")
    assert text.splitlines()[-1].startswith("by hand, 2026-11-25 09:00: version 2 rolled back, version 1 champion again by ada")
    assert text.count("vggrow retrain weekly") == 0


def test_the_page_shows_them_too_escaped(pipeline, tmp_path):
    page = tmp_path / "page.html"

    write_page(pipeline, ticks_of(pipeline), by_hand(pipeline), page)

    section = Path(page).read_text().partition("Decided by hand")[2].partition("</section>")[0]
    rows = section.partition("</caption>")[2]
    assert "rolled back" in rows and "ada" in rows and "complaints &lt;b&gt;" in rows and "promoted" not in rows


def test_new_classes_stand_below_the_tick_and_the_decision_that_they_belong_to(pipeline, tmp_path):
    new = {"name": "<ant>", "pictures": 4, "recall": 0.5, "precision": 1.0, "taken_for": [["cat", 2]], "taken_from": []}
    tick = pipeline.run.store / "retraining" / "weekly" / "ticks" / "1"
    (tick / "gate.json").write_text(json.dumps({"at": "2026-11-24T02:39:00.000Z", "decision": {"new_classes": [new]}}))
    history = pipeline.run.store / "registry" / "solar" / "history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    by_ada = {**lines[1], "action": "promoted", "version": "3", "decision": {"new_classes": [new]}}
    history.write_text("".join(json.dumps(line) + "\n" for line in (*lines, by_ada)))

    text = history_text(ticks_of(pipeline), by_hand(pipeline))
    write_page(pipeline, ticks_of(pipeline), by_hand(pipeline), tmp_path / "page.html")

    words = "new class '<ant>': recall 50.0 %, precision 100.0 % on 4 test pictures of it; taken for 'cat' 2 times"
    shown = text.splitlines()
    assert shown[2].strip() == words and shown[-1].strip() == words and shown[-2].startswith("by hand")
    page = (tmp_path / "page.html").read_text()
    assert page.count("&lt;ant&gt;") == 2 and "<ant>" not in page
