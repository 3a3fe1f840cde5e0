"""What `vggrow status` says of a store: running, stopped, failed, finished, to do; and that looking holds nobody up."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.status import status_text, store_status
from tests.end_to_end.command import ROOT, environment, vggrow
from training.store import Store, hold

KEYS = {name: f"{number:016x}" for number, name in enumerate(("A-36", "B-36", "C-36", "D-36", "E-36"), start=1)}
HOLDER = """
import sys, time
from pathlib import Path
from training.store import Store, hold
store = Store(Path(sys.argv[1]))
with hold(store, "schedule-f", what="it"), hold(store, sys.argv[2], what="it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store(tmp_path) -> Store:
    """A-36 has finished, B-36 is half way, C-36 was stopped, D-36 has failed, E-36 has not begun."""
    found = Store(tmp_path)
    found.locks.mkdir()
    found.schedule("f").mkdir(parents=True)
    stages = [{"name": name, "key": key} for name, key in KEYS.items()]
    record = {"name": "photos", "key": "f", "stages": stages, "registered": None}
    (found.schedule("f") / "stages.json").write_text(json.dumps(record))
    for name in ("A-36", "B-36", "C-36", "D-36"):
        folder = found.stage(KEYS[name])
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text(json.dumps({"name": name, "stage": {"max_epochs": 4, "global_batch": 9}}))
        rows = [
            {"iteration": 7, "train_loss": 1.0},
            {"epoch": 1, "iteration": 7, "train_loss": 1.0, "val_top1_accuracy": 0.4, "learning_rate": 0.01, "seconds": 2.0},
            {"iteration": 14, "train_loss": 0.5},
            {"epoch": 2, "iteration": 14, "train_loss": 0.5, "val_top1_accuracy": 0.6, "learning_rate": 0.01, "seconds": 3.0},
            {"iteration": 15, "train_loss": 0.25},
        ]
        (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "logs").mkdir()
        (folder / "starts.jsonl").write_text(json.dumps({"world_size": 2}) + "\n")
    (found.stage(KEYS["A-36"]) / "result.json").write_text("{}")
    (found.stage(KEYS["D-36"]) / "error.json").write_text(json.dumps({"fence": 1, "type": "X", "message": "the disk is full"}))
    return found


@pytest.fixture
def running(store):
    """Another process trains B-36."""
    words = [sys.executable, "-c", HOLDER, str(store.root), f"stage-{KEYS['B-36']}"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_every_state_is_told_with_its_figures(store, running):
    (schedule,) = store_status(store)

    assert schedule.running
    assert [stage.state for stage in schedule.stages] == ["finished", "running", "stopped", "failed", "to do"]
    second = schedule.stages[1]
    assert (second.epoch, second.max_epochs, second.iteration, second.train_loss) == (2, 4, 15, 0.25)
    assert second.images_per_second == 63 and second.workers == 2 and f"process {running.pid}" in second.by
    assert schedule.stages[3].problem == "the disk is full"
    text = status_text([schedule])
    assert text.startswith("photos (f): running\n") and "the disk is full" in text
    folders = [stage.logs for stage in schedule.stages]
    assert folders == [None, *(str(store.stage(KEYS[name]) / "logs") for name in ("B-36", "C-36", "D-36")), None]
    assert f"  D-36: logs in {folders[3]}" in text.splitlines()


def test_a_killed_holder_is_seen_at_once(store, running):
    running.kill()
    running.wait()

    (schedule,) = store_status(store)

    assert not schedule.running and schedule.stages[1].state == "stopped"


def test_looking_all_the_time_keeps_nobody_from_a_lock(store):
    name = f"stage-{KEYS['B-36']}"
    with hold(store, name, what="it"):
        pass
    words = [sys.executable, "-m", "deploy", "status", str(store.root), "--watch"]
    watcher = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment())
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            store_status(store)
            with hold(store, name, what="it"):
                pass
        assert watcher.poll() is None
    finally:
        watcher.terminate()
        watcher.wait()


def test_an_empty_store_and_an_absent_one(tmp_path):
    (tmp_path / "store").mkdir()

    empty = vggrow("status", tmp_path / "store")
    absent = vggrow("status", tmp_path / "nothing")

    assert empty.returncode == 0 and "no schedule has begun here" in empty.stdout
    assert absent.returncode == 2 and "no store there" in absent.stderr
    assert list(Path(tmp_path / "store").iterdir()) == []
