"""Parts of features as Ray tasks, as many at once as there are workers."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray

from training.features.compute import LOOK_S, Check, Part, compute_part
from vggcore.errors import TrainingError, VggrowError

RETRIES = 3      # how often a part is computed again after the death of its worker


def compute_on_ray(parts: Sequence[Part], tasks: int, advance: Callable[[int], None], check: Check) -> None:
    """Computes all parts, `tasks` at once; Ray runs already. An error, or one that `check` raises, ends those that run.

    Raises VggrowError that a worker raised, TrainingError where a part's workers keep dying.
    """
    workers = parts[0].workers
    gpus = 1 if workers.device == "cuda" else 0
    remote = ray.remote(num_cpus=workers.threads, num_gpus=gpus, max_retries=RETRIES)(compute_part)
    waiting, running = deque(parts), set[Any]()
    try:
        while waiting or running:
            while waiting and len(running) < tasks:
                running.add(remote.remote(waiting.popleft()))
            ready, _ = ray.wait(list(running), timeout=LOOK_S)
            for one in ready:
                running.remove(one)
                advance(result(one))
            check()
    finally:
        for one in running:
            ray.cancel(one, force=True)


def result(task: Any) -> int:
    """The rows that a task has computed, or what it came to."""
    try:
        return int(ray.get(task))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VggrowError):
            raise error.cause from None
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        raise TrainingError(
            f"features: a worker died more than {RETRIES} times over one part ({type(error).__name__}; memory?); start the"
            " same command again: what was computed is kept"
        ) from error
