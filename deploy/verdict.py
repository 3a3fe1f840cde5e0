"""Whether a result is worth having, in plain words: above chance by its interval, and above logistic regression on pixels.

And whether a stage has made its parent's weights worse, which a rate that is too large does.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deploy.yardsticks import BOOTSTRAP_SEED, LOGISTIC_NAME, Measured, Yardsticks
from training.parents import result_entry
from training.store import Store
from vggcore.metrics import balanced_accuracy, bootstrap_interval, paired_bootstrap
from vggcore.schedule import Stage


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


def beside_parents(
    stages: Sequence[Stage], keys: Mapping[str, str], store: Store, *, classes: int, pictures: int
) -> list[str]:
    """A sentence on each stage, trained by SGD, that ended worse on val than it could have begun.

    That is a mean loss above ln `classes`, which a net has that looks at no picture; or, beside its parent in the schedule, a
    larger loss and a top-1 accuracy lower by more than two standard errors of one over so many val `pictures`.
    """
    found = []
    for stage in stages:
        own = result_entry(store, keys[stage.name])
        loss = own.get("val_loss")      # absent: of a version that recorded none
        if stage.fit == "logistic" or loss is None:
            continue
        advice = f"lower its learning_rate of {stage.learning_rate:g}"
        if loss > math.log(classes):
            found.append(
                f"{stage.name} ended worse than chance on val: mean loss {loss:.4g}, and {math.log(classes):.2f} without a look"
                f" at the pictures; {advice}"
            )
            continue
        parent = keys.get(stage.init_from or "")
        theirs = result_entry(store, parent) if parent is not None else {}
        if theirs.get("val_loss") is None or loss <= theirs["val_loss"]:
            continue
        ours, before = own["val_top1_accuracy"], theirs["val_top1_accuracy"]
        if ours < before - 2 * math.sqrt(before * (1 - before) / pictures):
            found.append(
                f"{stage.name} ended below {stage.init_from}, which it starts from, on val: top-1 {100 * ours:.1f} against"
                f" {100 * before:.1f} %; {advice}"
            )
    return found
