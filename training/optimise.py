"""What moves the weights: SGD with momentum and decay, or AdamW, and the rule that lowers the learning rate (Sec. 3.1)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from vggcore.nets import conv_names
from vggcore.schedule import Stage

Way = Literal["foreach", "fused", "loop"]    # torch's three ways to compute the same update
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")     # what SGD, and AdamW, keep of earlier gradients


@dataclass(frozen=True)
class Plateau:
    """The learning-rate rule's memory between epochs.

    A strict gain in val top-1 over the best so far resets the counter; `patience` epochs without one divide the rate by
    10 and reset the counter; after `drops` divisions, the next such stall ends the stage (Sec. 3.1: three divisions).
    """

    learning_rate: float
    drops_left: int
    patience: int
    best: float = -1.0          # best val top-1 so far; -1 before the first epoch
    best_epoch: int = -1
    stalled: int = 0            # epochs since the last gain or drop
    finished: bool = False

    @classmethod
    def start(cls, stage: Stage) -> "Plateau":
        """The rule before the stage's first epoch."""
        return cls(learning_rate=stage.learning_rate, drops_left=stage.drops, patience=stage.patience)

    def after(self, epoch: int, val_top1: float, *, steers: bool = True) -> "Plateau":
        """The rule after epoch `epoch` reached `val_top1` (0..1); steers: whether a stall counts."""
        if val_top1 > self.best:
            return replace(self, best=val_top1, best_epoch=epoch, stalled=0)
        if not steers:
            return self
        if self.stalled + 1 < self.patience:
            return replace(self, stalled=self.stalled + 1)
        if self.drops_left == 0:
            return replace(self, stalled=self.stalled + 1, finished=True)
        return replace(self, learning_rate=self.learning_rate / 10, drops_left=self.drops_left - 1, stalled=0)


def ended_by(plateau: Plateau, *, epochs: int, max_epochs: int) -> Literal["plateau", "max_epochs"] | None:
    """What ends a stage after so many whole epochs: the stall after the last drop, or max_epochs; None: it goes on."""
    if plateau.finished:
        return "plateau"
    return "max_epochs" if epochs >= max_epochs else None


def make_optimizer(named: Iterable[tuple[str, Parameter]], stage: Stage, way: Way = "fused") -> Optimizer:
    """The stage's optimiser of the parameters that need gradients, by their names in the net.

    SGD has momentum and weight decay on every parameter, biases included unless decay_biases is false (Sec. 3.1). AdamW
    has torch's decay rates of its moments, 0.9 and 0.999, and decoupled weight decay (Loshchilov and Hutter 2019).
    way: "fused" is the fastest where the update counts (net D, docs/benchmarks/training.md). It walks weights, gradients
    and moments as plain memory, and moves the wrong weights silently where they are laid out differently: see load_moments
    and check_layouts.
    """
    groups, foreach, fused = parameter_groups(named, stage), way == "foreach", True if way == "fused" else None
    if stage.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=stage.learning_rate, foreach=foreach, fused=fused)
    return torch.optim.SGD(groups, lr=stage.learning_rate, momentum=stage.momentum, foreach=foreach, fused=fused)


def parameter_groups(named: Iterable[tuple[str, Parameter]], stage: Stage) -> list[dict[str, Any]]:
    """The optimiser's groups: parameters of one rate and one weight decay, in the net's order; frozen ones are left out.

    A group's "factor" is its rate relative to the classifier's, see set_learning_rate.
    """
    found: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decayed = stage.decay_biases or not name.endswith(".bias")
            found.setdefault((rate_factor(name, stage), stage.weight_decay if decayed else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": stage.learning_rate * factor, "factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in found.items()
    ]


def rate_factor(name: str, stage: Stage) -> float:
    """The rate of a parameter relative to the classifier's: layer_decay for each conv group from it up to the last one."""
    if stage.layer_decay == 1:
        return 1.0
    last = max(stage.features.groups) if stage.features is not None else 5
    groups = {module: int(place[len("conv")]) for place, module in conv_names(stage.net, last).items()}
    group = groups.get(name.rpartition(".")[0], last + 1)
    return math.prod([stage.layer_decay] * (last + 1 - group))      # pow may differ in its last bit between processors


def moments(stage: Stage) -> int:
    """How many values the optimiser keeps of each parameter that it moves."""
    if stage.optimiser == "adamw":
        return 2
    return 1 if stage.momentum else 0


def load_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimiser a checkpoint's moments and rates.

    How it computes the update, how its moments lie in memory and the rates of its groups relative to one another stay its
    own: the latter are the stage's.
    """
    own = [{name: group[name] for name in ("foreach", "fused", "factor")} for group in optimizer.param_groups]
    groups = [kept | ours for kept, ours in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    for parameter, kept in optimizer.state.items():
        for name in MOMENTS:
            if kept.get(name) is not None:
                kept[name] = torch.empty_like(parameter).copy_(kept[name])


def check_layouts(optimizer: Optimizer) -> None:
    """AssertionError unless each gradient and moment lies in memory as its weights do."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for other in (parameter.grad, *(state.get(name) for name in MOMENTS)):
                assert other is None or order(other) == order(parameter), "a fused update would move the wrong weights"


def order(tensor: torch.Tensor) -> list[int]:
    """The strides that say where elements lie; that of a dimension of one place says nothing (1x1 kernels, one channel)."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """The classifier's rate in every following update; each group has its own share of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
