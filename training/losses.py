"""The loss that training lowers: cross-entropy, smoothed, weighted by class and mixed where the stage asks for it."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipelines.loader import Batch
from vggcore.errors import DatasetError, RecipeError
from vggcore.logistic import class_factors
from vggcore.recipe import nearest
from vggcore.schedule import Stage


def factors_by_class(stage: Stage, classes: Sequence[str], labels: NDArray[np.int64]) -> Tensor | None:
    """The factor on the loss of each class's pictures, (classes,) float32, with mean 1 over the training pictures.

    labels: of the training pictures. None where the stage weighs no classes.
    """
    if stage.class_weights is None:
        return None
    of_pictures, found = torch.from_numpy(labels), torch.zeros(len(classes), dtype=torch.float64)
    found[of_pictures] = class_factors(stage.class_weights, classes, of_pictures)
    return found.float()


def check_class_weights(stages: Sequence[Stage], classes: Sequence[str], labels: NDArray[np.int64]) -> None:
    """Refuses weights for a class that is not there, and weights or balance where all training pictures have one class.

    labels: of the training pictures. Raises RecipeError, DatasetError.
    """
    for stage in stages:
        table = stage.class_weights if isinstance(stage.class_weights, dict) else {}
        for name in table:
            if name not in classes:
                raise RecipeError(f"stage {stage.name!r}: class_weights has no class {name!r}{nearest(name, list(classes))}")
        key = "balance" if stage.balance else "class_weights" if stage.class_weights is not None else None
        if key is not None and len(np.unique(labels)) < 2:
            raise DatasetError(
                f"stage {stage.name!r}: {key} has no effect, since all training pictures are of class"
                f" {classes[int(labels[0])]!r}; remove it, or add pictures of other classes"
            )


def picture_losses(logits: Tensor, batch: Batch, stage: Stage, factors: Tensor | None) -> Tensor:
    """The loss of each picture, (n,) float32; logits (n, classes) float32, batch of the same n, factors as factors_by_class.

    With label smoothing s a label's own class gets 1 - s + s/classes, each other class s/classes (Szegedy et al. 2016). A
    mixed picture has lambda of its own label's loss and 1 - lambda of its partner's (Zhang et al. 2018), each with the
    factor of its class.
    """

    def losses(labels: Tensor) -> Tensor:
        found = cross_entropy(logits, labels, reduction="none", label_smoothing=stage.label_smoothing)
        return found if factors is None else found * factors[labels]

    if batch.mix is None or batch.partner_labels is None:
        return losses(batch.labels)
    return batch.mix * losses(batch.labels) + (1 - batch.mix) * losses(batch.partner_labels)


def loss_sum(logits: Tensor, batch: Batch, stage: Stage, factors: Tensor | None) -> Tensor:
    """The sum of picture_losses, a float32 scalar."""
    if batch.mix is None and factors is None:      # torch's own sum: stages of before these settings keep their bits
        return cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=stage.label_smoothing)
    return picture_losses(logits, batch, stage, factors).sum()
