"""The store's locks: one at a time, told who holds it, and orphans kept from writing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.store import (
    Store,
    fence_holds,
    hold,
    hold_when_free,
    lock_file_held,
    open_store,
    request_stop,
    stop_requested,
    store_to_read,
)
from vggcore.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(tmp_path / "store")


def test_the_second_is_told_who_holds_the_lock(store):
    held = rf"stage 'A-256' is held by process {os.getpid()} on .+ since 20"
    with (
        hold(store, "stage-x", what="stage 'A-256'"),
        pytest.raises(StoreError, match=held),
        hold(store, "stage-x", what="stage 'A-256'"),
    ):
        pass

    with hold(store, "stage-x", what="stage 'A-256'") as number:
        assert number == 2


def test_a_killed_holders_lock_is_free_and_its_number_holds_no_more(store):
    code = (
        "import os, sys, signal; from pathlib import Path; from training.store import Store, hold\n"
        "with hold(Store(Path(sys.argv[1])), 'stage-x', what='it') as number:\n"
        "    print(number, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, store.root], capture_output=True, text=True, cwd=ROOT)
    assert killed.stdout == "1\n" and killed.returncode == -9
    assert fence_holds(store, "stage-x", 1)

    with hold(store, "stage-x", what="it") as number:
        assert number == 2
        assert not fence_holds(store, "stage-x", 1)


def test_a_stop_is_for_one_taking_of_the_lock_only(store):
    with hold(store, "stage-x", what="it") as number:
        assert not stop_requested(store, "stage-x", number)
        request_stop(store, "stage-x", number)
        assert stop_requested(store, "stage-x", number)

    with hold(store, "stage-x", what="it") as number:
        assert not stop_requested(store, "stage-x", number)


@pytest.mark.parametrize(
    "take",
    [
        lambda store: hold(store, "x", what="it"),
        lambda store: hold_when_free(store.locks / "x.lock", "another has it", print),
        lambda store: lock_file_held(store.locks / "x.lock"),
    ],
    ids=["a stage's", "weights'", "another"],
)
def test_a_lock_file_that_cannot_be_made_is_one_line(store, take):
    (store.locks / "x.lock").mkdir()

    with pytest.raises(StoreError, match=r"x\.lock: cannot be written \(Is a directory\)") as refused, take(store):
        pass

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("use", [open_store, store_to_read])
def test_a_store_in_the_home_of_nobody_is_one_line(use):
    with pytest.raises(StoreError, match="--store ~nosuchuser/s: ~nosuchuser is no home on this machine"):
        use("~nosuchuser/s")


def test_a_url_is_no_store_and_says_why():
    with pytest.raises(StoreError, match="a URL cannot be a store yet: checkpoints appear by renaming a folder"):
        open_store("s3://bucket/store")


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match=r"--store .*file/store: cannot be written \(Not a directory\)"):
        open_store(tmp_path / "file" / "store")
