"""What every bench says beside its figures: which stage was measured, with how much, on which machine."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vggcore.schedule import Stage

LIBRARIES = ("torch", "nvidia-dali-cuda130", "ray", "torchvision", "numpy")


@dataclass(frozen=True)
class Subject:
    """A stage as it was measured; benches' results begin with it."""

    stage: str
    net: str
    crop: int
    batch: int
    precision: str
    threads: int
    device: str                      # a GPU's name, or "cpu"
    machine: str
    versions: dict[str, str]

    def first_line(self) -> str:
        """The stage and with how much, for a person."""
        return (
            f"stage {self.stage}: net {self.net}, crop {self.crop}, batch {self.batch}, {self.precision},"
            f" {self.threads} threads on {self.device}"
        )

    def last_line(self) -> str:
        """The machine and its libraries, for a person."""
        return f"{self.machine}; " + ", ".join(f"{name} {number}" for name, number in self.versions.items())


def subject(stage: Stage, *, threads: int, device: str) -> Subject:
    """The stage on this machine; device: "cpu" or "cuda"."""
    return Subject(
        stage=stage.name,
        net=stage.net,
        crop=stage.crop,
        batch=stage.global_batch,
        precision=stage.precision,
        threads=threads,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        machine=machine(),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Of the libraries that make the figures, as far as they are here."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor_lines(name: str) -> list[str]:
    """What /proc/cpuinfo says under a name, core by core; empty where there is no such file."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(name)]


def machine() -> str:
    """Processor, cores, Python."""
    names = processor_lines("model name")
    cores = len(os.sched_getaffinity(0))
    return f"{names[0] if names else platform.processor()}, {cores} cores, Python {platform.python_version()}"
