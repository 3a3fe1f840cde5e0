"""The nets of Table 1: sizes to the last digit, torchvision's names, and dropout that no worker's share can change."""

import pytest
import torch
import torchvision
from torch import nn

from vggcore.initialise import initialise_net
from vggcore.nets import (
    FC_NAMES,
    NETS,
    HashedDropout,
    build_net,
    conv_block,
    conv_names,
    layer_table,
    linear_inputs,
    mix32,
    parameter_sizes,
)
from vggcore.recipe import Features

# PAPER: parameters and multiply-adds (in thousand millions) at 224 pixels and 1000 classes.
# fmt: off
PAPER_SIZES = [
    ("A",     132_863_336,  "7.61"),
    ("A-LRN", 132_863_336,  "7.61"),
    ("B",     133_047_848, "11.31"),
    ("C",     133_638_952, "11.77"),
    ("D",     138_357_544, "15.47"),
    ("E",     143_667_240, "19.63"),
]
WEIGHT_LAYERS = [("A", 11), ("A-LRN", 11), ("B", 13), ("C", 16), ("D", 16), ("E", 19)]   # Table 1
TORCHVISION = [("A", "vgg11"), ("B", "vgg13"), ("D", "vgg16"), ("E", "vgg19")]
# fmt: on


# Kept units (1) of rows 0, 1 and 255 as every machine must draw them.
PINNED_MASKS = ["010110001011101111011000", "100111110000000100100010", "010001010000000100100100"]


def dropped(*, rows, units=64, probability=0.5, seed=3, iteration=8, layer=0):
    """Where a dropout zeroes: (rows, units) bool."""
    dropout = HashedDropout(probability, layer).train()
    dropout.set_draws(seed, iteration, torch.as_tensor(rows))
    return dropout(torch.ones(len(rows), units)) == 0


def reference_mix32(bits):
    """lowbias32 as published, in Python's unbounded integers."""
    bits ^= bits >> 16
    bits = bits * 0x7FEB352D % 2**32
    bits ^= bits >> 15
    bits = bits * 0x846CA68B % 2**32
    return bits ^ bits >> 16


@pytest.mark.parametrize(("net", "parameters", "gigamacs"), PAPER_SIZES)
def test_each_net_has_the_papers_parameters_and_multiply_adds(net, parameters, gigamacs):
    rows = layer_table(net, classes=1000)

    assert sum(row.parameters for row in rows) == parameters
    assert f"{sum(row.macs for row in rows) / 1e9:.2f}" == gigamacs


@pytest.mark.parametrize(("net", "layers"), WEIGHT_LAYERS)
def test_each_net_has_the_weight_layers_that_name_it(net, layers):
    rows = layer_table(net, classes=1000)

    assert sum(row.parameters > 0 for row in rows) == layers


def test_the_layer_table_of_a_lrn_reads_like_its_column_of_table_1():
    rows = layer_table("A-LRN", classes=1000)

    kinds = [row.kind for row in rows if row.kind not in ("relu", "dropout")]
    # fmt: off
    assert kinds == [
        "conv3-64", "LRN", "maxpool",
        "conv3-128", "maxpool",
        "conv3-256", "conv3-256", "maxpool",
        "conv3-512", "conv3-512", "maxpool",
        "conv3-512", "conv3-512", "maxpool",
        "FC-4096", "FC-4096", "FC-1000",
    ]
    # fmt: on
    assert rows[0].output == (64, 224, 224)
    assert [row.output for row in rows if row.kind == "maxpool"][-1] == (512, 7, 7)
    assert rows[-1].name == "classifier.6"
    assert rows[-1].output == (1000,)


def test_only_c_has_1x1_convs_and_only_as_the_third_of_groups_3_4_and_5():
    ones = {net: [row.name for row in layer_table(net, classes=2) if row.kind.startswith("conv1-")] for net in NETS}

    places = conv_names("C")
    assert ones.pop("C") == [places["conv3_3"], places["conv4_3"], places["conv5_3"]]
    assert not any(ones.values())


@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("head", list(FC_NAMES))
def test_the_layer_table_is_that_of_the_net_that_is_built(net, head):
    settings = {"classes": 5, "head": head, "width": 1 / 16, "crop": 64}
    modules = dict(build_net(net, **settings).named_modules())

    rows = layer_table(net, **settings)

    assert sum(parameter_sizes(net, **settings).values()) == sum(row.parameters for row in rows)
    built = [name for name, module in modules.items() if list(module.parameters(recurse=False))]
    convs = conv_names(net, last_group=4 if head == "linear" else 5)      # a linear head pools groups 3 and 4
    assert [row.name for row in rows if row.parameters] == built == [*convs.values(), *FC_NAMES[head]]
    for row in rows:
        assert row.parameters == sum(parameter.numel() for parameter in modules[row.name].parameters())


def test_width_scales_convs_and_hidden_units_but_neither_classes_nor_the_compact_heads_120():
    narrow = [row.output for row in layer_table("A", classes=7, width=1 / 8, crop=96) if row.parameters]
    narrowest = [row.output for row in layer_table("A", classes=7, width=1e-4, crop=32) if row.parameters]
    compact = layer_table("A", classes=7, head="compact", width=1 / 8, crop=96)

    assert [shape[0] for shape in narrow] == [8, 16, 32, 32, 64, 64, 64, 64, 512, 512, 7]
    assert [shape[0] for shape in narrowest] == [1] * 10 + [7]
    assert [row.output for row in compact][-6:] == [(64, 1, 1), (64,), (120,), (120,), (120,), (7,)]
    assert [row.kind for row in compact][-6:] == ["avgpool", "dropout", "FC-120", "relu", "dropout", "FC-7"]


@pytest.mark.parametrize(("repeats", "side"), [(1, 3), (2, 5), (3, 7)])
def test_a_stack_of_two_3x3_convs_sees_5x5_pixels_and_three_see_7x7(repeats, side):
    convs = nn.Sequential(*conv_block(1, 4, repeats)[:-1])
    for module in convs[::2]:
        nn.init.constant_(module.weight, 1.0)
        nn.init.zeros_(module.bias)
    picture = torch.ones(1, 1, 15, 15, requires_grad=True)

    convs(picture)[0, 0, 7, 7].backward()

    first = 7 - side // 2
    seen = torch.zeros(15, 15, dtype=torch.bool)
    seen[first : first + side, first : first + side] = True
    assert torch.equal(picture.grad[0, 0] != 0, seen)


def test_lrn_is_krizhevskys_printed_formula():
    block = conv_block(3, 8, 1, lrn=True)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1)) * 50

    found = block[1](x.clone())

    a = x.clamp(min=0)
    wanted = torch.stack(
        [a[:, i] / (2 + 1e-4 * (a[:, max(0, i - 2) : i + 3] ** 2).sum(dim=1)) ** 0.75 for i in range(8)], dim=1
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("net", "theirs"), TORCHVISION)
def test_torchvisions_weights_load_unchanged_and_give_the_same_logits(net, theirs):
    published = torchvision.models.get_model(theirs, weights=None, init_weights=False).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    ours = build_net(net, classes=1000).eval()

    ours.load_state_dict(published.state_dict(), strict=True, assign=True)

    with torch.inference_mode():
        assert torch.equal(ours(images), published(images))


def test_the_compact_head_averages_the_feature_map():
    net = build_net("A", classes=3, head="compact", width=1 / 16, crop=64).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))

    with torch.inference_mode():
        logits, by_hand = net(images), net.classifier(net.features(images).mean(dim=(2, 3)))

    torch.testing.assert_close(logits, by_hand)
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("workers", [2, 3, 4, 7])
def test_a_pictures_dropout_is_the_same_in_whatever_workers_share_it_comes(workers):
    rows = torch.arange(16)

    whole = dropped(rows=rows)
    shares = [dropped(rows=share) for share in rows.tensor_split(workers)]

    assert torch.equal(torch.cat(shares), whole)


def test_dropout_of_a_whole_net_does_not_depend_on_the_share():
    net = build_net("A", classes=3, width=1 / 8, crop=32, dropout=0.5).train()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    images, rows = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.arange(6)

    net.set_draws(5, 9, rows)
    whole = net(images)
    net.set_draws(5, 9, rows[4:])
    share = net(images[4:])
    net.set_draws(5, 10, rows)
    other_iteration = net(images)

    torch.testing.assert_close(share, whole[4:])
    assert not torch.allclose(other_iteration, whole)


def test_dropout_is_the_published_hash_and_stays_so_for_ever():
    words = [0, 1, 2, 12345, 2**31, 2**32 - 1]

    mixed = mix32(torch.tensor(words)).tolist()

    assert mixed == [reference_mix32(word) for word in words]
    kept = ["".join("10"[int(zero)] for zero in row) for row in dropped(rows=[0, 1, 255], units=24)]
    assert kept == PINNED_MASKS


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_dropout_keeps_the_share_it_should_and_makes_up_for_the_rest(probability):
    dropout = HashedDropout(probability, layer=1).train()
    dropout.set_draws(2**62 + 5, 370_000, torch.arange(256))

    units = dropout(torch.ones(256, 1024))

    deviation = (probability * (1 - probability) / units.numel()) ** 0.5
    assert abs((units != 0).double().mean().item() - (1 - probability)) < 4 * deviation
    torch.testing.assert_close(units[units != 0].unique(), torch.tensor([1 / (1 - probability)]))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"seed": 3 + 2**32},
        {"iteration": 9},
        {"layer": 1},
        {"rows": range(256, 512)},
        {"rows": range(1, 257)},
    ],
    ids=str,
)
def test_dropout_of_another_seed_iteration_layer_or_row_is_another(other):
    first = dropped(rows=range(256), units=1024)

    second = dropped(**{"rows": range(256), "units": 1024, **other})

    agreement = (first == second).double().mean().item()
    assert abs(agreement - 0.5) < 4 * 0.5 / first.numel() ** 0.5
    shifted = (first[:, 1:] == second[:, :-1]).double().mean().item()
    assert abs(shifted - 0.5) < 4 * 0.5 / first.numel() ** 0.5


def test_dropout_passes_gradients_of_kept_units_only():
    dropout = HashedDropout(0.5, layer=0).train()
    dropout.set_draws(0, 0, torch.arange(4))
    units = torch.ones(4, 32, requires_grad=True)

    dropped_units = dropout(units)
    dropped_units.sum().backward()

    assert torch.equal(units.grad, dropped_units.detach())


def test_dropout_leaves_units_alone_in_eval_mode_and_at_probability_0():
    units = torch.randn(3, 5)

    assert HashedDropout(0.5, layer=0).eval()(units) is units
    assert HashedDropout(0.0, layer=0).train()(units) is units


def test_training_without_draws_or_with_anothers_is_refused():
    net = build_net("A", classes=3, width=1 / 16, crop=32).train()

    with pytest.raises(AssertionError, match=r"needs draws: call net\.set_draws"):
        net(torch.zeros(2, 3, 32, 32))
    net.set_draws(0, 0, torch.arange(3))
    with pytest.raises(AssertionError, match="draws are for another batch"):
        net(torch.zeros(2, 3, 32, 32))


def test_a_net_compiles_as_one_graph_and_not_anew_at_each_iteration():
    net = build_net("A", classes=3, width=1 / 16, crop=32).train()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    images, graphs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2)), []
    compiled = torch.compile(net, fullgraph=True, backend=lambda graph, _inputs: graphs.append(graph) or graph.forward)

    for iteration in range(3):
        net.set_draws(1, iteration, torch.arange(4))
        torch.testing.assert_close(compiled(images), net(images))

    assert len(graphs) == 1


@pytest.mark.parametrize(("pool", "blocks"), [("average", 1), ("maximum", 1), ("both", 2)])
def test_a_linear_head_sees_each_groups_output_pooled_over_all_places(pool, blocks):
    features = Features(groups=(2, 3), pool=pool, scales=(40,))
    net = build_net("A", classes=3, head="linear", features=features, width=1 / 16, crop=32).eval()
    initialise_net(net, "he", width=1 / 16, seed=0, name="A")
    images = torch.randn(2, 3, 40, 56)

    with torch.inference_mode():
        found = net.pooled(images)
        second = net.features[:6](images)
        third = net.features(images)

    assert list(net.features)[-1].__class__ is nn.MaxPool2d and third.shape[1:] == (16, 5, 7)
    parts = []
    for maps in (second, third):
        parts += [maps.mean((2, 3))] if pool != "maximum" else []
        parts += [maps.amax((2, 3))] if pool != "average" else []
    assert found.shape == (2, blocks * (8 + 16)) == (2, linear_inputs(features, 1 / 16))
    assert torch.equal(found, torch.cat(parts, 1))
    with torch.inference_mode():
        assert torch.equal(net(images), net.classifier(found))


def test_a_linear_head_of_several_scales_has_a_weight_for_each_scales_values():
    net = build_net("D", classes=3, head="linear", features=Features(groups=(4,), scales=(64, 96)), width=1 / 16)

    assert net.classifier[0].in_features == 2 * 2 * 32
    assert [name for name, _ in net.named_parameters()][-2:] == ["classifier.0.weight", "classifier.0.bias"]
