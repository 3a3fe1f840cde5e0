"""What of this machine decides a recipe: cores, memory, a GPU, and whether bfloat16 is in its hardware."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from deploy.doctor import GIB, bf16, cpu_facts, cpu_quota, memory_bytes, nvidia_driver, read_or_empty


@dataclass(frozen=True)
class Machine:
    """This machine, or one that is thought up for a test."""

    cores: int                      # that this process may use, a container's limit included
    memory_gib: float               # in all, within a container's limit; 0: not known
    bf16: bool                      # in the hardware that trains: the GPU where there is one, else the processor
    gpu: str | None = None          # its name
    gpu_gib: float = 0.0            # the first GPU's memory

    def __str__(self) -> str:
        memory = f", {self.memory_gib:.0f} GiB" if self.memory_gib else ""
        gpu = f"GPU {self.gpu} with {self.gpu_gib:.0f} GiB" if self.gpu else "no GPU"
        return f"{self.cores} cores{memory}, {gpu}, bfloat16 {'in hardware' if self.bf16 else 'not in hardware'}"


def this_machine() -> Machine:
    """The machine this runs on; torch is loaded only where an NVIDIA driver is."""
    usable = len(os.sched_getaffinity(0))
    quota = cpu_quota(read_or_empty(Path("/sys/fs/cgroup/cpu.max")))
    cores = max(1, min(usable, math.floor(quota or usable)))
    known = memory_bytes()
    memory = round(known[1] / GIB, 1) if known else 0.0
    if nvidia_driver():
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0)
            in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
            return Machine(cores, memory, in_hardware, gpu.name, round(gpu.total_memory / GIB, 1))
    return Machine(cores, memory, bf16(cpu_facts(read_or_empty(Path("/proc/cpuinfo")))["flags"]).status == "ok")
