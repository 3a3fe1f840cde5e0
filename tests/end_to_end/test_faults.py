"""Disks, files and workers that fail in the middle of a run: one line, nothing lost, and training goes on."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.command import Running, vggrow, wait_until
from tests.end_to_end.test_resume import iterations, journal, stage_folder, weights

pytestmark = pytest.mark.slow
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts filesystems: root alone may")


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A filesystem of so many MiB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def checkpoints(store: Path) -> int:
    return len(list((store / "stages").glob("*/checkpoints/iteration-*")))


def one_error(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    return line


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Whoever opens a file in the folder from now on may not write to it; what is open already stays writable."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def starts(store: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (stage_folder(store) / "starts.jsonl").read_text().splitlines()]


@needs_root
@pytest.mark.timeout(600)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_the_run_goes_on_once_there_is_room(make_recipe, tmp_path):
    recipe = make_recipe(epochs=400, every="20 iterations")
    with small_disk(tmp_path / "disk", 200) as disk:
        store = disk / "store"
        words = ("train", recipe, "--store", store, "--tracking", f"sqlite:///{tmp_path / 'mlflow.db'}", "--cache-gib", 0)
        running = Running(*words, log=tmp_path / "log")
        try:
            wait_until(lambda: checkpoints(store) >= 2, timeout_s=120, running=running)
            ballast = disk / "ballast"
            subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=64k"], capture_output=True)
            code = running.wait(120)
        finally:
            running.kill_everything()
        line = one_error(running.output())
        whole = vggrow("status", store, "--json")
        ballast.unlink()
        again = Running(*words, log=tmp_path / "again")
        try:
            wait_until(lambda: again.process.poll() is not None or "epoch" in again.output(), timeout_s=120)
            assert again.process.poll() is None, again.output()
        finally:
            again.kill_everything()

        assert code == 2 and "No space left" in line and "start the same command again" in line
        (stage,) = json.loads(whole.stdout)[0]["stages"]
        assert stage["state"] in ("failed", "stopped")
        assert "broken checkpoint" not in again.output()


@pytest.mark.timeout(600)
def test_a_bit_that_flips_on_disk_is_passed_over_and_said(make_recipe, tmp_path):
    recipe, store = make_recipe(epochs=400, every="20 iterations"), tmp_path / "store"
    running = Running("train", recipe, "--store", store, log=tmp_path / "log")
    try:
        wait_until(lambda: checkpoints(store) >= 2, timeout_s=120, running=running)
    finally:
        running.kill_everything()
    (folder,) = (store / "stages").glob("*/checkpoints")
    newest = max(folder.glob("iteration-*"), key=lambda path: int(path.name.partition("-")[2]))
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (newest / "optimizer.pt").write_bytes(bytes(content))
    again = Running("train", recipe, "--store", store, log=tmp_path / "again")
    try:
        wait_until(lambda: "broken checkpoint was passed over" in again.output(), timeout_s=120, running=again)
        wait_until(lambda: (folder / f"broken-{newest.name}").exists(), timeout_s=60, running=again)
    finally:
        again.kill_everything()

    said = [line for line in again.output().splitlines() if "broken checkpoint was passed over, the one before is used" in line]
    assert len(said) == 1 and f"{newest.name}/optimizer.pt" in said[0]


@needs_root
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_that_turns_read_only_ends_in_one_line_and_the_run_goes_on_once_it_is_writable(workers, make_recipe, tmp_path):
    recipe, store = make_recipe(epochs=20_000, every="20 iterations"), tmp_path / "store"
    words = ("train", recipe, "--workers", workers, "--threads", 1, "--store", store)
    running = Running(*words, log=tmp_path / "log")
    try:
        wait_until(lambda: checkpoints(store) >= 2, timeout_s=600, running=running)
        with read_only(store):
            code = running.wait(600)
    finally:
        running.kill_everything()
    line, stands = one_error(running.output()), newest(store)
    again = Running(*words, log=tmp_path / "again")
    try:
        wait_until(lambda: len(starts(store)) == 2, timeout_s=600, running=again)
        wait_until(lambda: iterations(store) > stands + 20, timeout_s=120, running=again)
    finally:
        again.kill_everything()

    assert code == 2 and "Read-only file system" in line and "start the same command again" in line
    assert starts(store)[1]["iteration"] == stands > 0
    walked = [iteration for epoch, iteration, *_ in journal(store) if epoch is None]
    assert walked == list(range(1, len(walked) + 1))


def newest(store: Path) -> int:
    """The iteration of the newest checkpoint."""
    return max(int(path.name.partition("-")[2]) for path in (stage_folder(store) / "checkpoints").glob("iteration-*"))


@pytest.mark.timeout(2400)
def test_a_worker_that_hangs_is_replaced_and_the_weights_are_the_same_bit_by_bit(make_recipe, tmp_path):
    recipe, undisturbed, store = make_recipe(epochs=12, every="5 iterations"), tmp_path / "undisturbed", tmp_path / "store"
    words = ("train", recipe, "--workers", 2, "--threads", 1, "--stall-limit", 20, "--store")
    done = vggrow(*words, undisturbed, timeout_s=900)
    running = Running(*words, store, log=tmp_path / "log")
    try:
        wait_until(lambda: iterations(store) >= 8, timeout_s=600, running=running)
        hung = running.workers()[1]
        hung.suspend()                                     # SIGSTOP: alive, and silent
        wait_until(lambda: len(starts(store)) == 2, timeout_s=300, running=running)
        wait_until(lambda: not hung.is_running(), timeout_s=60, running=running)

        code = running.wait(600)
    finally:
        running.kill_everything()

    assert done.returncode == 0, done.stderr
    assert code == 0, running.output()
    assert "its workers were started anew; training goes on from iteration" in running.output()
    assert "Traceback" not in running.output()
    assert weights(store) == weights(undisturbed)
    assert journal(store) == journal(undisturbed)
