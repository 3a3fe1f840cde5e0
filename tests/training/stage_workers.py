"""A stage's workers as processes of their own, without Ray: gloo between them, our training loop in each.

    python -m tests.training.stage_workers JOB RANK WORLD_SIZE MEETING-FILE
"""

import pickle
import sys
import time
from pathlib import Path

import torch.distributed

from tests.end_to_end.command import environment
from tests.end_to_end.preloaded import Forked, preloaded
from training.checkpoint import iterations_on_disk
from training.stage_job import StageJob
from training.store import Store
from training.worker import train_stage

ROOT = Path(__file__).resolve().parents[2]


def start_workers(job: StageJob, count: int, folder: Path) -> list[Forked]:
    """Starts `count` workers of the job; folder: new, for what they need to find each other."""
    folder.mkdir()
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    words, ours = [str(folder / "job.pickle")], environment()
    assert preloaded().fits(ours)
    return [
        preloaded().start(
            "tests.training.stage_workers", [*words, str(rank), str(count), str(folder / "meeting")],
            cwd=ROOT, environment=ours, out=sys.__stdout__, err=sys.__stderr__,
        )
        for rank in range(count)
    ]  # fmt: skip


def run_workers(job: StageJob, count: int, folder: Path) -> None:
    """Trains the job to its end with `count` workers."""
    workers = start_workers(job, count, folder)
    assert [worker.wait(timeout=300) for worker in workers] == [0] * count


def kill_at(job: StageJob, iteration: int, workers: list[Forked]) -> None:
    """SIGKILL for all workers once the job has a checkpoint of at least so many iterations."""
    folder, deadline = Store(job.store).stage(job.key), time.monotonic() + 600
    try:
        while max(iterations_on_disk(folder), default=0) < iteration:
            assert time.monotonic() < deadline and not any(worker.poll() for worker in workers)
            time.sleep(0.01)
    finally:
        kill_workers(workers)


def kill_workers(workers: list[Forked]) -> None:
    """SIGKILL for all of them."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.wait()


def main(job: str, rank: str, count: str, meeting: str) -> None:
    """One worker, from the process group to the stage's end."""
    if int(count) > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(count)
        )
    problem = train_stage({"job": pickle.loads(Path(job).read_bytes())})
    assert problem is None, problem


if __name__ == "__main__":
    main(*sys.argv[1:])
