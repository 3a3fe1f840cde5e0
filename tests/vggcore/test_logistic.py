"""The logistic fit against scikit-learn's, and what it does with odd features."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vggcore.errors import TrainingError
from vggcore.logistic import GRID, TOLERANCE, Problem, Rows, Solution, Standardised, class_factors, fit_layer, minimise


def clouds(classes: int, n: int, columns: int = 40, seed: int = 0) -> Rows:
    """Overlapping clouds, one a class, as pooled features are: never negative, of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, columns, generator=torch.Generator().manual_seed(99))
    values = torch.relu(centres[labels] + 1.5 * torch.randn(n, columns, generator=generator) + 1)
    return Rows(values * torch.logspace(-2, 3, columns), labels)


def scikit(rows: Rows, c: float, factors: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's coefficients on standardised features, solved to the end."""
    inputs = Standardised.of(rows.features).apply(rows.features).numpy()
    model = LogisticRegression(C=c, tol=1e-12, max_iter=100_000).fit(inputs, rows.labels.numpy(), sample_weight=factors)
    return model.coef_, model.intercept_


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0])
def test_coefficients_are_scikit_learns(classes: int, c: float) -> None:
    train, val = clouds(classes, 300), clouds(classes, 80, seed=1)

    found = fit_layer(train, val, classes=classes, grid=(c,)).chosen

    wanted, intercept = scikit(train, c)
    weight = found.weight[1:] - found.weight[:1] if classes == 2 else found.weight
    bias = found.bias[1:] - found.bias[:1] if classes == 2 else found.bias - found.bias.mean()
    assert np.abs(weight.numpy() - wanted).max() < 1e-4
    # Biases alone are determined but for a common constant: scikit-learn's add up to 0.
    assert np.abs(bias.numpy() - (intercept if classes == 2 else intercept - intercept.mean())).max() < 1e-4
    assert found.gradient_norm <= TOLERANCE


def test_factors_on_losses_are_scikit_learns_sample_weights() -> None:
    train, val = clouds(3, 200), clouds(3, 60, seed=1)
    rare = Rows(train.features[train.labels < 2], train.labels[train.labels < 2])
    mixed = Rows(torch.cat([train.features[:20], rare.features]), torch.cat([train.labels[:20], rare.labels]))
    factors = class_factors("balanced", ("a", "b", "c"), mixed.labels)

    found = fit_layer(mixed, val, classes=3, factors=factors, grid=(0.03,)).chosen

    wanted, _ = scikit(mixed, 0.03, factors.numpy())
    assert np.abs(found.weight.numpy() - wanted).max() < 1e-4


@pytest.mark.parametrize("weights", [None, "balanced", {"b": 3.0}])
def test_factors_have_mean_1_over_the_training_pictures(weights: str | dict[str, float] | None) -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])

    factors = class_factors(weights, ("a", "b", "c"), labels)

    assert factors.mean() == pytest.approx(1.0)
    if weights == "balanced":
        assert [float(factors[labels == one].sum()) for one in range(3)] == pytest.approx([10 / 3] * 3)
    if isinstance(weights, dict):
        assert float(factors[7] / factors[0]) == pytest.approx(3.0)


def test_the_layer_takes_features_as_they_come_and_gives_constant_columns_no_weight() -> None:
    train, val = clouds(4, 300), clouds(4, 80, seed=1)
    constant = torch.tensor([[0.0, 0.1, 12345.678]])
    train, val = (
        Rows(torch.cat([rows.features, constant.expand(len(rows.labels), 3)], 1), rows.labels) for rows in (train, val)
    )

    layer = fit_layer(train, val, classes=4, grid=(0.01,))

    assert layer.dropped == 3
    assert (layer.weight[:, -3:] == 0).all() and layer.weight.dtype == torch.float32
    direct = val.features @ layer.weight.T + layer.bias
    standardised = Standardised.of(train.features).apply(val.features) @ layer.chosen.weight.T + layer.chosen.bias
    assert (direct.softmax(1) - standardised.softmax(1)).abs().max() < 1e-5


def test_the_penalty_is_chosen_by_the_loss_on_val_and_the_stronger_one_wins_a_tie() -> None:
    train, val = clouds(3, 120), clouds(3, 300, seed=1)
    wrong = torch.arange(len(train.labels)) % 3 == 0
    train = Rows(train.features, torch.where(wrong, 2 - train.labels, train.labels))
    seen: list[Solution] = []

    layer = fit_layer(train, val, classes=3, on_solution=seen.append)

    assert [one.c for one in seen] == list(GRID)
    losses = [one.val_loss for one in seen]
    assert 0 < int(np.argmin(losses)) < len(GRID) - 1, "the case is too easy to say anything"
    assert layer.chosen is seen[int(np.argmin(losses))]
    nothing = Rows(torch.ones(10, 2), torch.arange(10) % 2)      # no column varies: every penalty gives the same
    assert fit_layer(nothing, nothing, classes=2).chosen.c == GRID[0]


def test_the_same_rows_give_the_same_bits_and_a_warm_start_changes_nothing_visible() -> None:
    train, val = clouds(3, 200), clouds(3, 80, seed=1)
    torch.set_num_threads(1)

    first, second = (fit_layer(train, val, classes=3) for _ in range(2))
    alone = fit_layer(train, val, classes=3, grid=(first.chosen.c,))

    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert (alone.chosen.weight - first.chosen.weight).norm() < 2 * TOLERANCE


def test_the_gradient_is_the_objectives() -> None:
    rows = clouds(3, 50, columns=4)
    problem = Problem(Standardised.of(rows.features).apply(rows.features), rows.labels, 3, None)
    point = torch.randn(problem.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    _, gradient = problem.objective(point, 0.5)

    for place in range(problem.size):
        step = torch.zeros_like(point)
        step[place] = 1e-6
        slope = (problem.objective(point + step, 0.5)[0] - problem.objective(point - step, 0.5)[0]) / 2e-6
        assert slope == pytest.approx(float(gradient[place]), rel=1e-5, abs=1e-6)


def test_separable_pictures_and_a_class_without_one_in_train_are_fitted_all_the_same() -> None:
    labels = torch.tensor([0, 0, 2, 2])
    rows = Rows(torch.tensor([[0.0], [1.0], [9.0], [10.0]]), labels)

    layer = fit_layer(rows, rows, classes=3)

    logits = rows.features @ layer.weight.T + layer.bias
    assert torch.equal(logits.argmax(1), labels)


def test_features_that_are_not_numbers_are_refused_in_one_line() -> None:
    rows = Rows(torch.tensor([[1.0], [float("nan")]]), torch.tensor([0, 1]))

    with pytest.raises(TrainingError, match="values that are not finite; check the weights"):
        fit_layer(rows, rows, classes=2)


def test_a_search_can_be_ended_from_outside() -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        fit_layer(clouds(2, 50), clouds(2, 50), classes=2, check=stop)


def test_a_quadratic_is_solved_exactly() -> None:
    scales = torch.logspace(-2, 4, 30, dtype=torch.float64)

    point, _, norm = minimise(
        lambda at: (float((scales * (at - 1) ** 2).sum()) / 2, scales * (at - 1)),
        torch.zeros(30).double(),
        TOLERANCE,
        lambda: None,
    )

    assert norm <= TOLERANCE
    assert (scales * (point - 1)).norm() <= TOLERANCE


@pytest.mark.parametrize("first", [0, 3])
def test_a_search_that_can_lower_nothing_ends_at_once(first: int) -> None:
    asked: list[float] = []

    def objective(at: torch.Tensor) -> tuple[float, torch.Tensor]:
        asked.append(float(at @ at))      # a bowl; from the `first` question on, its gradient points the wrong way
        return asked[-1] / 2, at * torch.tensor([1.0, 9.0]).double() if len(asked) <= first else -at - 1

    with pytest.raises(TrainingError, match="the logistic fit has a gradient of"):
        minimise(objective, torch.ones(2).double(), TOLERANCE, lambda: None)

    assert len(asked) < 200


@pytest.fixture(autouse=True)
def scikits_words() -> object:
    """What scikit-learn says of its own settings is no part of these tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
