"""Which tensors of a stage's net come from another net, by place and shape, and how they get there. No file is read here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vggcore.class_order import added_classes
from vggcore.errors import RecipeError
from vggcore.nets import FC_NAMES, Vgg, conv_names, net_modules
from vggcore.recipe import Features, Head, NetName
from vggcore.recipe_checks import same_features
from vggcore.schedule import Stage

Shapes = Mapping[str, tuple[int, ...]]

# Sec. 3.1: "the first four convolutional layers and the last three fully-connected layers" of A, matched by their place
# in the group: by ordinal they cannot fit (64 -> 128 channels onto 64 -> 64).
COPIED_CONVS = ("conv1_1", "conv2_1", "conv3_1", "conv3_2")
KINDS = ("weight", "bias")


@dataclass(frozen=True)
class ParentNet:
    """A net that weights can be taken from: a stage's, trained or yet to be, or that of published weights.

    name: as a message names it, "'A-72'" or "weights:keras/vgg16". head: None where it has no FC layers.
    """

    name: str
    net: NetName
    head: Head | None
    features: Features | None
    classes: tuple[str, ...] | None
    shapes: Shapes
    published: bool


@dataclass(frozen=True)
class LayerOrigin:
    """Where a layer's first weights come from; layer: its place, "conv3_2" or "fc1"; source: None for random weights.

    added: classes whose rows of the last layer the source does not give.
    """

    layer: str
    module: str
    source: str | None
    added: tuple[str, ...] = ()


def stage_shapes(stage: Stage, classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a stage's net; allocates nothing."""
    with torch.device("meta"):
        net = net_modules(stage.net, classes=classes, **stage.net_settings)
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def stage_net(stage: Stage, classes: Sequence[str], *, name: str) -> ParentNet:
    """A stage of this project as what others start from."""
    return ParentNet(
        name=name,
        net=stage.net,
        head=stage.head,
        features=stage.features,
        classes=tuple(classes),
        shapes=stage_shapes(stage, len(classes)),
        published=False,
    )


def layer_modules(stage: Stage) -> dict[str, str]:
    """The module of each layer of a stage's net by its place: convs as in conv_names, then "fc1", "fc2", ... in order."""
    last_group = max(stage.features.groups) if stage.features else 5
    heads = {f"fc{number}": module for number, module in enumerate(FC_NAMES[stage.head], start=1)}
    return conv_names(stage.net, last_group) | heads


def taken_tensors(stage: Stage, classes: Sequence[str], parent: ParentNet) -> dict[str, str]:
    """The tensors of a stage's net that its parent gives, each with its name in the parent.

    From published weights: every conv of equal place and shape; with the paper's head also FC-1 and FC-2 where they fit,
    and the last layer where the classes are the same in the same order. From a stage: of the same net every conv, of
    another the four of Sec. 3.1; with the same head also its FC layers; of the last one as many rows as it has classes,
    which are the child's first. Raises RecipeError where nothing fits, or where what a stage has to give has another shape
    (width, crop or classes differ).
    """
    shapes = stage_shapes(stage, len(classes))
    place = f"stage {stage.name!r}: net {stage.net} from {parent.name}"
    modules = taken_convs(stage, shapes, parent, place) | taken_head(stage, classes, shapes, parent)
    taken = {f"{to}.{kind}": f"{source}.{kind}" for to, source in modules.items() for kind in KINDS}
    grown = last_layer(stage) if new_classes(stage, classes, parent) else None
    for name, source in taken.items():
        rows = (len(parent.classes or ()),) if name.rpartition(".")[0] == grown else shapes[name][:1]
        if parent.shapes.get(source) != rows + shapes[name][1:]:
            raise RecipeError(
                f"{place}: its {source} is {parent.shapes.get(source, 'absent')}, expected {shapes[name]} for {name};"
                " give parent and child the same width and, with FC layers, the same crop and classes"
            )
    return taken


def last_layer(stage: Stage) -> str:
    """The module whose rows are the classes."""
    return FC_NAMES[stage.head][-1]


def new_classes(stage: Stage, classes: Sequence[str], parent: ParentNet) -> tuple[str, ...]:
    """The classes whose rows a parent's last layer lacks, while it gives those of all before; else ()."""
    gives = not parent.published and same_head(stage, parent)
    return (added_classes(parent.classes or (), classes) or ()) if gives else ()


def taken_convs(stage: Stage, shapes: Shapes, parent: ParentNet, place: str) -> dict[str, str]:
    """The modules of the convs that a parent gives, each with its module in the parent."""
    own = conv_names(stage.net, max(stage.features.groups) if stage.features else 5)
    theirs = conv_names(parent.net, max(parent.features.groups) if parent.features else 5)
    both = [conv for conv in own if conv in theirs]
    if parent.published:
        both = [conv for conv in both if shapes[f"{own[conv]}.weight"] == parent.shapes.get(f"{theirs[conv]}.weight")]
        if not both:
            first, given = (found.get("features.0.weight") for found in (shapes, parent.shapes))
            raise RecipeError(
                f"{place}: no conv fits: its first is {given}, expected {first}; published nets have width 1"
            )
    elif parent.net != stage.net:
        both = [conv for conv in both if conv in COPIED_CONVS]
    return {own[conv]: theirs[conv] for conv in both}


def taken_head(stage: Stage, classes: Sequence[str], shapes: Shapes, parent: ParentNet) -> dict[str, str]:
    """The FC layers that a parent gives, each with its module in the parent."""
    names = FC_NAMES[stage.head]
    if parent.published:
        if stage.head != "paper" or parent.head != "paper":
            return {}
        fit = [name for name in names[:-1] if shapes[f"{name}.weight"] == parent.shapes.get(f"{name}.weight")]
        last = f"{names[-1]}.weight"
        if parent.classes == tuple(classes) and shapes[last] == parent.shapes.get(last):
            fit.append(names[-1])
        return {name: name for name in fit}
    return {name: name for name in names} if same_head(stage, parent) else {}


def same_head(stage: Stage, parent: ParentNet) -> bool:
    """Whether the FC layers of both see the same values."""
    return parent.head == stage.head and same_features(stage.features, parent.features)


def layer_origins(
    stage: Stage, taken: Mapping[str, str], parent: ParentNet | None, added: tuple[str, ...] = ()
) -> list[LayerOrigin]:
    """Where each layer's first weights come from, from the bottom up; added: see new_classes."""
    return [
        LayerOrigin(
            layer,
            module,
            parent.name if parent is not None and f"{module}.weight" in taken else None,
            added if module == last_layer(stage) else (),
        )
        for layer, module in layer_modules(stage).items()
    ]


def check_given(stage: Stage, origins: Sequence[LayerOrigin]) -> None:
    """RecipeError where a layer is random that the stage keeps as it is: of a frozen group, or below a logistic fit."""
    kept = 5 if stage.fit == "logistic" else stage.freeze
    for origin in origins:
        if origin.source is None and origin.layer.startswith("conv") and int(origin.layer[4]) <= kept:
            logistic = stage.fit == "logistic"
            why = 'fit = "logistic" trains the last layer alone' if logistic else f"freeze = {stage.freeze} keeps it"
            less = "" if logistic else ", or freeze less"
            raise RecipeError(
                f"stage {stage.name!r}: {origin.layer} of net {stage.net} is not among what {stage.init_from!r} gives and would"
                f" be random, but {why}; start from weights of the same net{less}"
            )


def copy_tensors(net: Vgg, source: Mapping[str, Tensor], taken: Mapping[str, str]) -> None:
    """Sets the tensors of `net` that `taken` names, in place; shapes were checked by taken_tensors.

    A last layer with fewer rows, one a class, sets the first ones.
    """
    state = net.state_dict()
    with torch.no_grad():
        for name, parents in taken.items():
            rows = state[name][: len(source[parents])]
            assert rows.shape == source[parents].shape, f"{name}: {tuple(source[parents].shape)}"
            rows.copy_(source[parents])
