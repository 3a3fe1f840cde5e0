"""Where a schedule runs and with how much: workers, threads, device, cluster; nothing here changes what is trained."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.store import Store
from training.worker_count import WorkerCount, most, workers_text
from vggcore.errors import DeviceError, RecipeError
from vggcore.schedule import Stage


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def threads_for(workers: WorkerCount) -> int:
    """CPU threads a worker where none are named: this machine's cores, shared by the most workers."""
    return max(1, cores() // most(workers))


@dataclass(frozen=True)
class Where:
    """Where a schedule runs and with how much; nothing here changes what is trained."""

    store: Store
    workers: WorkerCount = 1
    threads: int = 1
    address: str | None = None
    device: str = "cpu"
    cache_gib: float = 2.0       # what decoded pictures may take in the store; 0: none are kept
    stall_s: float = 600.0       # how long a worker may be silent before the stage's workers are started anew
    log_pictures: bool = False   # keep which pictures each worker trained in each iteration

    @property
    def device_here(self) -> str:
        """The device for work in the conductor itself: a cluster's head may have no GPU though its workers do."""
        return "cuda" if self.device == "cuda" and torch.cuda.is_available() else "cpu"

    @property
    def in_this_process(self) -> bool:
        """One worker on this machine needs no Ray cluster: Ray Train's local mode runs it right here."""
        return self.workers == 1 and self.address is None and "RAY_ADDRESS" not in os.environ

    @property
    def on_a_cluster(self) -> bool:
        """Whether workers run where nodes come and go, and not in processes of this machine."""
        return (self.address or os.environ.get("RAY_ADDRESS", "local")) != "local"


def default_device() -> str:
    """cuda where torch finds a GPU here, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_where(where: Where, stages: Sequence[Stage]) -> None:
    """RecipeError or DeviceError for what cannot work, before anything starts."""
    batch = min((stage.global_batch for stage in stages if stage.fit == "sgd"), default=None)
    workers = workers_text(where.workers)
    if batch is not None and most(where.workers) > batch:
        raise RecipeError(
            f"--workers {workers} is more than global_batch {batch}: a worker would have no picture; use at most"
            f" {batch} workers, or a larger batch"
        )
    if isinstance(where.workers, tuple) and not where.on_a_cluster:
        raise RecipeError(
            f"--workers {workers}: on one machine there is always room for the same number of workers; name that number, or"
            " a cluster by --address"
        )
    if where.device == "cuda" and where.in_this_process and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch finds no GPU on this machine; use --device cpu, or see `vggrow doctor`")
    if where.device == "cpu" and any(stage.precision == "tf32" for stage in stages):
        raise DeviceError('[train] precision: "tf32" needs a GPU; use "fp32", or --device cuda')
