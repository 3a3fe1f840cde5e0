"""Whether a result is worth having, in plain words: above chance by its interval, and above logistic regression on pixels."""

import numpy as np
from numpy.typing import NDArray

from deploy.yardsticks import BOOTSTRAP_SEED, LOGISTIC_NAME, Measured, Yardsticks
from vggcore.metrics import balanced_accuracy, bootstrap_interval, paired_bootstrap


def verdict(net: Measured, found: Yardsticks | None) -> list[str]:
    """What is wrong with a net's result on test, a sentence each; empty where nothing is.

    Chance is one over the number of classes on test, the balanced accuracy of naming any one class always. The plain
    classifier is compared on the pictures that both scored, where there are yardsticks. Intervals are bootstraps at 95 %.
    """
    return [sentence for sentence in (beside_chance(net), beside_pixels(net, found) if found else None) if sentence]


def beside_chance(net: Measured) -> str | None:
    """The sentence on a balanced accuracy whose interval reaches down to chance."""
    classes = net.posteriors.shape[1]

    def balanced(predictions: NDArray[np.generic], labels: NDArray[np.int64]) -> float:
        return balanced_accuracy(predictions, labels, classes)

    value, low, high = bootstrap_interval(balanced, net.posteriors.argmax(axis=1), net.labels, seed=BOOTSTRAP_SEED)
    chance = 1 / len(np.unique(net.labels))
    if low > chance:
        return None
    return (
        f"{net.name} is not shown to be better than chance: balanced accuracy {100 * value:.1f} % on {len(net.labels):,} test"
        f" pictures, 95 % interval {100 * low:.1f} to {100 * high:.1f}; chance is {100 * chance:.1f} %"
    )


def beside_pixels(net: Measured, found: Yardsticks) -> str | None:
    """The sentence on a balanced accuracy below that of logistic regression on pixels; None where they share no picture."""
    row = next((row for row in found.rows if row.name == LOGISTIC_NAME), None)
    places = {path: place for place, path in enumerate(net.paths)}
    common = [(places[path], at) for at, path in enumerate(found.paths) if path in places]
    if row is None or not common:
        return None
    ours, theirs = (np.array(side) for side in zip(*common, strict=True))
    labels, classes = net.labels[ours], net.posteriors.shape[1]

    def balanced(predictions: NDArray[np.generic], truth: NDArray[np.int64]) -> float:
        return balanced_accuracy(predictions, truth, classes)

    mine, plain = net.posteriors[ours].argmax(axis=1), np.array(row.predictions)[theirs]
    difference, low, high = paired_bootstrap(balanced, mine, plain, labels, seed=BOOTSTRAP_SEED)
    if difference >= 0:
        return None
    apart = "" if high < 0 else f"; {len(labels):,} pictures do not tell the two apart"
    return (
        f"{net.name} is below logistic regression on pixels: balanced accuracy {100 * balanced(mine, labels):.1f} against"
        f" {100 * balanced(plain, labels):.1f} %, a difference of {100 * difference:.1f} (95 % interval {100 * low:+.1f} to"
        f" {100 * high:+.1f}){apart}"
    )
