"""The mean of a stage's weights at the ends of its last epochs (Izmailov et al. 2018), exact though the end is not known.

Under "cosine" a stage ends after max_epochs: one sum, over the last epochs. Under "plateau" the end depends on val: there
is a sum for each number of epochs at which the stage may still end, from the first of its last epochs on. As long as
`average` is at most `patience` there are two at most: a gain moves the end away and drops the sum that was meant for it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from training.optimise import Plateau, ended_by
from vggcore.schedule import Stage

State = Mapping[str, Tensor]
SUM_BYTES = 8      # float64: sums of float32 weights are exact, so that frozen weights are their own mean


def possible_ends(stage: Stage, plateau: Plateau, epochs: int) -> list[int]:
    """The numbers of epochs after which the stage may end and whose last `average` epochs contain epoch number `epochs`.

    plateau: after that epoch, counted from 1. Numbers that cannot be any more may be among them, none that can is left out.
    """
    if ended_by(plateau, epochs=epochs, max_epochs=stage.max_epochs) is not None:
        return [epochs]
    soon = range(epochs + 1, min(epochs + stage.average, stage.max_epochs + 1))
    if stage.rule == "cosine":
        return [end for end in soon if end == stage.max_epochs]
    counted = max(epochs, stage.warmup_epochs)      # stalls count from here on
    straight = counted + stage.patience * (plateau.drops_left + 1) - plateau.stalled      # the end without another gain
    later = straight + (plateau.stalled + 1 if plateau.drops_left == 0 else 0)            # the first one after a gain
    return [end for end in soon if end in (stage.max_epochs, straight) or end >= later]


def most_sums(stage: Stage) -> int:
    """How many sums a stage may keep at once."""
    if stage.average <= 1:
        return stage.average
    if stage.rule == "cosine":
        return 1
    return 2 if stage.average <= stage.patience else stage.average


class WeightAverage:
    """The sums that are under way, by the number of epochs that they are for, or the mean once the stage has ended."""

    def __init__(self, sums: Mapping[int, State] | None = None, mean: State | None = None) -> None:
        """sums: float64, on the CPU; mean: float32."""
        self.sums: dict[int, State] = dict(sums or {})
        self.mean = mean

    @classmethod
    def read(cls, tensors: State | None, mean: State | None) -> "WeightAverage":
        """From what `tensors` gave, as a checkpoint has it; None: nothing of the kind."""
        sums: dict[int, dict[str, Tensor]] = {}
        for name, tensor in (tensors or {}).items():
            end, _, parameter = name.partition("/")
            sums.setdefault(int(end), {})[parameter] = tensor
        return cls(sums, mean)

    def add(self, weights: State, epochs: int, stage: Stage, plateau: Plateau) -> None:
        """Takes the weights at the end of epoch number `epochs`, counted from 1; plateau: after it."""
        last = {name: tensor.detach().to("cpu", torch.float64) for name, tensor in weights.items()}
        ends = possible_ends(stage, plateau, epochs)
        self.sums = {end: total(self.sums.get(end), last) for end in ends}
        if ended_by(plateau, epochs=epochs, max_epochs=stage.max_epochs) is not None:
            count = min(stage.average, epochs)
            self.mean = {name: (tensor / count).float() for name, tensor in self.sums.pop(epochs).items()}

    def tensors(self) -> dict[str, Tensor]:
        """The sums under one name each, "12/features.0.weight"; they are never changed in place."""
        return {f"{end}/{name}": tensor for end, state in self.sums.items() for name, tensor in state.items()}


def total(so_far: State | None, weights: State) -> State:
    """The sum of both."""
    return weights if so_far is None else {name: so_far[name] + tensor for name, tensor in weights.items()}
