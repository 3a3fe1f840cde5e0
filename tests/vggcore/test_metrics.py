"""Figures of merit against scikit-learn's, at ties and missing classes, and intervals that cover what they should."""

import math

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from vggcore.metrics import (
    auc,
    balanced_accuracy,
    bootstrap_interval,
    confusion_matrix,
    macro_auc,
    paired_bootstrap,
    top_k_accuracy,
)


def some_posteriors(n, classes, seed=0):
    """Posteriors that know a little of their labels: (n, classes), (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.0 * np.eye(classes)[labels]
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_accuracy_is_scikit_learns(k):
    posteriors, labels = some_posteriors(300, 7)

    found = top_k_accuracy(posteriors, labels, k)

    assert found == pytest.approx(sklearn_metrics.top_k_accuracy_score(labels, posteriors, k=k, labels=range(7)))


def test_of_equal_posteriors_the_earlier_class_is_predicted_and_nan_is_a_miss():
    even = np.full((4, 4), 0.25)
    broken = np.full((2, 3), np.nan)

    assert top_k_accuracy(even, [0, 1, 2, 3]) == 0.25
    assert top_k_accuracy(even, [0, 1, 2, 3], k=2) == 0.5
    assert top_k_accuracy(even, [0, 1, 2, 3], k=9) == 1.0
    assert top_k_accuracy(broken, [0, 1]) == 0.0


def test_the_confusion_matrix_has_true_rows_and_predicted_columns():
    counts = confusion_matrix([0, 1, 1, 1], [0, 0, 0, 1], classes=3)

    assert counts.tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert counts.dtype == np.int64


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_are_there():
    posteriors, labels = some_posteriors(200, 4)
    predictions = posteriors.argmax(axis=1)

    assert balanced_accuracy(predictions, labels, 4) == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(labels, predictions)
    )
    assert balanced_accuracy([1, 1, 1, 1], [1, 0, 0, 0], 5) == 0.5
    assert math.isnan(balanced_accuracy([], [], 2))


def test_auc_is_scikit_learns_also_with_many_ties():
    rng = np.random.default_rng(4)
    positives = rng.random(400) < 0.3
    scores = np.round(rng.normal(size=400) + positives, 1)

    assert auc(scores, positives) == pytest.approx(sklearn_metrics.roc_auc_score(positives, scores))
    assert auc([0.5, 0.5, 0.5], [True, False, False]) == 0.5
    assert auc([0.1, 0.9], [True, False]) == 0.0


def test_auc_of_one_sided_data_is_no_number():
    assert math.isnan(auc([0.1, 0.2], [True, True]))
    assert math.isnan(auc([], []))
    assert math.isnan(macro_auc([[0.1, 0.9]], [1]))
    assert math.isnan(macro_auc([[0.1, 0.8, 0.1]], [1]))


def test_macro_auc_is_that_of_class_1_for_two_and_one_against_the_rest_for_more():
    two, two_labels = some_posteriors(150, 2)
    five, five_labels = some_posteriors(150, 5)

    assert macro_auc(two, two_labels) == pytest.approx(sklearn_metrics.roc_auc_score(two_labels, two[:, 1]))
    assert macro_auc(five, five_labels) == pytest.approx(
        sklearn_metrics.roc_auc_score(five_labels, five, multi_class="ovr", average="macro")
    )
    padded = np.concatenate([five, np.zeros((150, 1))], axis=1)     # a class without a picture is left out
    assert macro_auc(padded, five_labels) == pytest.approx(macro_auc(five, five_labels))


def test_a_bootstrap_interval_of_a_mean_is_that_of_the_textbook():
    correct = (np.arange(400) < 300).astype(float)

    value, low, high = bootstrap_interval(lambda a, labels: float(a.mean()), correct, np.zeros(400), seed=1)

    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert value == 0.75
    assert low == pytest.approx(0.75 - half, abs=0.15 * half)
    assert high == pytest.approx(0.75 + half, abs=0.15 * half)


def test_a_paired_bootstrap_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 300)
    a = np.where(rng.random(300) < 0.8, labels, 1 - labels)
    b = a.copy()
    b[:15] = 1 - labels[:15]                                        # b misses 15 that a mostly gets right

    def accuracy(predictions, truth):
        return float(np.mean(predictions == truth))

    difference, low, high = paired_bootstrap(accuracy, a, b, labels, seed=2)

    assert difference == pytest.approx(accuracy(a, labels) - accuracy(b, labels))
    assert 0 < low < difference < high
    assert high - low < 0.06                                        # unpaired it would be 0.13 wide
    assert paired_bootstrap(accuracy, a, a, labels, seed=2) == (0, 0, 0)


def test_a_bootstrap_repeats_itself_and_changes_with_seed_and_level():
    posteriors, labels = some_posteriors(60, 2)

    first = bootstrap_interval(macro_auc, posteriors, labels, seed=1, resamples=200)
    again = bootstrap_interval(macro_auc, posteriors, labels, seed=1, resamples=200)
    other = bootstrap_interval(macro_auc, posteriors, labels, seed=2, resamples=200)
    narrow = bootstrap_interval(macro_auc, posteriors, labels, seed=1, resamples=200, level=0.5)

    assert first == again != other
    assert first[1] < narrow[1] < narrow[2] < first[2]


def test_resamples_that_lack_a_class_are_left_out_of_the_interval():
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])

    value, low, high = bootstrap_interval(macro_auc, scores, [0, 1, 0], seed=0, resamples=100)
    nothing = bootstrap_interval(macro_auc, scores, [0, 0, 0], seed=0, resamples=20)

    assert (value, low, high) == (1.0, 1.0, 1.0)
    assert all(math.isnan(figure) for figure in nothing)
