"""What the machines of a stage do while it trains, under the names of MLflow's system metrics.

    {"step": 12, "at": 1795545721123, "node": null, "metrics": {"cpu_utilization_percentage": 93.1, ...}}

One worker of each machine samples into STORE/stages/<key>/system-<machine>.jsonl, a line every 10 s; the conductor sends
the lines to MLflow (track.py). `step` counts from 0 over all starts of the stage, `at` is milliseconds since 1970, `node`
the machine's name where there may be several (MLflow's node id). The names and units are those of MLflow 3.17's
mlflow.system_metrics, whose own classes would cost each worker MLflow's import (5 s) before its first iteration.
"""

import json
import logging
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray.train

from training.history import parse_rows
from training.history_tail import HistoryTail, last_bytes
from training.stage_job import StageJob, Superseded
from training.team import Team
from vggcore.errors import TrackingError

logger = logging.getLogger(__name__)

EVERY_S = 10.0             # MLflow's own default
Sample = tuple[str, float, int, int]     # MLflow's name, value, milliseconds since 1970, step


def sampling_interval_s() -> float:
    """Seconds between samples, by MLflow's own variables of the environment; 0: none are wanted. Raises TrackingError."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
        return 0.0
    name = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
    wanted = os.environ.get(name) or f"{EVERY_S}"
    if not re.fullmatch(r"\d*\.?\d+|\d+\.", wanted) or float(wanted) <= 0:
        raise TrackingError(f"{name}={wanted}: not a number of seconds above 0; leave it out for {EVERY_S:.0f} s")
    return float(wanted)


@dataclass(frozen=True)
class Machine:
    """A machine of the stage; node: its name in MLflow, None where there is only one."""

    name: str
    node: str | None


def machine_to_sample(job: StageJob, team: Team) -> Machine | None:
    """The machine that this worker samples, None for all but one worker of each; all workers call it together.

    Machines with the same host name are told apart by Ray Train's number of the node.
    """
    context = ray.train.get_context()
    own = (socket.gethostname(), context.get_node_rank())
    hosts = Counter(host for host, _ in set(team.everyones(own)))
    if context.get_local_rank() != 0:
        return None
    host = re.sub(r"[^\w.-]", "_", own[0])
    name = host if hosts[own[0]] == 1 else f"{host}-{own[1]}"
    several = job.preemptible or hosts.total() > 1      # on a cluster others may come
    return Machine(name, name if several else None)


class Sampler(threading.Thread):
    """Samples one machine until it is closed; nothing that goes wrong here ends a stage."""

    def __init__(
        self, stage_folder: Path, machine: Machine, *, every_s: float, gpus: bool, may_write: Callable[[], None]
    ) -> None:
        """may_write: raises Superseded when this process has lost the right to write."""
        super().__init__(name="system-metrics", daemon=True)
        self.folder, self.machine, self.every_s, self.gpus = stage_folder, machine, every_s, gpus
        self.path = stage_folder / f"system-{machine.name}.jsonl"
        self.may_write, self.over = may_write, threading.Event()

    def run(self) -> None:
        """A sample every `every_s`, and one of the rest when it is closed."""
        try:
            read = MachineReader(gpus=self.gpus)
            step, whole, at = next_step(self.folder), last_bytes(self.path)[-1:] in (b"\n", b""), time.monotonic()
            first, closed = step, False
            while not closed:
                closed = self.over.wait(self.every_s)
                if closed and step > first and time.monotonic() - at < min(1.0, self.every_s):
                    return                          # too short for a share of time
                at = time.monotonic()
                row = {"step": step, "at": time.time_ns() // 10**6, "node": self.machine.node, "metrics": read.metrics()}
                self.may_write()
                try:
                    with self.path.open("a", encoding="utf-8") as file:
                        file.write(("" if whole else "\n") + json.dumps(row) + "\n")
                    step, whole = step + 1, True
                except OSError:                     # the stage itself will say what its disk has come to
                    whole = False
        except Superseded:
            return
        except Exception:
            logger.warning("no more system metrics of %s in this start", self.machine.name, exc_info=True)

    def close(self) -> None:
        """Ends it, with a last sample."""
        self.over.set()
        self.join(timeout=self.every_s)


class MachineReader:
    """Reads this machine's figures; shares of time are since the last reading, sums of bytes since the first."""

    def __init__(self, *, gpus: bool) -> None:
        """gpus: NVIDIA's too, where its driver is there."""
        psutil.cpu_percent()                        # from now on, in this thread
        self.network = psutil.net_io_counters()
        self.pynvml: Any = None
        if gpus:
            try:
                import pynvml

                pynvml.nvmlInit()
                self.pynvml = pynvml
            except Exception as error:              # no driver, or one that does not fit
                logger.warning("no figures of this machine's GPUs: %s", error)

    def metrics(self) -> dict[str, float]:
        """MLflow's names without their prefix, in the units that they name."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (network.bytes_recv - self.network.bytes_recv) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - self.network.bytes_sent) / 1e6,
        }
        for number in range(self.pynvml.nvmlDeviceGetCount() if self.pynvml else 0):
            found |= {f"gpu_{number}_{name}": value for name, value in self.gpu(number).items()}
        return {name: round(value, 1) if "network" not in name else round(value, 3) for name, value in found.items()}

    def gpu(self, number: int) -> dict[str, float]:
        """One GPU's figures; those that this model does not give are left out."""
        nvml, handle = self.pynvml, self.pynvml.nvmlDeviceGetHandleByIndex(number)
        found = {}
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            found["memory_usage_percentage"] = memory.used / memory.total * 100
            found["memory_usage_megabytes"] = memory.used / 1e6
            found["utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            power, limit = nvml.nvmlDeviceGetPowerUsage(handle), nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
            found["power_usage_watts"], found["power_usage_percentage"] = power / 1000, power / limit * 100
        except nvml.NVMLError_NotSupported:
            return found
        return found


def journals(stage_folder: Path) -> list[Path]:
    """The journals of a stage's machines."""
    return sorted(stage_folder.glob("system-*.jsonl"))


def next_step(stage_folder: Path) -> int:
    """One more than the last step in any journal: no name of MLflow's gets a step twice, whichever machine goes on."""
    last = -1
    for path in journals(stage_folder):
        rows = parse_rows(last_bytes(path).decode(errors="replace").splitlines())
        last = max([last, *(row["step"] for row in rows)])
    return last + 1


class SystemTail:
    """Reads the journals of a stage's machines while they grow."""

    def __init__(self, stage_folder: Path) -> None:
        """Nothing is read yet."""
        self.folder = stage_folder
        self.tails: dict[Path, HistoryTail] = {}

    def new_samples(self) -> list[Sample]:
        """What came since the last call, in the order of steps, under MLflow's names."""
        rows = []
        for path in journals(self.folder):
            rows += self.tails.setdefault(path, HistoryTail(path)).new_rows()
        rows.sort(key=lambda row: row["step"])
        return [
            (f"system/{row['node'] + '/' if row['node'] else ''}{name}", value, row["at"], row["step"])
            for row in rows
            for name, value in row["metrics"].items()
        ]
