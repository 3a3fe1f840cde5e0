"""A linear head's layer, trained as if each of its inputs had a mean square near 1.

What the layer sees are pooled outputs of convs. Those of Keras' VGG-16 have mean squares from 1e-3 to 5e7, so that no rate
suits all columns of the layer, nor both the layer and the convs: fine-tuning from a fitted layer diverged at a rate of 1e-6
(docs/adr/0011-unit-inputs.md). So each update is made on weights times 2^k, as if the inputs were divided by 2^k; each column
has its own k. Powers of two are exact: what is stored and served is the layer itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.manifest import read_manifest
from training.new_rows import layer_inputs
from training.stage_job import StageJob
from training.store import Store
from training.team import Team
from vggcore.nets import Vgg
from vggcore.transfer import last_layer

PICTURES = 64         # of train, that mean squares are taken of: those whose content's digest is lowest
FLOOR = 1e-3          # of the median column's mean square: a column that is nearly always 0 is not blown up
KEPT = "input_exponents"      # in the optimiser's group of the layer, and so in each checkpoint


@dataclass(frozen=True)
class UnitInputs:
    """The layer, and k of each of its columns."""

    layer: nn.Linear
    exponents: tuple[int, ...]

    @classmethod
    def measured(cls, net: Vgg, job: StageJob, team: Team) -> "UnitInputs":
        """Of the net as it is, the same in every worker: rank 0's are taken. Raises DatasetError for a picture that is gone."""
        layer = layer_of(net, job)
        train = read_manifest(Store(job.store).data(job.fingerprint)).split("train")
        pictures = train.some(np.sort(np.argsort(train.contents.astype(str), kind="stable")[:PICTURES]))
        squares = torch.zeros(layer.in_features, dtype=torch.float64)
        for inputs, _ in layer_inputs(net, layer, job, pictures, team.device):
            squares += inputs.square().sum(0)
        squares /= len(pictures)
        floor = max(FLOOR * float(squares.median()), torch.finfo(torch.float32).tiny)
        exponents = torch.log2(squares.clamp(min=floor)).div(2).round().int()
        return cls(layer, tuple(team.everyones(exponents.tolist())[0]))

    @classmethod
    def kept(cls, net: Vgg, job: StageJob, optimizer: Optimizer) -> "UnitInputs | None":
        """Those of the checkpoint that the optimiser was loaded from; None where it has none."""
        found = next((group[KEPT] for group in optimizer.param_groups if KEPT in group), None)
        return None if found is None else cls(layer_of(net, job), tuple(found))

    def keep(self, optimizer: Optimizer) -> None:
        """Puts the exponents where checkpoints have them."""
        group = next(one for one in optimizer.param_groups if any(self.layer.weight is own for own in one["params"]))
        group[KEPT] = list(self.exponents)

    @torch.no_grad()
    def shrink_random_rows(self, job: StageJob) -> None:
        """Divides the rows that the parent did not give by 2^k: initialisations are meant for inputs near 1."""
        assert job.parent is not None
        if f"{last_layer(job.stage)}.weight" not in job.parent.tensors:
            self.layer.weight.div_(self.scale)
        elif job.parent.added and job.stage.new_rows == "random":
            self.layer.weight[-len(job.parent.added) :].div_(self.scale)

    @cached_property
    def scale(self) -> Tensor:
        """2^k of each column, (F,) float32 on the layer's device."""
        weight = self.layer.weight
        return torch.ldexp(torch.ones(len(self.exponents)), torch.tensor(self.exponents)).to(weight.device, weight.dtype)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The layer's weights and gradient are those of the layer whose inputs are divided by 2^k."""
        weight, scale = self.layer.weight, self.scale
        assert weight.grad is not None
        with torch.no_grad():
            weight.mul_(scale)
            weight.grad.div_(scale)
        yield
        with torch.no_grad():
            weight.div_(scale)


def wants_unit_inputs(job: StageJob) -> bool:
    """Whether the stage trains a linear head on convs of a parent; a net from random weights sees inputs near 1 anyway."""
    return job.stage.head == "linear" and job.parent is not None


def layer_of(net: Vgg, job: StageJob) -> nn.Linear:
    """The head's layer."""
    layer = net.get_submodule(last_layer(job.stage))
    assert isinstance(layer, nn.Linear)
    return layer
