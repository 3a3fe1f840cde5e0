"""`vggrow bench train --layers`: where the time of bare training goes, layer by layer, beside the matrix multiplication.

Each layer is run alone on an input of its own shape and memory format, forward and backward; the least time of several
counts. What a layer costs in the whole net may differ a little: there its input was used a moment ago.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipelines.manifest import Manifest
from training.bench import bare_loop, made_net, matmul_limit, wait_for
from training.bench_subject import Subject, subject
from training.freezing import BACKWARD, frozen_layers
from training.learner import set_up_torch
from training.stage_job import StageJob
from vggcore.nets import LayerRow, PlacePool, Vgg, layer_table

LEAST_COUNTS = 3          # runs of a layer
Gradients = Literal["none", "weights", "both"]      # of a frozen layer, of the first that is trained, of all others


@dataclass(frozen=True)
class LayerTime:
    """A layer, or another part of an iteration (kind "iteration"): seconds a batch."""

    name: str
    kind: str
    output: tuple[int, ...]        # of one picture; () for the parts of an iteration
    forward: float
    backward: float
    of_limit: float | None         # its multiplications a second, of the machine's; None where there are none

    @property
    def seconds(self) -> float:
        """Both ways."""
        return self.forward + self.backward


@dataclass(frozen=True)
class LayerTimes(Subject):
    """All layers and what comes after them, in order; `iteration` and `limit` as training/bench.py measures them."""

    limit: float                   # multiplications and additions a second
    iteration: float               # seconds of a whole iteration, the least
    layers: tuple[LayerTime, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def by_kind(self) -> dict[str, float]:
        """Seconds of all convs, FC layers, ReLUs, poolings, and the rest, the longest first."""
        names = {"conv": "convolutions", "FC": "FC layers", "relu": "ReLU", "maxpool": "max pooling", "dropout": "dropout"}
        sums: dict[str, float] = {}
        for layer in self.layers:
            found = next((name for start, name in names.items() if layer.kind.startswith(start)), layer.name)
            sums[found] = sums.get(found, 0.0) + layer.seconds
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def measure_layers(job: StageJob, manifest: Manifest, *, seconds: float) -> LayerTimes:
    """Measures every layer for `seconds` over all, at least three times each; writes nothing."""
    stage, classes = job.stage, len(manifest.classes)
    set_up_torch(job)
    batch = min(stage.global_batch, len(manifest.split("train")))
    limit = max(matmul_limit(stage, job.device, seconds / 10) for _ in range(3))
    iteration = whole_iteration(job, classes, batch, seconds / 10)
    net, optimizer = made_net(job, classes)
    net.set_draws(stage.seed, 0, torch.arange(batch, device=job.device))
    rows = layer_table(stage.net, classes=classes, **stage.net_settings)
    frozen = frozen_layers(stage, rows)
    images = torch.randn(batch, 3, stage.crop, stage.crop, device=job.device)
    layout = torch.channels_last if stage.channels_last else torch.contiguous_format
    copy = least(lambda: lambda: images.contiguous(memory_format=layout), seconds / len(rows), job.device)
    found = [part("memory format", copy)]
    with torch.autocast(job.device, torch.bfloat16, enabled=stage.precision == "bf16"):
        pooled: list[Tensor] = []
        units = images.contiguous(memory_format=layout)
        for place, row in enumerate(rows):
            if row.name == first_of_head(net):
                units = torch.cat(pooled, 1) if pooled else units.flatten(1)
            module = net.get_submodule(row.name)
            gradients: Gradients = "none" if place < frozen else "weights" if place == frozen else "both"
            time_of_layer, made = layer_time(row, module, units, gradients, limit, seconds / len(rows), job.device)
            found.append(time_of_layer)
            if isinstance(module, PlacePool):       # of a linear head: what it pools goes to the last layer, not to the next
                pooled.append(made)
            else:
                units = made
    logits, labels = units.float().requires_grad_(), torch.zeros(batch, dtype=torch.int64, device=job.device)
    loss = least(
        lambda: lambda: torch.autograd.grad(cross_entropy(logits, labels), logits), seconds / len(rows), job.device
    )
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found += [part("loss", loss), part("update", least(lambda: optimizer.step, seconds / len(rows), job.device))]
    return LayerTimes(
        **vars(subject(stage, threads=job.threads, device=job.device)) | {"batch": batch},
        limit=limit,
        iteration=iteration,
        layers=tuple(found),
    )


def whole_iteration(job: StageJob, classes: int, batch: int, seconds: float) -> float:
    """The least seconds of forward, backward and update together."""
    loop = bare_loop(job, classes=classes, batch=batch)
    return least(lambda: lambda: next(loop), seconds, job.device)


def part(name: str, seconds: float) -> LayerTime:
    """A part of an iteration that is no layer."""
    return LayerTime(name=name, kind="iteration", output=(), forward=seconds, backward=0.0, of_limit=None)


def first_of_head(net: Vgg) -> str:
    """The first module that takes flat units."""
    return next(f"classifier.{name}" for name, _ in net.classifier.named_children())


def layer_time(
    row: LayerRow, module: nn.Module, units: Tensor, gradients: Gradients, limit: float, seconds: float, device: str
) -> tuple[LayerTime, Tensor]:
    """A layer's times on `units`, and what it makes of them; `gradients`: what its backward pass computes in training."""
    source = units.detach().requires_grad_(gradients == "both")
    wanted = [*([source] if gradients == "both" else []), *module.parameters()]

    def forward() -> Callable[[], Tensor]:
        taken = source.clone()      # a ReLU works in place; what autograd says of a clone costs nothing
        return lambda: module(taken)

    output = forward()()
    gradient = torch.ones_like(output)

    def backward() -> Callable[[], object]:
        made = forward()()
        return lambda: torch.autograd.grad(made, wanted, gradient)

    trained = gradients != "none"
    times = least(forward, seconds / 2, device), least(backward, seconds / 2, device) if trained else 0.0
    operations = 2.0 * row.macs * gradient.shape[0] * (1 + {"none": 0, "weights": BACKWARD - 1, "both": BACKWARD}[gradients])
    return LayerTime(
        name=row.name,
        kind=row.kind,
        output=row.output,
        forward=times[0],
        backward=times[1],
        of_limit=operations / sum(times) / limit if row.macs else None,
    ), output.detach()


def least(make: Callable[[], Callable[[], object]], seconds: float, device: str) -> float:
    """The least seconds that what `make` gives takes to be called, over `seconds` and three counts; one is not counted."""
    make()()
    counts: list[float] = []
    ends = time.monotonic() + seconds
    while len(counts) < LEAST_COUNTS or time.monotonic() < ends:
        run = make()
        wait_for(device)
        began = time.perf_counter()
        run()
        wait_for(device)
        counts.append(time.perf_counter() - began)
    return min(counts)


def layers_text(found: LayerTimes) -> str:
    """For a person: a line a layer, the sums by kind, and the sum beside a whole iteration."""
    total = sum(layer.seconds for layer in found.layers)
    lines = [
        f"{found.first_line()}; matrix multiplication {found.limit / 1e9:,.1f} GFLOP/s",
        f"{'layer':<16}{'kind':<12}{'output':<16}{'forward ms':>11}{'backward ms':>12}{'share':>8}{'of (i)':>8}",
    ]
    for layer in found.layers:
        output = "x".join(map(str, layer.output))
        share = f"{layer.seconds / total:.1%}"
        limit = "" if layer.of_limit is None else f"{layer.of_limit:.2f}"
        lines.append(
            f"{layer.name:<16}{layer.kind:<12}{output:<16}{layer.forward * 1e3:>11,.3f}{layer.backward * 1e3:>12,.3f}"
            f"{share:>8}{limit:>8}"
        )
    lines.append("; ".join(f"{name} {seconds / total:.1%}" for name, seconds in found.by_kind().items()))
    lines.append(f"sum {total * 1e3:,.2f} ms, a whole iteration {found.iteration * 1e3:,.2f} ms")
    lines.append(found.last_line())
    return "\n".join(lines)
