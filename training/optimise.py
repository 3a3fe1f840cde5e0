"""What moves the weights: SGD with momentum and decay, and the rule that lowers the learning rate (Sec. 3.1). Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vggcore.schedule import Stage

Sgd = Literal["foreach", "fused", "loop"]    # torch's three ways to compute the same update


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

    def after(self, epoch: int, val_top1: float) -> "Plateau":
        """The rule after epoch `epoch` reached `val_top1` (0..1)."""
        if val_top1 > self.best:
            return replace(self, best=val_top1, best_epoch=epoch, stalled=0)
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


def make_optimizer(parameters: Iterable[torch.nn.Parameter], stage: Stage, sgd: Sgd = "fused") -> torch.optim.SGD:
    """SGD with momentum and weight decay on every parameter, biases included (Sec. 3.1).

    sgd: "fused" is the fastest where the update counts (net D, docs/benchmarks/training.md). It walks weights, gradients
    and momentum as plain memory, and moves the wrong weights without a word where they are laid out differently: see
    load_momentum and check_layouts.
    """
    return torch.optim.SGD(
        parameters,
        lr=stage.learning_rate,
        momentum=stage.momentum,
        weight_decay=stage.weight_decay,
        foreach=sgd == "foreach",
        fused=True if sgd == "fused" else None,
    )


def load_momentum(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives an optimiser a checkpoint's momentum and rate; how it computes the update and lies in memory stays its own."""
    own = [{way: group[way] for way in ("foreach", "fused")} for group in optimizer.param_groups]
    groups = [kept | ways for kept, ways in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
    for parameter, kept in optimizer.state.items():
        if kept.get("momentum_buffer") is not None:
            kept["momentum_buffer"] = torch.empty_like(parameter).copy_(kept["momentum_buffer"])


def check_layouts(optimizer: torch.optim.Optimizer) -> None:
    """AssertionError unless each gradient and momentum lies in memory as its weights do."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for other in (parameter.grad, optimizer.state[parameter].get("momentum_buffer")):
                assert other is None or order(other) == order(parameter), "a fused update would move the wrong weights"


def order(tensor: torch.Tensor) -> list[int]:
    """The strides that say where elements lie; that of a dimension of one place says nothing (1x1 kernels, one channel)."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of every following update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
