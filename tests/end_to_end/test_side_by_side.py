"""Stages that do not depend on one another run at the same time where there is room; a failing one stops no other."""

import json
import random
import re
import time
from contextlib import suppress
from datetime import datetime

import psutil
import pytest

from tests.end_to_end.command import Running, vggrow, wait_until

SIDE_BY_SIDE = ("--workers", 1, "--threads", 1, "--address", "local")
MORE = """
[[stage]]
name = "B-36"
net = "B"
scale = 36
init_from = "A-36"
[[stage]]
name = "C-36"
net = "C"
scale = 36
[[stage]]
name = "D-36"
net = "D"
scale = 36
init_from = "C-36"
[register]
stage = "B-36"
"""


def times(store, name: str) -> tuple[datetime, float]:
    """When a stage's workers began, and for how many seconds it trained."""
    for path in (store / "stages").glob("*/stage.json"):
        if json.loads(path.read_text())["name"] == name:
            start = json.loads((path.parent / "starts.jsonl").read_text().splitlines()[0])
            return datetime.fromisoformat(start["at"]), json.loads((path.parent / "result.json").read_text())["seconds"]
    raise AssertionError(name)


@pytest.mark.slow
def test_a_failing_stage_stops_no_other_and_its_children_are_left_out(make_recipe, tmp_path):
    diverging = MORE.replace('name = "C-36"', 'name = "C-36"\nlearning_rate = 1e9')
    recipe, store = make_recipe(epochs=2, more=diverging), tmp_path / "store"

    failed = vggrow("train", recipe, "--store", store, *SIDE_BY_SIDE)

    assert failed.returncode == 2
    assert "D-36: not started: C-36 failed" in failed.stderr
    assert re.search(r"B-36: finished", failed.stderr) and re.search(r"A-36: finished", failed.stderr)
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "stage 'C-36': the loss at iteration" in line
    makes = vggrow("plan", recipe, "--store", store, "--json")
    states = {stage["name"]: stage["status"] for stage in json.loads(makes.stdout)["stages"]}
    assert (states["A-36"], states["B-36"]) == ("done", "done") and "done" not in (states["C-36"], states["D-36"])


@pytest.mark.slow
def test_two_stages_without_a_parent_run_at_the_same_time(make_recipe, tmp_path):
    recipe, store = make_recipe(epochs=40, more=MORE), tmp_path / "store"

    done = vggrow("train", recipe, "--store", store, *SIDE_BY_SIDE)

    assert done.returncode == 0, done.stderr
    (a_began, a_took), (c_began, c_took) = times(store, "A-36"), times(store, "C-36")
    assert abs((c_began - a_began).total_seconds()) < max(a_took, c_took)


@pytest.mark.slow
def test_a_stage_whose_controller_is_killed_ends_in_a_line_and_the_others_get_its_room(make_recipe, tmp_path):
    recipe, store = make_recipe(epochs=40, more=MORE), tmp_path / "store"
    words = ("train", recipe, "--store", store, *SIDE_BY_SIDE)
    seed = random.randrange(10**6)
    draws = random.Random(seed)
    running = Running(*words, log=tmp_path / "log")
    try:
        wait_until(lambda: len(controllers(running.process.pid)) == 2, timeout_s=300, running=running)
        moment, which = draws.uniform(0, 6), draws.randrange(2)      # from their first imports into the training
        print(f"seed {seed}: controller {which} after {moment:.1f} s")
        time.sleep(moment)
        controllers(running.process.pid)[which].kill()
        code = running.wait(900)
    finally:
        running.kill_everything()
    (line,) = [line for line in running.output().splitlines() if line.startswith("error: ")]
    finished = re.findall(r"(\S+): finished", running.output())
    again = vggrow(*words)

    assert code == 2 and "Ray Train's controller" in line and "Traceback" not in running.output()
    assert len(set(finished)) == 2, "of four stages one has lost its controller, and its child is left out"
    assert again.returncode == 0, again.stderr


def controllers(below: int) -> list[psutil.Process]:
    """Ray Train's controllers below a process, oldest first."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()).startswith("ray::TrainController"):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)
