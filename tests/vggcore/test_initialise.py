"""First weights: their distribution, and their sameness on every machine."""

import math

import numpy as np
import pytest
import torch

from vggcore.counter_hash import hash64
from vggcore.initialise import initialise_net, normals16
from vggcore.nets import build_net, conv_names

SMALL = {"classes": 4, "width": 1 / 8, "crop": 32}


# Weights as every machine must draw them, in hexadecimal.
PINNED_HE = ["0x1.41ede60000000p-3", "-0x1.8b1dc80000000p-2", "-0x1.079c880000000p-1", "0x1.773f8c0000000p-2"]
PINNED_HE_LAST = ["0x1.780c000000000p-5", "-0x1.9c6b000000000p-4"]
PINNED_GLOROT = ["-0x1.9870c40000000p-3", "-0x1.b3c7d60000000p-4", "0x1.f6e0300000000p-5", "0x1.0fa8580000000p-3"]


def weights(how="he", *, net="A", seed=1, name="A-256", width=1 / 8, **settings):
    """The state dict of a fresh small net."""
    module = build_net(net, **{**SMALL, **settings, "width": width})
    initialise_net(module, how, width=width, seed=seed, name=name)
    return module.state_dict()


def deviation(tensor):
    return tensor.double().std().item()


def test_the_papers_weights_have_deviation_0_01_and_biases_0():
    state = weights("paper", width=1.0)

    for name, tensor in state.items():
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            error = 0.01 / math.sqrt(2 * tensor.numel())
            assert abs(deviation(tensor) - 0.01) < 4 * error, name
            assert abs(tensor.double().mean().item()) < 4 * 0.01 / math.sqrt(tensor.numel()), name


def test_the_papers_weights_of_narrow_nets_are_larger_but_in_the_first_conv():
    state = weights("paper", width=1 / 4)

    assert deviation(state["features.0.weight"]) == pytest.approx(0.01, rel=0.2)
    assert deviation(state["features.8.weight"]) == pytest.approx(0.02, rel=0.03)
    assert deviation(state["classifier.3.weight"]) == pytest.approx(0.02, rel=0.01)


def test_he_and_glorot_scale_with_the_fans():
    he, glorot = weights("he"), weights("glorot")

    conv, linear = "features.6.weight", "classifier.3.weight"     # 16 -> 32 channels of 3x3, 512 -> 512 units
    assert deviation(he[conv]) == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.03)
    assert deviation(he[linear]) == pytest.approx(math.sqrt(2 / 512), rel=0.01)
    for name, fans in ((conv, (16 + 32) * 9), (linear, 1024)):
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < glorot[name].abs().max().item() <= bound
        assert deviation(glorot[name]) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not he["features.8.bias"].any()
    assert not glorot["features.8.bias"].any()


def share_beyond(bound):
    """How often the sum of 12 uniforms less 6 lies beyond -bound or bound: Irwin and Hall's distribution."""
    below = sum((-1) ** k * math.comb(12, k) * (6 - bound - k) ** 12 for k in range(math.floor(6 - bound) + 1))
    return 2 * below / math.factorial(12)


def test_normal_weights_spread_as_twelve_uniforms_do():
    draws = weights("he")["classifier.3.weight"].double().flatten() / math.sqrt(2 / 512)

    for bound, normal in ((1.0, 0.3173), (2.0, 0.0455), (3.0, 0.0027)):
        share = share_beyond(bound)
        assert share == pytest.approx(normal, abs=0.005)
        error = math.sqrt(share * (1 - share) / len(draws))
        assert abs((draws.abs() > bound).double().mean().item() - share) < 4 * error


def test_a_normal_draw_is_the_sum_of_twelve_16_bit_uniforms_less_6():
    index = np.arange(70_000, 70_050, dtype=np.uint64)

    draws = normals16((7, "words"), index)

    for place, draw in zip(index.tolist(), draws.tolist(), strict=True):
        words = [int(hash64(7, "words", number, place)) for number in range(3)]
        uniforms = [((word >> shift & 0xFFFF) + 0.5) / 65536 for word in words for shift in (0, 16, 32, 48)]
        assert draw == sum(uniforms) - 6


def test_weights_are_the_same_on_every_machine_for_ever():
    he, glorot = weights("he"), weights("glorot")

    assert [value.hex() for value in he["features.0.weight"].flatten()[:4].tolist()] == PINNED_HE
    assert [value.hex() for value in he["classifier.3.weight"][-1, -2:].tolist()] == PINNED_HE_LAST
    assert [value.hex() for value in glorot["features.0.weight"].flatten()[:4].tolist()] == PINNED_GLOROT


@pytest.mark.parametrize("other", [{"seed": 2}, {"name": "B-256"}])
def test_another_seed_or_stage_has_other_weights(other):
    first, second = weights()["classifier.3.weight"], weights(**other)["classifier.3.weight"]

    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(first.numel())


def test_layers_of_one_shape_have_draws_of_their_own():
    state = weights(net="E")

    first, second = state[conv_names("E")["conv5_1"] + ".weight"], state[conv_names("E")["conv5_2"] + ".weight"]
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(first.numel())


def test_weights_are_the_same_in_channels_last():
    net = build_net("A", **SMALL).to(memory_format=torch.channels_last)

    initialise_net(net, "he", width=1 / 8, seed=1, name="A-256")

    plain = weights("he")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in net.state_dict().items())
