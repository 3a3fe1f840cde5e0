"""The layouts in which VGG weights are published: recognised by their tensors' names, converted once, in float64."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vggcore.errors import WeightsError
from vggcore.nets import FC_NAMES, FC_UNITS, GROUP_CHANNELS, NETS, STRIDE, conv_names
from vggcore.published import FC_LAYERS, Rgb
from vggcore.recipe import NetName

BATCH_NORM_EPSILON = 1e-5                       # torch's default, torchvision's and timm's
BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
COUNTED_NETS: tuple[NetName, ...] = ("A", "B", "C", "D", "E")     # A-LRN has A's tensors: a file cannot tell
KERAS_LAYER = re.compile(r"(?:^|[/.])(block[1-5]_conv[1-4]|fc1|fc2|predictions)(?=$|[/._:])")

Slot = tuple[str, str]    # layer and part: ("conv1_1", "weight"), ("conv1_1", "bn.running_var"), ("fc1", "bias")


@dataclass(frozen=True)
class Convention:
    """How a net takes pictures: the order of its channels, what is subtracted and by what it is divided, on 0..255."""

    bgr: bool
    mean: Rgb                    # RGB, 0..255
    deviation: Rgb | None        # RGB, 0..255; None: no division


# (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225) times 255: torchvision's presets, and timm's for its VGGs.
TORCHVISION = Convention(bgr=False, mean=(123.675, 116.28, 103.53), deviation=(58.395, 57.12, 57.375))
# keras.applications.imagenet_utils, mode "caffe": BGR less [103.939, 116.779, 123.68].
KERAS = Convention(bgr=True, mean=(123.68, 116.779, 103.939), deviation=None)


@dataclass(frozen=True)
class Found:
    """The tensors of a file by the names it gives them, and what it says of itself."""

    tensors: Mapping[str, Tensor]
    convention: Convention | None = None     # None: the layout's own
    net: NetName | None = None               # None: to be found from the tensors
    classes: tuple[str, ...] | None = None
    licence: str | None = None
    origin: str | None = None
    name: str | None = None
    digest: str | None = None                # PublishedWeights.digest, where the file is one of ours


@dataclass(frozen=True)
class Converted:
    """Weights in our convention; the fields are those of PublishedWeights."""

    net: NetName
    layers: tuple[str, ...]
    tensors: dict[str, Tensor] = field(repr=False)
    mean: Rgb
    outputs: int | None
    crop: int | None
    layout: str


@dataclass(frozen=True)
class Layout:
    """A way to name and lay out a net's tensors.

    names: the file's name of each slot, from a net and whether it has batch norm. into: a tensor as we have it (kernels
    (out, in, height, width), FC weights (out, in) with inputs in the order channel, row, column) as the layout has it;
    the last argument is the side of fc1's feature map. out_of: the way back.
    """

    name: str
    convention: Convention
    names: Callable[[NetName, bool], dict[str, Slot]]
    into: Callable[[Slot, Tensor, int], Tensor]
    out_of: Callable[[Slot, Tensor, int], Tensor]


def torch_names(fc: tuple[str, ...]) -> Callable[[NetName, bool], dict[str, Slot]]:
    """torchvision's names of the convs, and these of the FC layers."""

    def names(net: NetName, batch_norm: bool) -> dict[str, Slot]:
        found: dict[str, Slot] = {}
        step = 3 if batch_norm else 2           # conv, (batch norm,) ReLU
        for number, (layer, module) in enumerate(conv_names(net).items()):
            index = int(module.removeprefix("features.")) + (step - 2) * number
            found |= {f"features.{index}.{part}": (layer, part) for part in ("weight", "bias")}
            if batch_norm:
                found |= {f"features.{index + 1}.{part}": (layer, f"bn.{part}") for part in BATCH_NORM_PARTS}
        for layer, module in zip(FC_LAYERS, fc, strict=True):
            found |= {f"{module}.{part}": (layer, part) for part in ("weight", "bias")}
        return found

    return names


def keras_names(net: NetName, _batch_norm: bool) -> dict[str, Slot]:
    """Keras' layers, their tensors named kernel and bias."""
    layers = {layer: f"block{layer[4]}_conv{layer[6]}" for layer in conv_names(net)}
    layers |= dict(zip(FC_LAYERS, ("fc1", "fc2", "predictions"), strict=True))
    parts = {"kernel": "weight", "bias": "bias"}
    return {f"{name}/{theirs}": (layer, ours) for layer, name in layers.items() for theirs, ours in parts.items()}


def unchanged(_slot: Slot, tensor: Tensor, _side: int) -> Tensor:
    """torchvision's layout is ours."""
    return tensor


def into_timm(slot: Slot, tensor: Tensor, side: int) -> Tensor:
    """FC1 and FC2 as convs."""
    sides = {("fc1", "weight"): side, ("fc2", "weight"): 1}
    return tensor.reshape(len(tensor), -1, sides[slot], sides[slot]) if slot in sides else tensor


def out_of_timm(slot: Slot, tensor: Tensor, _side: int) -> Tensor:
    """The way back; the last layer is a linear one there too."""
    return tensor.flatten(1) if slot in (("fc1", "weight"), ("fc2", "weight")) else tensor


def into_keras(slot: Slot, tensor: Tensor, side: int) -> Tensor:
    """Kernels (height, width, in, out), FC weights (in, out), FC1's inputs in the order row, column, channel."""
    layer, part = slot
    if part != "weight":
        return tensor
    if layer.startswith("conv"):
        return tensor.permute(2, 3, 1, 0)
    if layer == "fc1":
        tensor = tensor.reshape(len(tensor), -1, side, side).permute(0, 2, 3, 1).flatten(1)
    return tensor.T


def out_of_keras(slot: Slot, tensor: Tensor, side: int) -> Tensor:
    """The way back."""
    layer, part = slot
    if part != "weight":
        return tensor
    if layer.startswith("conv"):
        return tensor.permute(3, 2, 0, 1)
    tensor = tensor.T
    return tensor.reshape(len(tensor), side, side, -1).permute(0, 3, 1, 2).flatten(1) if layer == "fc1" else tensor


TIMM_FC = ("pre_logits.fc1", "pre_logits.fc2", "head.fc")
LAYOUTS = {
    "torchvision": Layout("torchvision", TORCHVISION, torch_names(FC_NAMES["paper"]), unchanged, unchanged),
    "timm": Layout("timm", TORCHVISION, torch_names(TIMM_FC), into_timm, out_of_timm),
    "keras": Layout("keras", KERAS, keras_names, into_keras, out_of_keras),
}


def convert(found: Found, place: str) -> Converted:
    """The file's weights in our convention. Raises WeightsError that names the first tensor that is not a VGG's."""
    layout, tensors = recognise(found.tensors, place)
    batch_norm = any(name.endswith(".running_mean") for name in tensors)
    net = found.net or nearest_net(layout, tensors, batch_norm)
    names = layout.names(net, batch_norm)
    if not any(slot[0] in FC_LAYERS for name, slot in names.items() if name in tensors):
        names = {name: slot for name, slot in names.items() if slot[0] not in FC_LAYERS}
    what = f"{place}: {layout.name}'s layout, nearest net {net}"
    check_names(names, tensors, what)
    slots = {slot: name for name, slot in names.items()}
    side, outputs = head_size(slots, tensors)
    for slot, name in slots.items():
        shape = tuple(layout.into(slot, torch.empty(slot_shape(net, slot, side, outputs), device="meta"), side).shape)
        check_tensor(name, tensors[name], shape, what)
    layers = tuple(dict.fromkeys(layer for layer, _ in slots))
    ours = {slot: layout.out_of(slot, tensors[name], side) for slot, name in slots.items()}
    state = folded(ours, net, layers, batch_norm, found.convention or layout.convention)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{what}: {name} has values that are not finite numbers; the file is broken")
    has_fc = "fc3" in layers
    return Converted(
        net=net,
        layers=layers,
        tensors=state,
        mean=(found.convention or layout.convention).mean,
        outputs=outputs if has_fc else None,
        crop=side * STRIDE if has_fc else None,
        layout=layout.name,
    )


def recognise(tensors: Mapping[str, Tensor], place: str) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of these names, and the tensors by the names that the layout gives them."""
    counts = ".num_batches_tracked"
    plain = without_prefix({name: tensor for name, tensor in tensors.items() if not name.endswith(counts)}, place)
    if sum(bool(re.fullmatch(r"features\.\d+\.weight", name)) for name in plain) > 4:
        timm = any(name.startswith(("pre_logits.", "head.")) for name in plain)
        return LAYOUTS["timm" if timm else "torchvision"], plain
    if sum(bool(KERAS_LAYER.search(name)) for name in plain) > 4:
        return LAYOUTS["keras"], keras_renamed(plain, place)
    first = ", ".join(repr(name[:60]) for name in list(plain)[:3]) or "none"
    raise WeightsError(
        f"{place}: not the weights of a VGG net (found the tensors {first}); expected torchvision's or timm's names"
        " ('features.0.weight') or Keras' ('block1_conv1'): give a file of VGG-11, 13, 16 or 19"
    )


def without_prefix(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """'module.features.0.weight', as DDP saves a net, as 'features.0.weight'."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("module.")
        if plain in found:
            raise WeightsError(f"{place}: two tensors for {plain[:80]!r}, with and without 'module.'; give a file of one net")
        found[plain] = tensor
    return found


def keras_renamed(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """'block1_conv1_W_1:0' and 'block1_conv1/kernel:0' as 'block1_conv1/kernel'; other names stay as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = KERAS_LAYER.search(name)
        plain = f"{layer[1]}/{'bias' if tensor.ndim == 1 else 'kernel'}" if layer else name
        if plain in found:
            raise WeightsError(f"{place}: two tensors for {plain}, one is {name[:80]!r}; give a file of one net")
        found[plain] = tensor
    return found


def nearest_net(layout: Layout, tensors: Mapping[str, Tensor], batch_norm: bool) -> NetName:
    """The net whose convs are most like those found; C is told from D by its 1x1 kernels."""
    fc = tuple(name for name, slot in layout.names("A", batch_norm).items() if slot[0] in FC_LAYERS)   # timm's are 4-D
    found = {name for name, tensor in tensors.items() if tensor.ndim == 4 and name not in fc}

    def distance(net: NetName) -> int:
        slots = {slot: name for name, slot in layout.names(net, batch_norm).items()}
        convs = {slots[layer, "weight"] for layer in conv_names(net)}
        third = tensors.get(slots.get(("conv3_3", "weight"), ""))
        one_by_one = third is not None and third.ndim == 4 and 1 in (third.shape[0], third.shape[-1])
        return 2 * len(convs ^ found) + (one_by_one != (NETS[net].third_conv_kernel == 1))

    return min(COUNTED_NETS, key=distance)


def check_names(names: Iterable[str], tensors: Mapping[str, Tensor], what: str) -> None:
    """WeightsError where a tensor is missing or is one too many."""
    missing = [name for name in names if name not in tensors]
    extra = [name for name in tensors if name not in set(names)]
    if missing or extra:
        parts = [f"{len(missing)} tensors are missing, {missing[0]!r} first"] if missing else []
        parts += [f"{len(extra)} tensors are not that net's, {extra[0][:80]!r} first"] if extra else []
        raise WeightsError(f"{what}: {' and '.join(parts)}; give a whole file of one of the nets of Table 1")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    """WeightsError for another shape, or for values that are absent, sparse or no real numbers."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = "meta: without values" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
        raise WeightsError(f"{what}: {name!r} is a tensor of another kind ({kind}), expected a dense one; save dense tensors")
    if tuple(tensor.shape) != shape:
        raise WeightsError(f"{what}: {name!r} is {tuple(tensor.shape)}, expected {shape}; give a file of the paper's width")
    if not tensor.is_floating_point():
        raise WeightsError(f"{what}: {name!r} holds {tensor.dtype}, expected floating-point numbers; give unquantised weights")


def head_size(slots: Mapping[Slot, str], tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The side of the feature map that fc1 takes, and the number of outputs; 7 and 1000 where they cannot be told."""
    if ("fc1", "weight") not in slots:
        return 7, 1000
    places = tensors[slots["fc1", "weight"]].numel() // (FC_UNITS * GROUP_CHANNELS[-1])
    return math.isqrt(places) or 7, tensors[slots["fc3", "bias"]].numel() or 1000


def slot_shape(net: NetName, slot: Slot, side: int, outputs: int) -> tuple[int, ...]:
    """The shape of a slot's tensor as we have it."""
    layer, part = slot
    if layer.startswith("conv"):
        group, number = int(layer[4]), int(layer[6])
        channels = GROUP_CHANNELS[group - 1]
        before = 3 if group == 1 else GROUP_CHANNELS[group - 2]
        kernel = NETS[net].third_conv_kernel if number == 3 and NETS[net].convs[group - 1] == 3 else 3
        return (channels, before if number == 1 else channels, kernel, kernel) if part == "weight" else (channels,)
    units = {"fc1": FC_UNITS, "fc2": FC_UNITS, "fc3": outputs}[layer]
    inputs = GROUP_CHANNELS[-1] * side**2 if layer == "fc1" else FC_UNITS
    return (units, inputs) if part == "weight" else (units,)


def folded(
    ours: Mapping[Slot, Tensor], net: NetName, layers: tuple[str, ...], batch_norm: bool, convention: Convention
) -> dict[str, Tensor]:
    """float32 tensors under torchvision's names: batch norm and the convention folded into the convs, in float64."""
    modules = conv_names(net) | dict(zip(FC_LAYERS, FC_NAMES["paper"], strict=True))
    state: dict[str, Tensor] = {}
    for layer in layers:
        weight, bias = ours[layer, "weight"], ours[layer, "bias"]
        if layer.startswith("conv"):
            weight, bias = weight.double(), bias.double()
            if batch_norm:
                gain, shift, mean, variance = (ours[layer, f"bn.{part}"].double() for part in BATCH_NORM_PARTS)
                factor = gain / torch.sqrt(variance + BATCH_NORM_EPSILON)
                weight, bias = weight * factor[:, None, None, None], (bias - mean) * factor + shift
        if layer == "conv1_1":
            weight = to_rgb_levels(weight, convention)
        state[f"{modules[layer]}.weight"] = weight.to(torch.float32).contiguous()
        state[f"{modules[layer]}.bias"] = bias.to(torch.float32).contiguous()
    return state


def to_rgb_levels(kernels: Tensor, convention: Convention) -> Tensor:
    """The first conv's kernels (64, 3, 3, 3), float64, for RGB levels of 0..255 less the mean."""
    if convention.bgr:
        kernels = kernels.flip(1)
    if convention.deviation is None:
        return kernels
    return kernels / torch.tensor(convention.deviation, dtype=torch.float64)[None, :, None, None]


def from_rgb_levels(kernels: Tensor, convention: Convention) -> Tensor:
    """The way back of to_rgb_levels."""
    if convention.deviation is not None:
        kernels = kernels * torch.tensor(convention.deviation, dtype=torch.float64)[None, :, None, None]
    return kernels.flip(1) if convention.bgr else kernels
