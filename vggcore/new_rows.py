"""First weights of the last layer for classes that come to a trained net: their mean features, imprinted. Pure."""

import torch
from torch import Tensor


def mean_rows(weight: Tensor, bias: Tensor, *, centre: Tensor, own: float, means: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the last layer for new classes, (new, F), and their biases (new,), float64.

    weight (k, F) and bias (k,): the trained rows of the k old classes. centre (F,): the mean of what the layer sees of the
    old classes' pictures; own: the mean logit that these pictures have in their own class; means (new, F): what the layer
    sees of each new class, on average.
    After Qi, Brown and Lowe 2018 ("Low-shot learning with imprinted weights"): a new row points at its class's mean. Ours,
    as features after a ReLU share a large common part and these logits are not cosines (measured,
    docs/how-to/new-classes.md): it points there from `centre`, is as long as the old rows are from their mean, on average,
    and at its own mean the new logit lies half-way between the highest old logit there and `own`, never below the former.
    """
    weight, bias, centre, means = (values.double() for values in (weight, bias, centre, means))
    middle = weight.mean(0)
    length = (weight - middle).norm(dim=1).mean()
    away = means - centre
    rows = middle + length * away / away.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    highest = (means @ weight.T + bias).amax(1)
    return rows, highest + (own - highest).clamp_min(0) / 2 - (rows * means).sum(1)
