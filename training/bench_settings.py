"""`vggrow bench train --settings`: bare training under each choice that may make it faster, one changed at a time.

Figure (ii) of training/bench.py, of the stage as its recipe has it and of each choice, in turns in one run; a choice is
told as a ratio to the recipe's own speed of the same turn, since a machine's speed drifts from turn to turn.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pipelines.manifest import Manifest
from training.bench import bare_loop, rate
from training.bench_subject import Subject, subject
from training.features.forward import has_bf16
from training.learner import set_up_torch
from training.memory import keep_memory
from training.optimise import Way
from training.stage_job import StageJob
from vggcore.schedule import Stage


@dataclass(frozen=True)
class Choice:
    """One way to train the same stage."""

    name: str                        # what is not as the recipe, or our code, has it
    stage: Stage
    way: Way = "fused"               # how the update is computed
    set_to_none: bool = True         # gradients are let go after the update; False: zeroed in place
    keep_memory: bool = True         # training/memory.py
    cudnn_benchmark: bool = False    # cuDNN tries its algorithms first (GPU)
    note: str = ""


@dataclass(frozen=True)
class ChoiceSpeed:
    """What a choice gave."""

    name: str
    images_per_second: float         # median over the turns
    of_default: tuple[float, ...]    # in each turn, of the recipe's own speed in that turn
    compile_seconds: float | None    # the first iteration less a later one; None: nothing is compiled
    graphs: int | None               # compiled for full and short batches together
    note: str

    @property
    def ratio(self) -> float:
        """The median over the turns."""
        return statistics.median(self.of_default)


@dataclass(frozen=True)
class SettingSpeeds(Subject):
    """All choices, the recipe's own first."""

    choices: tuple[ChoiceSpeed, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with each choice's median ratio."""
        choices = [asdict(choice) | {"ratio": choice.ratio} for choice in self.choices]
        return asdict(self) | {"choices": choices}


def choices_of(stage: Stage, device: str) -> list[Choice]:
    """The stage as it is, and each choice that this device has; precision "tf32" and cudnn.benchmark are a GPU's."""
    plain = stage.model_copy(update={"compile": False})
    optimiser = "AdamW" if stage.optimiser == "adamw" else "SGD"
    layout = "contiguous (NCHW)" if stage.channels_last else "channels_last"
    found = [
        Choice("as in the recipe", plain),
        Choice(layout, plain.model_copy(update={"channels_last": not stage.channels_last})),
        Choice("compile", stage.model_copy(update={"compile": True})),
        Choice(f"{optimiser} foreach", plain, way="foreach"),
        Choice(f"{optimiser} a loop over parameters", plain, way="loop"),
        Choice("gradients zeroed", plain, set_to_none=False),
        Choice("memory given back", plain, keep_memory=False),
        *(Choice(f"freeze = {groups}", plain.model_copy(update={"freeze": groups})) for groups in freezes(stage)),
    ]
    if device == "cuda":
        found.append(Choice("cudnn.benchmark", plain, cudnn_benchmark=True))
    for precision in ("fp32", "bf16", "tf32") if device == "cuda" else ("fp32", "bf16"):
        if precision != stage.precision:
            note = bf16_note(device) if precision == "bf16" else ""
            found.append(Choice(precision, plain.model_copy(update={"precision": precision}), note=note))
    return found


def freezes(stage: Stage) -> list[int]:
    """Numbers of frozen groups that are tried: three, and all that the net has."""
    last = max(stage.features.groups) if stage.features is not None else 5
    return sorted({min(3, last), last} - {stage.freeze})


def bf16_note(device: str) -> str:
    """What to know of bf16 here; empty where the device multiplies it itself."""
    if has_bf16(device):
        return ""
    return "this GPU emulates bf16" if device.startswith("cuda") else "this processor has no bf16 of its own"


def measure_settings(job: StageJob, manifest: Manifest, *, seconds: float, turns: int) -> SettingSpeeds:
    """Measures every choice for `seconds` in each of the `turns`; writes nothing.

    A compiled choice is compiled once and kept over the turns; the others are built again in each, so that memory holds
    two nets at most.
    """
    choices = choices_of(job.stage, job.device)
    speeds: dict[str, list[float]] = {choice.name: [] for choice in choices}
    compiled: Iterator[int] | None = None
    compile_seconds, graphs = 0.0, 0
    for _ in range(turns):
        for choice in choices:
            set_up_torch(replace(job, stage=choice.stage))
            keep_memory(choice.keep_memory)
            torch.backends.cudnn.benchmark = choice.cudnn_benchmark
            if choice.stage.compile:
                if compiled is None:
                    compiled = loop_of(job, choice, manifest)
                    compile_seconds, graphs = compile_cost(job, choice, manifest, compiled)
                speeds[choice.name].append(rate(compiled, seconds))
            else:
                speeds[choice.name].append(rate(loop_of(job, choice, manifest), seconds))
    keep_memory()
    set_up_torch(job)
    own = speeds[choices[0].name]
    return SettingSpeeds(
        **vars(subject(job.stage, threads=job.threads, device=job.device)),
        choices=tuple(
            ChoiceSpeed(
                name=choice.name,
                images_per_second=statistics.median(speeds[choice.name]),
                of_default=tuple(speed / base for speed, base in zip(speeds[choice.name], own, strict=True)),
                compile_seconds=compile_seconds if choice.stage.compile else None,
                graphs=graphs if choice.stage.compile else None,
                note=choice.note,
            )
            for choice in choices
        ),
    )


def loop_of(job: StageJob, choice: Choice, manifest: Manifest) -> Iterator[int]:
    """Bare training under a choice, an iteration a step; a compiled one also meets an epoch's last, short batch."""
    pictures = len(manifest.split("train"))
    size = min(job.stage.global_batch, pictures)
    short = pictures % size
    return bare_loop(
        replace(job, stage=choice.stage),
        classes=len(manifest.classes),
        batch=size,
        first=(size, short or size, size, short or size) if choice.stage.compile else (),
        way=choice.way,
        set_to_none=choice.set_to_none,
    )


def compile_cost(job: StageJob, choice: Choice, manifest: Manifest, steps: Iterator[int]) -> tuple[float, int]:
    """Seconds and graphs of the compilation, over the first two full and two short batches of a compiled loop."""
    from torch._dynamo.utils import counters

    before, began = counters["stats"]["unique_graphs"], time.monotonic()
    for _ in range(4):
        next(steps)
    took, began = time.monotonic() - began, time.monotonic()
    next(steps)
    return max(0.0, took - 4 * (time.monotonic() - began)), counters["stats"]["unique_graphs"] - before


def settings_text(found: SettingSpeeds) -> str:
    """For a person: a line a choice, with its ratio and the least and most of the turns."""
    lines = [
        f"{found.first_line()}; bare forward, backward, update",
    ]
    for choice in found.choices:
        low, high = min(choice.of_default), max(choice.of_default)
        line = f"{choice.name:<28}{choice.images_per_second:>10,.1f} images/s   {choice.ratio:.2f}  ({low:.2f} to {high:.2f})"
        if choice.compile_seconds is not None:
            line += f"  compiled in {choice.compile_seconds:.1f} s, {choice.graphs} graphs"
        lines.append(line + (f"  {choice.note}" if choice.note else ""))
    lines.append(found.last_line())
    return "\n".join(lines)
