"""Checkpoints appear whole or not at all, and give back what was put in."""

import itertools
import multiprocessing
import os
import subprocess
import threading
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch

from training.checkpoint import (
    CheckpointWriter,
    Progress,
    checkpoint_folder,
    iterations_on_disk,
    newest_checkpoint,
    read_checkpoint,
    set_aside,
    write_checkpoint,
)
from training.optimise import Plateau
from vggcore.errors import StoreError

START = Progress.start(Plateau(learning_rate=1e-2, drops_left=3, patience=5), world_size=2, threads=1)


def write(folder: Path, iteration: int, **changes) -> Progress:
    progress = replace(START, iteration=iteration, **changes)
    weights = {"a": torch.full((2, 3), float(iteration)).t()}   # not contiguous, as channels_last weights are
    state = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.01, "params": [0]}]}
    write_checkpoint(folder, progress, weights=weights, optimizer_state=state)
    return progress


def test_what_was_written_is_read_back(tmp_path):
    wanted = write(tmp_path, 7, epoch=1, batch=3, loss_sum=0.1 + 0.2, seconds=1.5, val_top1=0.75)

    found = newest_checkpoint(tmp_path)

    assert found is not None and found.progress == wanted
    assert torch.equal(found.weights()["a"], torch.full((3, 2), 7.0))
    assert torch.equal(found.optimizer_state()["state"][0]["momentum_buffer"], torch.ones(2))


def test_the_newest_two_are_kept_and_the_highest_iteration_is_the_newest(tmp_path):
    for iteration in (9, 10, 100):
        write(tmp_path, iteration)

    assert iterations_on_disk(tmp_path) == [10, 100]
    assert newest_checkpoint(tmp_path).progress.iteration == 100


def test_one_of_the_same_iteration_is_replaced(tmp_path):
    write(tmp_path, 5, batch=5)
    write(tmp_path, 5, epoch=1, batch=0)

    assert newest_checkpoint(tmp_path).progress.epoch == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["iteration-5"]


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes_with_the_next(tmp_path):
    leftover = checkpoint_folder(tmp_path, 3).with_name(".iteration-3.1.part")
    leftover.mkdir(parents=True)

    assert newest_checkpoint(tmp_path) is None
    write(tmp_path, 4)
    assert not leftover.exists()


def test_the_best_epochs_checkpoint_stays_beside_the_newest_two(tmp_path):
    for iteration in (4, 8, 12, 16):
        write(tmp_path, iteration, best_iteration=4 if iteration < 16 else 16)
        if iteration == 12:
            assert iterations_on_disk(tmp_path) == [4, 8, 12]

    assert iterations_on_disk(tmp_path) == [12, 16]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "progress.json"])
@pytest.mark.parametrize("how", ["cut short", "a bit flipped", "gone"])
def test_a_broken_checkpoint_is_passed_over_said_and_set_aside(tmp_path, name, how, caplog):
    write(tmp_path, 4)
    write(tmp_path, 8)
    path = checkpoint_folder(tmp_path, 8) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 if name != "progress.json" else 0x80        # no UTF-8 any more
    path.unlink()
    if how != "gone":
        path.write_bytes(bytes(content) if how == "a bit flipped" else bytes(content[: len(content) // 2]))
    said: list[str] = []

    found = newest_checkpoint(tmp_path, said)
    set_aside(tmp_path, above=found.progress.iteration)

    assert found.progress.iteration == 4
    assert len(said) == 1 and "iteration-8" in said[0] and said[0] in caplog.text
    assert iterations_on_disk(tmp_path) == [4]
    write(tmp_path, 8)
    assert newest_checkpoint(tmp_path).progress.iteration == 8


def test_when_no_checkpoint_is_whole_the_stage_is_not_started_over_in_silence(tmp_path):
    write(tmp_path, 4)
    (checkpoint_folder(tmp_path, 4) / "optimizer.pt").write_bytes(b"PK\x03\x04 cut short")

    with pytest.raises(StoreError, match=r"optimizer.pt: is not what was written .* bring one back .* or remove"):
        newest_checkpoint(tmp_path)


def test_training_waits_for_a_copy_and_not_for_the_disk(tmp_path):
    weights = {"a": torch.zeros(2**20)}
    state = {"state": {0: {"momentum_buffer": torch.zeros(2**20)}}, "param_groups": []}
    let_go = threading.Event()
    writer = CheckpointWriter(tmp_path, may_write=lambda: let_go.wait() and None)

    writer.write(replace(START, iteration=1), weights=weights, optimizer_state=state)
    weights["a"] += 1                                  # training goes on
    state["state"][0]["momentum_buffer"] += 1
    before = iterations_on_disk(tmp_path)
    let_go.set()
    writer.wait()

    assert before == [] and iterations_on_disk(tmp_path) == [1]
    found = newest_checkpoint(tmp_path)
    assert not found.weights()["a"].any() and not found.optimizer_state()["state"][0]["momentum_buffer"].any()


def test_a_writer_that_has_lost_the_stage_writes_nothing_and_says_so_at_the_next(tmp_path):
    class Lost(Exception):
        pass

    def may_write():
        raise Lost

    writer = CheckpointWriter(tmp_path, may_write)
    writer.write(replace(START, iteration=1), weights={"a": torch.ones(1)}, optimizer_state={})

    with pytest.raises(Lost):
        writer.wait()
    assert iterations_on_disk(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small filesystem: root alone may")
def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_stands(tmp_path):
    disk = tmp_path / ("disk" * 40)       # a long path leaves room for the reason
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=True)
    try:
        weights = {"a": torch.ones(2**18)}             # 1 MiB; with its momentum 2 MiB a checkpoint
        state = {"state": {0: {"momentum_buffer": torch.ones(2**18)}}, "param_groups": []}
        write_checkpoint(disk, replace(START, iteration=1), weights=weights, optimizer_state=state)

        full = r"iteration-2: a checkpoint cannot be written .*, that of iteration 1 stands"
        with pytest.raises(StoreError, match=full):
            write_checkpoint(disk, replace(START, iteration=2), weights=weights, optimizer_state=state)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'ballast'}", "bs=4k"], capture_output=True)
        with pytest.raises(StoreError, match=full) as weights_do_not_fit:
            write_checkpoint(disk, replace(START, iteration=2), weights=weights, optimizer_state=state)

        assert "No space left" in str(weights_do_not_fit.value)
        assert newest_checkpoint(disk).progress.iteration == 1
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["iteration-1"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_absent_checkpoint_says_so(tmp_path):
    with pytest.raises(StoreError, match=r"iteration-8: no checkpoint there"):
        read_checkpoint(tmp_path, 8)


def write_for_ever(folder: Path, begun: Event) -> None:
    """Checkpoints of iterations 1, 2, ..., each full of its own number, until somebody ends this process."""
    torch.set_num_threads(1)
    for n in itertools.count(1):
        weights = {"a": torch.full((2**20,), float(n))}
        state = {"state": {0: {"momentum_buffer": torch.full((2**20,), float(n))}}, "param_groups": []}
        write_checkpoint(folder, replace(START, iteration=n), weights=weights, optimizer_state=state)
        begun.set()


def test_a_writer_killed_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    moments = torch.rand(6, generator=torch.Generator().manual_seed(seed)) * 0.3
    context = multiprocessing.get_context("forkserver")      # loads torch once for all writers
    context.set_forkserver_preload([__name__])
    for number, moment in enumerate(moments.tolist()):
        begun, folder = context.Event(), tmp_path / f"stage-{number}"
        writer = context.Process(target=write_for_ever, args=(folder, begun))
        writer.start()
        assert begun.wait(60)
        time.sleep(moment)
        writer.kill()
        writer.join()

        found = newest_checkpoint(folder)

        iteration = found.progress.iteration
        assert torch.equal(found.weights()["a"], torch.full((2**20,), float(iteration)))
        assert torch.equal(found.optimizer_state()["state"][0]["momentum_buffer"], torch.full((2**20,), float(iteration)))
