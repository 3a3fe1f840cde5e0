"""Checkpoints appear whole or not at all, and give back what was put in."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.checkpoint import (
    Progress,
    checkpoint_folder,
    iterations_on_disk,
    newest_checkpoint,
    read_checkpoint,
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


def test_a_broken_optimizer_file_says_what_to_do(tmp_path):
    write(tmp_path, 4)
    (checkpoint_folder(tmp_path, 4) / "optimizer.pt").write_bytes(b"PK\x03\x04 cut short")

    with pytest.raises(StoreError, match=r"optimizer.pt: cannot be read .* remove its folder"):
        newest_checkpoint(tmp_path).optimizer_state()


def test_an_absent_checkpoint_says_so(tmp_path):
    with pytest.raises(StoreError, match=r"iteration-8: no checkpoint there"):
        read_checkpoint(tmp_path, 8)


WRITER = """
import sys, torch
from pathlib import Path
from dataclasses import replace
from training.checkpoint import Progress, write_checkpoint
from training.optimise import Plateau
start = Progress.start(Plateau(1e-2, 3, 5), world_size=1, threads=1)
torch.set_num_threads(1)
for n in range(1, 100000):
    weights = {"a": torch.full((2**20,), float(n))}
    state = {"state": {0: {"momentum_buffer": torch.full((2**20,), float(n))}}, "param_groups": []}
    write_checkpoint(Path(sys.argv[1]), replace(start, iteration=n), weights=weights, optimizer_state=state)
    if n == 1: print("writing", flush=True)
"""


def test_a_writer_killed_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    moments = torch.rand(6, generator=torch.Generator().manual_seed(seed)) * 0.3
    for moment in moments.tolist():
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path.cwd())
        writer.stdout.readline()
        time.sleep(moment)
        writer.send_signal(signal.SIGKILL)
        writer.wait()

        found = newest_checkpoint(tmp_path)

        iteration = found.progress.iteration
        assert torch.equal(found.weights()["a"], torch.full((2**20,), float(iteration)))
        assert torch.equal(found.optimizer_state()["state"][0]["momentum_buffer"], torch.full((2**20,), float(iteration)))
