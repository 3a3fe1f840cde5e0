"""The learning-rate rule on made-up accuracy curves (Sec. 3.1)."""

from copy import deepcopy

import pytest
import torch

from pipelines.plan import batches_per_epoch
from training.optimise import Plateau, check_layouts, ended_by, load_moments, make_optimizer, set_learning_rate
from vggcore.recipe import Train
from vggcore.schedule import Stage


def run_rule(curve: list[float], *, patience: int = 2, drops: int = 3) -> list[Plateau]:
    rule = Plateau(learning_rate=1e-2, drops_left=drops, patience=patience)
    states = []
    for epoch, val_top1 in enumerate(curve):
        rule = rule.after(epoch, val_top1)
        states.append(rule)
    return states


def train_on(curve: list[float], *, max_epochs: int, patience: int = 2, drops: int = 3) -> tuple[list[float], str | None]:
    """The learning rate of each epoch that is trained, and what ended the stage; `curve` is the val top-1 to come."""
    rule = Plateau(learning_rate=1e-2, drops_left=drops, patience=patience)
    rates = []
    while (end := ended_by(rule, epochs=len(rates), max_epochs=max_epochs)) is None:
        rates.append(rule.learning_rate)
        rule = rule.after(len(rates) - 1, curve[len(rates) - 1])
    return rates, end


def test_gains_keep_the_rate():
    states = run_rule([0.1, 0.2, 0.3, 0.4])

    assert {state.learning_rate for state in states} == {1e-2}
    assert states[-1].best == 0.4 and states[-1].best_epoch == 3


def test_an_equal_accuracy_is_no_gain():
    states = run_rule([0.5, 0.5, 0.5], patience=2)

    assert [state.stalled for state in states] == [0, 1, 0]
    assert states[-1].learning_rate == pytest.approx(1e-3)


def test_a_gain_resets_the_counter():
    states = run_rule([0.5, 0.4, 0.6, 0.5, 0.5], patience=2)

    assert [state.stalled for state in states] == [0, 1, 0, 1, 0]
    assert [state.drops_left for state in states] == [3, 3, 3, 3, 2]


def test_three_divisions_then_the_next_stall_ends_the_stage():
    states = run_rule([0.5] + [0.4] * 8, patience=2, drops=3)

    assert [state.learning_rate for state in states[::2]] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5, 1e-5])
    assert [state.finished for state in states] == [False] * 8 + [True]


def test_without_drops_the_first_stall_ends_the_stage():
    assert run_rule([0.5, 0.5, 0.5], patience=2, drops=0)[-1].finished


def test_a_late_gain_after_a_drop_does_not_bring_the_rate_back():
    states = run_rule([0.5, 0.5, 0.5, 0.9, 0.9], patience=2)

    assert [state.learning_rate for state in states] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-3])
    assert states[-1].best == 0.9 and states[-1].best_epoch == 3


def test_a_loss_of_accuracy_is_measured_against_the_best_not_against_the_epoch_before():
    states = run_rule([0.6, 0.4, 0.5, 0.55, 0.6], patience=9)

    assert [state.stalled for state in states] == [0, 1, 2, 3, 4]


def test_a_stage_that_keeps_gaining_ends_at_max_epochs_with_its_first_rate():
    rates, end = train_on([place / 100 for place in range(100)], max_epochs=5)

    assert (rates, end) == ([1e-2] * 5, "max_epochs")


def test_a_stage_stops_in_the_stall_after_its_last_drop_and_trains_no_epoch_more():
    rates, end = train_on([0.5] + [0.5] * 99, max_epochs=74, patience=5, drops=3)

    assert rates == pytest.approx([1e-2] * 6 + [1e-3] * 5 + [1e-4] * 5 + [1e-5] * 5)
    assert end == "plateau"


def test_max_epochs_also_cuts_a_stall_short():
    rates, end = train_on([0.5] * 100, max_epochs=7, patience=5, drops=3)

    assert rates == pytest.approx([1e-2] * 6 + [1e-3])
    assert end == "max_epochs"


def test_iterations_are_the_papers_370_thousand_in_74_epochs_of_imagenet_at_batch_256():
    defaults = Train()

    iterations = batches_per_epoch(1_281_167, defaults.global_batch) * defaults.max_epochs      # ILSVRC-2012's training set

    assert (defaults.global_batch, defaults.max_epochs, defaults.drops) == (256, 74, 3)         # Sec. 3.1
    assert iterations == 5005 * 74
    assert iterations // 1000 == 370                                                            # "370K iterations"


def test_weight_decay_and_momentum_reach_the_biases_too():
    bias = torch.nn.Parameter(torch.ones(1))
    stage = Stage.model_construct(learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    optimizer = make_optimizer([("classifier.0.bias", bias)], stage)

    for _ in range(2):
        bias.grad = torch.zeros(1)
        optimizer.step()

    # v1 = 0.5 * 1; w1 = 1 - 0.05; v2 = 0.9 * 0.5 + 0.5 * 0.95; w2 = w1 - 0.1 * v2
    assert bias.item() == pytest.approx(0.95 - 0.1 * (0.45 + 0.475))


@pytest.mark.parametrize(("usual", "sgd"), [("fused", "foreach"), ("fused", "loop"), ("foreach", "fused")])
def test_the_three_ways_to_update_are_the_same_update_and_go_on_from_each_others_state(usual, sgd):
    stage = Stage.model_construct(learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    steps = [torch.randn(2, 33, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    weights = {way: torch.nn.Parameter(torch.ones(33)) for way in (usual, sgd)}
    optimizers = {way: make_optimizer([("w", weight)], stage, way) for way, weight in weights.items()}

    for number, gradients in enumerate(steps):
        if number == 2:    # a checkpoint of the usual way, taken up
            load_moments(optimizers[sgd], deepcopy(optimizers[usual].state_dict()))
            assert bool(optimizers[sgd].param_groups[0]["fused"]) is (sgd == "fused")
        for way, weight in weights.items():
            weight.grad = gradients[0].clone()
            optimizers[way].step()

    torch.testing.assert_close(weights[sgd], weights[usual], rtol=1e-6, atol=1e-6)


def test_a_checkpoints_momentum_is_laid_out_as_the_weights_are_now():
    stage = Stage.model_construct(learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    first, gradient = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))

    def step(optimizer, weight):
        weight.grad = torch.empty_like(weight).copy_(gradient)
        check_layouts(optimizer)
        optimizer.step()

    plain = torch.nn.Parameter(first.clone())
    ours = torch.nn.Parameter(first.contiguous(memory_format=torch.channels_last))
    optimizers = [make_optimizer([("w", plain)], stage, "foreach"), make_optimizer([("w", ours)], stage)]
    step(optimizers[0], plain)
    ours.data.copy_(plain.data)
    set_learning_rate(optimizers[0], 0.01)           # after a drop
    load_moments(optimizers[1], deepcopy(optimizers[0].state_dict()))
    assert optimizers[1].param_groups[0]["lr"] == 0.01
    assert optimizers[1].param_groups[0]["fused"] is True
    for optimizer, weight in zip(optimizers, (plain, ours), strict=True):
        step(optimizer, weight)

    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_a_gradient_that_is_laid_out_otherwise_than_its_weights_is_not_walked_over():
    weight = torch.nn.Parameter(torch.zeros(5, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer = make_optimizer([("w", weight)], Stage.model_construct(learning_rate=0.1, momentum=0.9, weight_decay=0.5))
    weight.grad = torch.zeros(5, 4, 3, 3)

    with pytest.raises(AssertionError, match="the wrong weights"):
        check_layouts(optimizer)


@pytest.mark.parametrize("shape", [(4, 4, 1, 1), (2, 1, 3, 3), (1, 1, 3, 3)])     # net C's third convs; nets of one channel
def test_the_stride_of_a_dimension_of_one_place_says_nothing_of_where_weights_lie(shape):
    weight = torch.nn.Parameter(torch.empty(shape, memory_format=torch.channels_last))
    optimizer = make_optimizer([("w", weight)], Stage.model_construct(learning_rate=0.1, momentum=0.9, weight_decay=0.5))
    weight.grad = torch.zeros(shape)
    assert weight.grad.stride() != weight.stride()

    check_layouts(optimizer)
