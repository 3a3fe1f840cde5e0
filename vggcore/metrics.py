"""Figures of merit from posteriors, predictions and labels, and bootstrap intervals for them."""

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vggcore.counter_hash import uniforms

# What a bootstrap resamples: posteriors (n, classes) or predictions (n,), and labels (n,) -> a figure.
Metric = Callable[[NDArray[np.generic], NDArray[np.int64]], float]


def top_k_accuracy(posteriors: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Share of pictures, 0..1, whose label is among the k classes of highest posterior.

    posteriors (n, classes), logits do as well; labels (n,), n > 0. Of equal posteriors the earlier class comes first,
    as argmax has it; a label whose own posterior is not a number counts as missed.
    """
    scores, truth = np.asarray(posteriors), np.asarray(labels, np.int64)
    assert len(truth) > 0 and scores.shape[0] == len(truth), (scores.shape, truth.shape)
    own = scores[np.arange(len(truth)), truth][:, None]
    earlier = np.arange(scores.shape[1])[None, :] < truth[:, None]
    ahead = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return float(np.mean((ahead < k) & ~np.isnan(own[:, 0])))


def confusion_matrix(predictions: ArrayLike, labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Counts (classes, classes) int64: a row for each true class, a column for each predicted one."""
    predicted, truth = np.asarray(predictions, np.int64), np.asarray(labels, np.int64)
    assert predicted.shape == truth.shape, (predicted.shape, truth.shape)
    assert not truth.size or (min(predicted.min(), truth.min()) >= 0 and max(predicted.max(), truth.max()) < classes)
    counts = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.astype(np.int64).reshape(classes, classes)


def balanced_accuracy(predictions: ArrayLike, labels: ArrayLike, classes: int) -> float:
    """Mean recall, 0..1, over the classes that have a picture; NaN where none has."""
    counts = confusion_matrix(predictions, labels, classes)
    pictures = counts.sum(axis=1)
    present = pictures > 0
    return float(np.mean(counts.diagonal()[present] / pictures[present])) if present.any() else math.nan


def auc(scores: ArrayLike, positives: ArrayLike) -> float:
    """Area under the ROC curve, 0..1: how often a positive scores above a negative, ties counting half.

    scores (n,), positives (n,) bool. NaN unless both sides have a picture.
    """
    values, positive = np.asarray(scores, np.float64), np.asarray(positives, bool)
    count = int(positive.sum())
    if count in (0, len(positive)):
        return math.nan
    _, place, sizes = np.unique(values, return_inverse=True, return_counts=True)
    average_ranks = np.cumsum(sizes) - (sizes - 1) / 2     # of tied values: the mean of the ranks they fill, from 1
    above = average_ranks[place][positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(positive) - count)))


def macro_auc(posteriors: ArrayLike, labels: ArrayLike) -> float:
    """The AUC of class 1 where there are two classes, else the mean of one against the rest, 0..1.

    Classes without a picture, or without one outside, are left out; NaN where none is left. posteriors (n, classes).
    """
    scores, truth = np.asarray(posteriors), np.asarray(labels, np.int64)
    if scores.shape[1] == 2:
        return auc(scores[:, 1], truth == 1)
    present = [index for index in range(scores.shape[1]) if 0 < np.count_nonzero(truth == index) < len(truth)]
    return float(np.mean([auc(scores[:, index], truth == index) for index in present])) if present else math.nan


def bootstrap_interval(
    metric: Metric, a: ArrayLike, labels: ArrayLike, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """A figure and its percentile bootstrap interval over pictures: (value, low, high).

    a: what `metric` takes beside labels, one row a picture. The draws are our own hash of (seed, resample, place).
    Resamples on which the metric is NaN (a class is absent) are left out; NaN where all are.
    """
    given, truth = np.asarray(a), np.asarray(labels, np.int64)
    values = [metric(given[rows], truth[rows]) for rows in resampled_rows(len(truth), seed, resamples)]
    return (metric(given, truth), *percentiles(values, level))


def paired_bootstrap(
    metric: Metric,
    a: ArrayLike,
    b: ArrayLike,
    labels: ArrayLike,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """How much higher `a` scores than `b` on the same pictures: (difference, low, high).

    Each resample takes the same pictures for both, so that what is hard for both cancels out; otherwise as
    bootstrap_interval.
    """
    first, second, truth = np.asarray(a), np.asarray(b), np.asarray(labels, np.int64)
    assert len(first) == len(second) == len(truth), (first.shape, second.shape, truth.shape)
    values = [
        metric(first[rows], truth[rows]) - metric(second[rows], truth[rows])
        for rows in resampled_rows(len(truth), seed, resamples)
    ]
    return (metric(first, truth) - metric(second, truth), *percentiles(values, level))


def resampled_rows(n: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """For each resample (n,) row numbers 0..n-1, drawn with replacement."""
    places = np.arange(n)
    for number in range(resamples):
        yield (uniforms("bootstrap", seed, number, places) * n).astype(np.int64)


def percentiles(values: list[float], level: float) -> tuple[float, float]:
    """The middle `level` share of the values that are numbers, as (low, high)."""
    found = np.asarray(values, np.float64)
    found = found[~np.isnan(found)]
    if not found.size:
        return (math.nan, math.nan)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))
