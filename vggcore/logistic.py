"""Multinomial logistic regression by L-BFGS in float64: the one layer of a linear stage, its penalty chosen on val.

What is minimised is scikit-learn's objective, so that C means the same: 0.5 * ||W||^2 + C * (sum over pictures of factor *
-log p of the right class), on features that are standardised over train; biases are not penalised. With two classes W is
one row, that of their difference. The penalty makes the objective strongly convex in W, with constant 1: the norm of the
gradient where the search ends is at least W's distance from the one optimum.

Sums depend on the order of rows and on BLAS's threads: give rows in an order of their own, and set one thread.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vggcore.errors import TrainingError

# Values of C in half decades, the strongest penalty first: each fit starts from the one before.
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
TOLERANCE = 1e-5          # gradient norm at which a fit ends, times C * n where that is below 1 (the biases' curvature)
MEMORY = 20               # pairs of steps and gradient changes that L-BFGS keeps (Nocedal 1980)
MOST_ITERATIONS = 20_000
ENOUGH_DECREASE, ENOUGH_SLOPE = 1e-4, 0.9     # of a step: Armijo's and Wolfe's conditions (Nocedal and Wright 2006, 3.1)
ROUNDING = 1e-14          # of the objective, relative: a step at the optimum may not lower it visibly


@dataclass(frozen=True)
class Rows:
    """Pictures of one split: features (n, F) and labels (n,) int64."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Standardised:
    """How features are standardised: those that vary over train, less their mean, over their deviation; all float64."""

    kept: Tensor         # (F,) bool: constant columns are dropped
    mean: Tensor         # (F,)
    deviation: Tensor    # (F,), 1 where a column is dropped

    @classmethod
    def of(cls, features: Tensor) -> "Standardised":
        """Mean and deviation over the rows of features (n, F)."""
        values = features.double()
        mean = values.mean(0)
        deviation = (values - mean).square().mean(0).sqrt()
        # The float32 mean of equal numbers may differ from them in its last bit.
        kept = deviation > 1e-6 * mean.abs()
        return cls(kept=kept, mean=mean, deviation=torch.where(kept, deviation, 1.0))

    def apply(self, features: Tensor) -> Tensor:
        """(n, F) -> (n, kept columns) float64."""
        values = (features.double() - self.mean) / self.deviation
        return values[:, self.kept].contiguous()


@dataclass(frozen=True)
class Solution:
    """A fit at one penalty: its layer on standardised features, how it ended, and what it reaches."""

    c: float
    weight: Tensor         # (classes, kept columns) float64
    bias: Tensor           # (classes,) float64
    iterations: int
    gradient_norm: float
    train_loss: float      # mean -log p of the right class, unweighted
    val_loss: float
    val_top1: float        # 0..1


@dataclass(frozen=True)
class Layer:
    """The fitted linear layer on features as they come: float32 weight (classes, F) and bias (classes,)."""

    weight: Tensor
    bias: Tensor
    chosen: Solution
    dropped: int           # constant columns, whose weights are 0


def class_factors(weights: str | Mapping[str, float] | None, classes: Sequence[str], labels: Tensor) -> Tensor:
    """The factor on each picture's loss, (n,) float64, of mean 1 over these rows.

    weights: None (all 1), "balanced" (each class counts the same in all) or factors by class, 1 where none is given.
    """
    counts = torch.bincount(labels, minlength=len(classes)).double()
    if weights is None:
        by_class = torch.ones(len(classes), dtype=torch.float64)
    elif isinstance(weights, str):
        by_class = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)
    else:
        by_class = torch.tensor([float(weights.get(name, 1.0)) for name in classes], dtype=torch.float64)
    return by_class[labels] * (len(labels) / (by_class * counts).sum())


def fit_layer(
    train: Rows,
    val: Rows,
    *,
    classes: int,
    factors: Tensor | None = None,
    grid: Sequence[float] = GRID,
    on_solution: Callable[[Solution], None] = lambda solution: None,
    check: Callable[[], None] = lambda: None,
) -> Layer:
    """Fits the layer at each C of the grid, ascending, and takes that of least mean loss on val; of equal ones the smallest C.

    factors: (n,) on the losses of train. on_solution is called after each fit, check at each iteration: it may raise to
    end the search. Raises TrainingError for features that are not finite.
    """
    for rows in (train, val):
        if not torch.isfinite(rows.features).all():
            raise TrainingError("the features have values that are not finite; check the weights that they come from")
    scaling = Standardised.of(train.features)
    inputs, asked = scaling.apply(train.features), scaling.apply(val.features)
    problem = Problem(inputs, train.labels, classes, factors)
    at = torch.zeros(problem.size, dtype=torch.float64)
    best: Solution | None = None
    for c in grid:
        enough = TOLERANCE * min(1.0, c * len(train.labels))
        at, iterations, norm = minimise(partial(problem.objective, c=c), at, enough, check)
        weight, bias = problem.layer(at)
        train_loss, _ = loss_and_top1(inputs @ weight.T + bias, train.labels)
        val_loss, val_top1 = loss_and_top1(asked @ weight.T + bias, val.labels)
        solution = Solution(c, weight, bias, iterations, norm, train_loss, val_loss, val_top1)
        on_solution(solution)
        if best is None or solution.val_loss < best.val_loss:
            best = solution
    assert best is not None, "a grid has a value"
    return folded(best, scaling)


def folded(solution: Solution, scaling: Standardised) -> Layer:
    """The layer with the standardisation in it: it takes features as they come."""
    weight = torch.zeros(len(solution.bias), len(scaling.kept), dtype=torch.float64)
    weight[:, scaling.kept] = solution.weight / scaling.deviation[scaling.kept]
    bias = solution.bias - weight @ scaling.mean
    return Layer(weight.float(), bias.float(), solution, int((~scaling.kept).sum()))


def loss_and_top1(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean -log p of the right class, and the share of rows whose highest logit is their label's."""
    rows = torch.arange(len(labels))
    loss = -torch.log_softmax(logits, 1)[rows, labels].mean()
    return float(loss), float((logits.argmax(1) == labels).double().mean())


class Problem:
    """The objective over points: weights, row by row, and then biases, all in one vector."""

    def __init__(self, inputs: Tensor, labels: Tensor, classes: int, factors: Tensor | None) -> None:
        """inputs (n, F) float64, standardised; labels (n,); factors (n,) on the losses, or None."""
        self.inputs, self.labels, self.classes = inputs, labels, classes
        self.factors = factors if factors is not None else torch.ones(len(labels), dtype=torch.float64)
        self.rows = 1 if classes == 2 else classes       # of two classes the difference alone
        self.right = torch.nn.functional.one_hot(labels, classes).double()

    @property
    def size(self) -> int:
        """Numbers in a point."""
        return self.rows * (self.inputs.shape[1] + 1)

    def split(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (rows, F) and biases (rows,), as views."""
        weights = self.rows * self.inputs.shape[1]
        return point[:weights].view(self.rows, -1), point[weights:]

    def logits(self, scores: Tensor) -> Tensor:
        """Scores (n, rows) as logits (n, classes)."""
        return torch.cat([-scores / 2, scores / 2], 1) if self.classes == 2 else scores

    def layer(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The layer of a point: weights (classes, F) and biases (classes,)."""
        weight, bias = self.split(point)
        return self.logits(weight.T).T.contiguous(), self.logits(bias[None])[0].contiguous()

    def objective(self, point: Tensor, c: float) -> tuple[float, Tensor]:
        """The objective and its gradient at a point."""
        weight, bias = self.split(point)
        logits = self.logits(torch.addmm(bias, self.inputs, weight.T))
        log_p = torch.log_softmax(logits, 1)
        loss = -((log_p * self.right).sum(1) * self.factors).sum()
        residual = (log_p.exp() - self.right) * self.factors[:, None]        # (n, classes)
        slope = residual[:, 1:] if self.classes == 2 else residual           # of the scores: (r1 - r0) / 2 = r1
        gradient = torch.cat([(c * (slope.T @ self.inputs) + weight).flatten(), c * slope.sum(0)])
        return float(0.5 * weight.square().sum() + c * loss), gradient


Objective = Callable[[Tensor], tuple[float, Tensor]]


def minimise(
    objective: Objective, start: Tensor, tolerance: float, check: Callable[[], None]
) -> tuple[Tensor, int, float]:
    """The point where the gradient's norm is at most `tolerance`, the iterations it took, and that norm.

    L-BFGS with Wolfe's conditions; no random number, no clock. Raises TrainingError where it does not get there.
    """
    point = start
    value, gradient = objective(point)
    steps: list[tuple[Tensor, Tensor, float]] = []        # (change of the point, of the gradient, 1 / their product)
    for iteration in range(MOST_ITERATIONS):
        norm = float(gradient.norm())
        if norm <= tolerance:
            return point, iteration, norm
        check()
        direction = -two_loops(gradient, steps)
        slope = float(direction @ gradient)
        first = 1.0 if steps else min(1.0, 1.0 / norm)
        found = wolfe_step(objective, point, value, direction, slope, first)
        if found is None and steps:
            steps = []      # along the gradient itself next time
            continue
        if found is None:
            break
        step, new_value, new_gradient = found
        moved, turned = direction * step, new_gradient - gradient
        product = float(moved @ turned)
        if product > 0:
            steps = [*steps[-(MEMORY - 1) :], (moved, turned, 1 / product)]
        point, value, gradient = point + moved, new_value, new_gradient
    raise TrainingError(
        f"the logistic fit has a gradient of {norm:g} after {iteration + 1:,} iterations, expected {tolerance:g} at most;"
        " are the features finite, and of one scale?"
    )


def two_loops(gradient: Tensor, steps: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """L-BFGS's estimate of the inverse Hessian times the gradient (Nocedal and Wright 2006, algorithm 7.4)."""
    result, shares = gradient.clone(), []
    for moved, turned, rho in reversed(steps):
        share = rho * float(moved @ result)
        shares.append(share)
        result.sub_(turned, alpha=share)
    if steps:
        moved, turned, rho = steps[-1]
        result.mul_(1 / (rho * float(turned @ turned)))
    for (moved, turned, rho), share in zip(steps, reversed(shares), strict=True):
        result.add_(moved, alpha=share - rho * float(turned @ result))
    return result


def wolfe_step(
    objective: Objective, point: Tensor, value: float, direction: Tensor, slope: float, step: float
) -> tuple[float, float, Tensor] | None:
    """A step along a direction of descent that meets Wolfe's conditions, by bisection; with value and gradient there.

    After 60 halvings any step that lowers the value will do; None where the last does not.
    """
    low, high = 0.0, float("inf")
    slack = ROUNDING * abs(value)
    for _ in range(60):
        tried = step
        new_value, gradient = objective(point + tried * direction)
        if not new_value <= value + ENOUGH_DECREASE * step * slope + slack:
            high = step
        elif float(gradient @ direction) < ENOUGH_SLOPE * slope:
            low = step
        else:
            return step, new_value, gradient
        step = (low + high) / 2 if high < float("inf") else 2 * step
    return (tried, new_value, gradient) if new_value < value else None
