"""The learning rate of every update, by rule, warm-up and plateau."""

import math

import pytest

from training.learning_rate import cosine_of_half_turns, learning_rate, steers
from training.optimise import Plateau, ended_by
from vggcore.schedule import Stage

BATCHES = 4      # iterations per epoch

PLATEAU = {"rule": "plateau", "learning_rate": 0.1, "max_epochs": 10, "drops": 3, "patience": 2}
COSINE = {"rule": "cosine", "learning_rate": 0.1, "max_epochs": 10, "final_learning_rate": 0.01, "drops": 3, "patience": 2}


def rate(settings, epoch: int, batch: int, **plateau) -> float:
    stage = Stage.model_construct(**settings)
    state = Plateau(learning_rate=plateau.pop("base", stage.learning_rate), drops_left=3, patience=2, **plateau)
    return learning_rate(stage, state, epoch * BATCHES + batch, BATCHES)


# fmt: off
RATES = [
    (PLATEAU,                         0, 0, 0.1),
    (PLATEAU,                         9, 3, 0.1),
    (PLATEAU | {"warmup_epochs": 2},  0, 0, 0.1 * 1 / 8),
    (PLATEAU | {"warmup_epochs": 2},  0, 3, 0.1 * 4 / 8),
    (PLATEAU | {"warmup_epochs": 2},  1, 3, 0.1),
    (PLATEAU | {"warmup_epochs": 2},  2, 0, 0.1),
    (COSINE,                          0, 0, 0.1),
    (COSINE,                          5, 0, 0.055),                                              # half way
    (COSINE,                          2, 2, 0.01 + 0.09 * (1 + math.cos(math.pi / 4)) / 2),
    (COSINE,                          9, 3, 0.01 + 0.09 * (1 + math.cos(math.pi * 39 / 40)) / 2),
    (COSINE | {"warmup_epochs": 2},   0, 0, 0.1 * 1 / 8),
    (COSINE | {"warmup_epochs": 2},   1, 3, 0.1),
    (COSINE | {"warmup_epochs": 2},   2, 0, 0.1),
    (COSINE | {"warmup_epochs": 2},   6, 0, 0.055),                                              # half way of the rest
    (COSINE | {"final_learning_rate": 0.0}, 9, 3, 0.1 * (1 + math.cos(math.pi * 39 / 40)) / 2),
]
# fmt: on


@pytest.mark.parametrize(("settings", "epoch", "batch", "expected"), RATES)
def test_the_rate_is_a_function_of_the_epoch_and_the_iteration(settings, epoch, batch, expected):
    assert rate(settings, epoch, batch) == pytest.approx(expected, rel=1e-12)


def test_a_drop_of_the_plateau_rule_lowers_the_rate_and_leaves_a_cosine_alone():
    assert rate(PLATEAU, 5, 1, base=0.01) == 0.01
    assert rate(COSINE, 5, 0, base=0.01) == pytest.approx(0.055)


def test_the_cosine_is_the_cosine():
    for share in [place / 1000 for place in range(1001)]:
        assert cosine_of_half_turns(share) == pytest.approx(math.cos(math.pi * share), abs=4e-16)


def test_a_stall_counts_neither_in_the_warm_up_nor_under_cosine_and_the_best_epoch_is_kept():
    warm = Stage.model_construct(**PLATEAU, warmup_epochs=3)
    cosine = Stage.model_construct(**COSINE)

    assert [steers(warm, epoch) for epoch in range(5)] == [False, False, False, True, True]
    states = {name: Plateau.start(stage) for name, stage in (("warm", warm), ("cosine", cosine))}
    for epoch, val in enumerate([0.5, 0.6, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]):
        for name, stage in (("warm", warm), ("cosine", cosine)):
            states[name] = states[name].after(epoch, val, steers=steers(stage, epoch))

    assert states["warm"].learning_rate == pytest.approx(1e-4) and states["warm"].best_epoch == 1
    assert (states["cosine"].learning_rate, states["cosine"].best, states["cosine"].finished) == (0.1, 0.6, False)
    assert ended_by(states["cosine"], epochs=10, max_epochs=10) == "max_epochs"
