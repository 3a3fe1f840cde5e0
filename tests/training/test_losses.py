"""The loss with smoothed labels, weights of classes and mixed pictures, by hand; and weights that cannot be, refused."""

import dataclasses

import numpy as np
import pytest
import torch

from pipelines.loader import Batch
from tests.training.test_worker import gradients, training, world  # noqa: F401 (a fixture)
from training.losses import check_class_weights, factors_by_class, loss_sum, picture_losses
from vggcore.errors import DatasetError, RecipeError
from vggcore.schedule import Stage

CLASSES = ("ape", "bee", "cat")
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.25, 3.0]])
LABELS = np.array([0, 0, 0, 1, 2, 2])


def stage(**changes) -> Stage:
    return Stage.model_construct(name="A-36", **changes)


def batch(**changes) -> Batch:
    rows = torch.arange(2)
    return Batch(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), rows, np.arange(2), size=2, index=0, **changes)


def log_p(row: int, label: int) -> float:
    return float(LOGITS[row, label] - LOGITS[row].exp().sum().log())


def test_a_smoothed_label_is_spread_over_all_classes():
    found = picture_losses(LOGITS, batch(), stage(label_smoothing=0.3), None)

    for row, label in ((0, 0), (1, 1)):
        spread = sum(log_p(row, other) for other in range(3)) / 3
        assert float(found[row]) == pytest.approx(-0.7 * log_p(row, label) - 0.3 * spread, rel=1e-6)


def test_a_mixed_picture_has_its_share_of_both_losses_each_with_the_factor_of_its_class():
    mixed = batch(mix=torch.tensor([0.25, 1.0]), partner_labels=torch.tensor([2, 0]))
    factors = torch.tensor([0.5, 1.0, 2.0])

    found = picture_losses(LOGITS, mixed, stage(), factors)

    assert float(found[0]) == pytest.approx(-(0.25 * 0.5 * log_p(0, 0) + 0.75 * 2.0 * log_p(0, 2)), rel=1e-6)
    assert float(found[1]) == pytest.approx(-log_p(1, 1), rel=1e-6)
    assert float(loss_sum(LOGITS, mixed, stage(), factors)) == pytest.approx(float(found.sum()), rel=1e-6)


# fmt: off
FACTORS = [
    ("balanced",               [6 / (3 * 3), 6 / (3 * 1), 6 / (3 * 2)]),
    ({"ape": 1.0},             [1.0, 1.0, 1.0]),
    ({"bee": 7.0},             [0.5, 3.5, 0.5]),                # (3 + 7 + 2) / 6 is 2
    ({"ape": 0.2, "cat": 5.0}, [0.2 / (11.6 / 6), 1 / (11.6 / 6), 5 / (11.6 / 6)]),
]
# fmt: on


@pytest.mark.parametrize(("weights", "expected"), FACTORS)
def test_the_factors_of_classes_have_mean_1_over_the_training_pictures(weights, expected):
    found = factors_by_class(stage(class_weights=weights), CLASSES, LABELS)

    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(found[torch.from_numpy(LABELS)].mean()) == pytest.approx(1.0)


def test_without_class_weights_there_are_no_factors():
    assert factors_by_class(stage(), CLASSES, LABELS) is None


def test_weights_for_a_class_that_is_not_there_or_where_there_is_one_class_are_refused():
    with pytest.raises(RecipeError, match=r"stage 'A-36': class_weights has no class 'bees'; did you mean 'bee'\?"):
        check_class_weights([stage(class_weights={"ape": 1.0, "bees": 2.0})], CLASSES, LABELS)
    for settings, key in (({"balance": 0.5}, "balance"), ({"class_weights": "balanced"}, "class_weights")):
        only = f"stage 'A-36': {key} has no effect, since all training pictures are of class 'bee'"
        with pytest.raises(DatasetError, match=only):
            check_class_weights([stage(), stage(**settings)], CLASSES, np.array([1, 1]))
    check_class_weights([stage(class_weights={"bee": 2.0}), stage(balance=1.0)], CLASSES, LABELS)


WEIGHED = {"label_smoothing": 0.1, "mixup": 0.4}


def test_the_gradient_is_that_of_the_sum_of_weighted_losses_over_the_global_batch(world):  # noqa: F811
    part = training(world, **WEIGHED, class_weights={world[2].classes[0]: 3.0})
    one = next(part.loader.epoch(0))
    assert one.mix is not None and len(set(one.partner_labels.tolist())) > 1

    total = part.learner.add_gradient(one, 0)
    found = gradients(part)
    part.learner.optimizer.zero_grad()
    part.learner.net.set_draws(part.stage.seed, 0, one.rows)
    logits = part.learner.net(part.learner.laid_out(one.images))
    p, factors = torch.log_softmax(logits, 1), torch.ones(3)
    factors[0] = 3.0
    factors = factors * 24 / (8 * 3 + 8 + 8)      # 8 pictures of each class
    loss = 0.0
    for row in range(7):
        for label, share in ((one.labels[row], one.mix[row]), (one.partner_labels[row], 1 - one.mix[row])):
            loss = loss - share * factors[label] * (0.9 * p[row, label] + 0.1 * p[row].mean())
    (loss / 7).backward()

    assert float(total) == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(found, gradients(part), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_and_shares_of_workers_add_up_to_the_same_gradient(world, micro_batch):  # noqa: F811
    settings = WEIGHED | {"class_weights": "balanced"}
    whole, worker = (training(world, **settings) for _ in range(2))
    parts = training(world, micro_batch=micro_batch, **settings)
    one = next(whole.loader.epoch(0))

    losses = [float(part.learner.add_gradient(one, 0)) for part in (whole, parts)]
    for start, stop in ((0, 4), (4, 7), (7, 7)):
        columns = {name: getattr(one, name)[start:stop] for name in ("images", "labels", "rows", "mix", "partner_labels")}
        worker.learner.add_gradient(dataclasses.replace(one, **columns), 0)

    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for part in (parts, worker):
        torch.testing.assert_close(gradients(part), gradients(whole), rtol=1e-4, atol=1e-6)
