"""The learning rate of each update: a pure function of the iteration and of the plateau rule's state."""

import math

from training.optimise import Plateau
from vggcore.schedule import Stage

SERIES = 10      # terms of the sine's series beyond the first: below 1e-17 within a quarter turn


def learning_rate(stage: Stage, plateau: Plateau, iteration: int, batches: int) -> float:
    """The rate of the classifier in the update that follows `iteration` others; batches: iterations per epoch.

    Warm-up (Goyal et al. 2017): update i of W in the first warmup_epochs has i/W of the rate, the last one all of it.
    After it "plateau" has the rate of `plateau` (Sec. 3.1), "cosine" half a cosine from learning_rate to
    final_learning_rate, which it would reach one update after max_epochs (Loshchilov and Hutter 2017, without restarts).
    """
    warm, total = stage.warmup_epochs * batches, stage.max_epochs * batches
    if iteration < warm:
        return plateau.learning_rate * (iteration + 1) / warm
    if stage.rule == "plateau":
        return plateau.learning_rate
    low, high = stage.final_learning_rate, stage.learning_rate
    return low + (high - low) * (1 + cosine_of_half_turns((iteration - warm) / (total - warm))) / 2


def cosine_of_half_turns(share: float) -> float:
    """cos(pi * share) for 0 <= share <= 1, in additions and multiplications alone.

    libm's cos may differ in its last bit from processor to processor: workers of one stage would part.
    """
    angle = math.pi * (0.5 - share)
    square, value = angle * angle, 1.0
    for term in range(SERIES, 0, -1):
        value = 1.0 - square / (2 * term * (2 * term + 1)) * value
    return angle * value


def steers(stage: Stage, epoch: int) -> bool:
    """Whether val accuracy after epoch `epoch`, counted from 0, may lower the rate: not under "cosine" nor in the warm-up."""
    return stage.rule == "plateau" and epoch >= stage.warmup_epochs
