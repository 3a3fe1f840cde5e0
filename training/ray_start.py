"""Ray as we start it: on this machine unless an address is named, quiet, with its token readable by the owner alone."""

import logging
import os
import secrets
from pathlib import Path

import ray

from training.ray_address import check_address
from training.store import Store
from vggcore.errors import ClusterError

OBJECT_STORE_BYTES = 256 * 2**20     # our batches never travel through Ray's object store

# Measured together on 2 cores: a short run of 2 workers 36 s -> 22.5 s, a killed worker trains again after 7 s, not 16.
QUIET_AND_QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",     # idle processes, one a core, which no stage uses
    "RAY_worker_niceness": "0",      # Ray's 15 starves training beside any other work (350 -> 15 images/s, measured)
}


# With a range of workers: how long to wait for those of a node that has just died before going on with the others.
ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}


# On a cluster: how soon a node that will be taken away is seen, by Ray Train's own watcher.
ON_A_CLUSTER = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}


def start_ray(store: Store, *, address: str | None, cpus: int, stall_s: float, elastic: bool = False) -> None:
    """Connects to the cluster at `address` (or RAY_ADDRESS), or starts Ray here with `cpus` logical CPUs; idempotent.

    stall_s: how long a worker may be silent; elastic: the number of workers may change while a stage runs. Raises
    ClusterError when the address does not answer, or Ray does not start here.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    here = address == "local"
    wanted = QUIET_AND_QUICK | ({} if here else ON_A_CLUSTER) | (ELASTIC if elastic else {})
    wanted["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = f"{stall_s:g}"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    if here:
        keep_token(store.root / "ray_auth_token")
        start_here(cpus)
        return
    check_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"--address {address}: Ray does not let us in: {first_line(error)}") from error


def start_here(cpus: int) -> None:
    """Starts Ray on this machine. Raises ClusterError where its processes are not up within Ray's own 30 s."""
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,        # its processes would take cores from training; a cluster has one
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:      # a bare Exception; its 30 s are fixed in Ray 2.60
        if "timed out during startup" not in str(error):
            raise
        raise ClusterError(
            "Ray's processes did not start on this machine within 30 s: it has too much else to do, or too little memory;"
            " start the same command again when it is quieter, with fewer --workers, or with --workers 1, which needs no Ray"
        ) from error


def keep_token(path: Path) -> None:
    """Makes a token for the local cluster, readable by its owner alone, unless the environment names one."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    if not path.exists():
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        part.rename(path)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
