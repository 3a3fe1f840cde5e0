"""What a net takes over from a parent: A's four convs and FC layers, all of its like, and what fits of published weights."""

import pytest
import torch

from vggcore.errors import RecipeError
from vggcore.initialise import initialise_net
from vggcore.nets import FC_NAMES, NETS, build_net, conv_names
from vggcore.recipe import Features
from vggcore.schedule import Stage
from vggcore.transfer import (
    ParentNet,
    check_given,
    copy_tensors,
    layer_origins,
    new_classes,
    stage_net,
    stage_shapes,
    taken_tensors,
)

CLASSES = ("cat", "cow", "dog", "pig")
STAGE = {
    "name": "child", "net": "D", "scale": (36, 36), "init_from": "A-36", "seed": 1, "head": "paper", "width": 1 / 8, "crop": 32,
    "dropout": 0.5, "initialise": "he", "standardise": False, "flip": True, "colour": 0.1, "global_batch": 4, "momentum": 0.9,
    "weight_decay": 0.0, "learning_rate": 0.1, "drops": 1, "patience": 1, "max_epochs": 1, "precision": "fp32",
    "channels_last": True, "compile": False, "micro_batch": 0, "checkpoint_every": {"seconds": 1.0},
}  # fmt: skip


def stage(**changes) -> Stage:
    return Stage.model_validate({**STAGE, **changes})


def parent(classes=CLASSES, **changes) -> ParentNet:
    return stage_net(stage(**{"net": "A", "name": "A-36", "init_from": None} | changes), classes, name="'A-36'")


def published(net="D", *, crop=32, head=None, classes=None, outputs=1000) -> ParentNet:
    """What published weights look like: width 1, with FC layers or without."""
    shapes = stage_shapes(stage(net=net, width=1.0, crop=crop), outputs)
    kept = {name: shape for name, shape in shapes.items() if head or name.startswith("features")}
    return ParentNet("weights:somewhere/vgg", net, head, None, classes, kept, published=True)


def weights_of(one: Stage, name: str) -> dict[str, torch.Tensor]:
    net = build_net(one.net, classes=len(CLASSES), **one.net_settings)
    initialise_net(net, "he", width=one.width, seed=1, name=name)
    return net.state_dict()


@pytest.mark.parametrize("net", [net for net in NETS if net != "A"])
def test_a_deeper_net_takes_four_convs_by_place_and_three_fc_layers_from_a(net):
    child = stage(net=net)
    source = weights_of(stage(net="A"), "A-36")
    built = build_net(net, classes=len(CLASSES), **child.net_settings)
    initialise_net(built, "he", width=1 / 8, seed=1, name="child")
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}

    taken = taken_tensors(child, CLASSES, parent())
    copy_tensors(built, source, taken)

    expected = {f"{fc}.{kind}": f"{fc}.{kind}" for fc in FC_NAMES["paper"] for kind in ("weight", "bias")}
    for place in ("conv1_1", "conv2_1", "conv3_1", "conv3_2"):
        for kind in ("weight", "bias"):
            expected[f"{conv_names(net)[place]}.{kind}"] = f"{conv_names('A')[place]}.{kind}"
    assert taken == expected and len(taken) == 14
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, source[expected[name]] if name in expected else before[name]), name


def test_the_copied_convs_of_d_stand_at_the_papers_places():
    taken = taken_tensors(stage(), CLASSES, parent())

    convs = {to: source for to, source in taken.items() if to.startswith("features") and to.endswith("weight")}
    assert convs == {
        "features.0.weight": "features.0.weight",
        "features.5.weight": "features.3.weight",
        "features.10.weight": "features.6.weight",
        "features.12.weight": "features.8.weight",
    }


def test_the_compact_head_gives_its_two_fc_layers():
    taken = taken_tensors(stage(net="B", head="compact"), CLASSES, parent(head="compact"))

    assert len(taken) == 12 and {"classifier.1.weight", "classifier.4.weight"} < set(taken)


def test_a_net_of_the_same_configuration_takes_every_tensor():
    taken = taken_tensors(stage(), CLASSES, parent(net="D"))

    assert taken == {name: name for name in stage_shapes(stage(), len(CLASSES))}


def test_from_another_head_come_the_convs_alone():
    linear = stage(head="linear", features=Features(groups=(2, 3), scales=(36,)))

    taken = taken_tensors(linear, CLASSES, parent(net="D"))
    other_groups = taken_tensors(linear, CLASSES, parent(net="D", head="linear", features=Features(groups=(3,), scales=(36,))))
    same = taken_tensors(linear, CLASSES, parent(net="D", head="linear", features=Features(groups=(2, 3), scales=(48,))))

    convs = {f"{module}.{kind}" for module in conv_names("D", 3).values() for kind in ("weight", "bias")}
    assert set(taken) == set(other_groups) == convs
    assert set(same) == convs | {"classifier.0.weight", "classifier.0.bias"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": CLASSES[1:]}, r"its classifier\.6\.weight is \(3, 512\), expected \(4, 512\).*same crop and classes"),
        ({"crop": 64}, r"its classifier\.0\.weight is \(512, 256\), expected \(512, 64\).*same crop"),
        ({"width": 1 / 16}, r"its features\.0\.weight is \(4, 3, 3, 3\), expected \(8, 3, 3, 3\).*same width"),
    ],
)
@pytest.mark.parametrize("net", ["A", "D"])
def test_a_stage_that_does_not_fit_is_refused(settings, words, net):
    with pytest.raises(RecipeError, match=f"^stage 'child': net {net} from 'A-36': {words}"):
        taken_tensors(stage(net=net), CLASSES, parent(**settings))


def test_published_weights_give_every_conv_of_equal_place_and_shape():
    to_d = taken_tensors(stage(width=1.0), CLASSES, published("D"))
    to_c = taken_tensors(stage(width=1.0, net="C"), CLASSES, published("D"))
    to_e = taken_tensors(stage(width=1.0, net="E"), CLASSES, published("B"))

    assert set(to_d) == {f"{module}.{kind}" for module in conv_names("D").values() for kind in ("weight", "bias")}
    assert len(to_c) == 2 * 10            # C's third convs of groups 3 to 5 are 1x1: of another shape
    own, theirs = conv_names("E"), conv_names("B")
    assert to_e == {f"{own[conv]}.{kind}": f"{theirs[conv]}.{kind}" for conv in theirs for kind in ("weight", "bias")}


def test_published_fc_layers_are_taken_where_they_fit_and_the_last_for_equal_classes_in_equal_order():
    def layers(crop, **settings):
        child = stage(width=1.0, crop=crop, scale=(crop, crop))
        taken = taken_tensors(child, CLASSES, published("D", head="paper", **settings))
        return {name for name in taken if name.startswith("classifier") and name.endswith("weight")}

    assert layers(32) == {"classifier.0.weight", "classifier.3.weight"}
    assert layers(64) == {"classifier.3.weight"}             # FC-1 sees 2x2 places, the weights' 1x1
    assert layers(32, classes=CLASSES, outputs=4) == {f"classifier.{n}.weight" for n in (0, 3, 6)}
    assert layers(32, classes=CLASSES[::-1], outputs=4) == {"classifier.0.weight", "classifier.3.weight"}


def test_published_weights_of_another_width_are_refused_in_one_line():
    with pytest.raises(RecipeError, match=r"no conv fits: its first is \(64, 3, 3, 3\), expected \(8, 3, 3, 3\); .* width 1$"):
        taken_tensors(stage(), CLASSES, published("D"))


def test_random_layers_can_be_neither_frozen_nor_below_a_logistic_fit():
    def check(**changes):
        child = stage(**changes)
        check_given(child, layer_origins(child, taken_tensors(child, CLASSES, parent()), parent()))

    linear = {"head": "linear", "features": Features(groups=(1,), scales=(36,)), "fit": "logistic"}

    check(freeze=0)
    with pytest.raises(RecipeError, match=r"conv1_2 of net D is not among what 'A-36' gives .*freeze = 1 keeps it.*less"):
        check(freeze=1)
    check(net="A", freeze=5)
    with pytest.raises(RecipeError, match=r"conv1_2 of net D .* fit = \"logistic\" trains the last layer alone"):
        check(**linear)


@pytest.mark.parametrize(
    "same",
    [{}, {"head": "compact"}, {"head": "linear", "features": Features(groups=(2, 3), scales=(36,))}],
    ids=["paper", "compact", "linear"],
)
def test_rows_of_old_classes_are_kept_and_those_of_new_ones_are_left_to_be_made(same):
    child, old = stage(**same), parent(net="D", classes=CLASSES[:2], **same)
    source = {name: torch.full(shape, 7.0) for name, shape in old.shapes.items()}
    built = build_net("D", classes=len(CLASSES), **child.net_settings)
    initialise_net(built, "he", width=1 / 8, seed=1, name="child")
    last = FC_NAMES[child.head][-1]
    before = built.get_submodule(last).weight.detach().clone()

    taken = taken_tensors(child, CLASSES, old)
    copy_tensors(built, source, taken)

    after = built.get_submodule(last).weight.detach()
    assert (after[:2] == 7).all() and torch.equal(after[2:], before[2:])
    assert set(taken) == set(stage_shapes(child, len(CLASSES)))
    assert new_classes(child, CLASSES, old) == CLASSES[2:]
    origins = layer_origins(child, taken, old, new_classes(child, CLASSES, old))
    assert [origin.added for origin in origins if origin.module == last] == [CLASSES[2:]]
    assert all(origin.added == () for origin in origins if origin.module != last)


def test_from_another_head_no_row_comes_so_none_is_new():
    assert new_classes(stage(), CLASSES, parent(classes=CLASSES[:2], head="compact")) == ()
    assert new_classes(stage(), CLASSES, parent()) == ()
    assert new_classes(stage(), CLASSES, published(classes=CLASSES[:2], head="paper")) == ()
