"""A machine that has too much to do for Ray to start in time: one line, and the same command goes on."""

import psutil
import pytest

from tests.end_to_end.command import Running, wait_until


def raylets(running: Running) -> list[psutil.Process]:
    """Ray's node processes below a command."""
    found = []
    for process in psutil.Process(running.process.pid).children(recursive=True):
        try:
            if process.name() == "raylet":
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_that_does_not_start_in_time_is_one_line_and_exit_2(make_recipe, tmp_path):
    recipe, store = make_recipe(), tmp_path / "store"
    running = Running("train", recipe, "--workers", 2, "--store", store, log=tmp_path / "log")
    try:
        wait_until(lambda: bool(raylets(running)), timeout_s=600, running=running, every_s=0.01)
        for raylet in raylets(running):
            raylet.suspend()      # as a machine with ten times as much to do as cores does

        code = running.wait(300)
    finally:
        running.kill_everything()

    assert code == 2, running.output()
    assert "Ray's processes did not start on this machine within 30 s" in running.output()
    assert "Traceback" not in running.output()
