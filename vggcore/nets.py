"""The six nets of Table 1 as data, and the modules built from them under torchvision's parameter names."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vggcore.counter_hash import hash64
from vggcore.recipe import Features, Head, NetName, Pool


@dataclass(frozen=True)
class NetConfig:
    """A column of Table 1: how many convs each group has, and what sets this net apart."""

    convs: tuple[int, int, int, int, int]
    lrn: bool = False               # local response normalisation after the first conv
    third_conv_kernel: int = 3      # kernel of the third conv of a group, in groups that have three


GROUP_CHANNELS = (64, 128, 256, 512, 512)   # Table 1: output channels of conv groups 1 to 5, the same in every net
# fmt: off
NETS: dict[NetName, NetConfig] = {
    "A":     NetConfig(convs=(1, 1, 2, 2, 2)),
    "A-LRN": NetConfig(convs=(1, 1, 2, 2, 2), lrn=True),
    "B":     NetConfig(convs=(2, 2, 2, 2, 2)),
    "C":     NetConfig(convs=(2, 2, 3, 3, 3), third_conv_kernel=1),
    "D":     NetConfig(convs=(2, 2, 3, 3, 3)),
    "E":     NetConfig(convs=(2, 2, 4, 4, 4)),
}
# fmt: on
FC_UNITS = 4096        # Table 1: units of the two hidden FC layers
COMPACT_UNITS = 120    # hidden units of the compact head, at any width (ours)
STRIDE = 32            # pixels of the picture from one place of the last feature map to the next: five poolings

# Where each head's FC layers stand; those of "paper" are torchvision's.
FC_NAMES: dict[Head, tuple[str, ...]] = {
    "paper": ("classifier.0", "classifier.3", "classifier.6"),
    "compact": ("classifier.1", "classifier.4"),
    "linear": ("classifier.0",),
}

WORD = 0xFFFFFFFF      # 32 bits


def conv_names(net: NetName, last_group: int = 5) -> dict[str, str]:
    """The module of each conv up to a group by its place in its group: {"conv1_1": "features.0", ...}, in order."""
    names, index = {}, 0
    for group, convs in enumerate(NETS[net].convs[:last_group], start=1):
        for place in range(1, convs + 1):
            names[f"conv{group}_{place}"] = f"features.{index}"
            index += 2   # the conv and its ReLU
        index += 1       # the pool
    return names


def conv_block(
    channels_in: int, channels_out: int, repeats: int, *, last_kernel: int = 3, lrn: bool = False
) -> list[nn.Module]:
    """A group of Table 1: `repeats` convs of stride 1 that keep height and width, each with a ReLU, and a 2x2 max pool.

    Kernels are 3x3, that of the last conv last_kernel x last_kernel (odd). lrn: the first ReLU's place also holds
    Krizhevsky's local response normalisation, as one module, so that the indices are those of the net without it.
    """
    modules: list[nn.Module] = []
    for place in range(repeats):
        kernel = last_kernel if place == repeats - 1 else 3
        modules.append(nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2))
        modules.append(relu_and_lrn() if lrn and place == 0 else nn.ReLU(inplace=True))
        channels_in = channels_out
    modules.append(nn.MaxPool2d(kernel_size=2, stride=2))
    return modules


def relu_and_lrn() -> nn.Sequential:
    """ReLU, then LRN with n=5, k=2, alpha=1e-4, beta=0.75 (Sec. 2.3); torch divides alpha by n, hence 5e-4."""
    return nn.Sequential(nn.ReLU(inplace=True), nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0))


def mix32(bits: Tensor) -> Tensor:
    """The bijection of 32-bit words "lowbias32" (Wellons, hash-prospector), on int64 tensors of values 0..2^32-1.

    The second multiplier is written less 2^32: the low 32 bits are the same, and no product leaves int64, so that
    every device gives the same bits.
    """
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D) & WORD
    bits = bits ^ (bits >> 15)
    bits = (bits * (0x846CA68B - 2**32)) & WORD
    return bits ^ (bits >> 16)


class HashedDropout(nn.Module):
    """Dropout whose mask is a pure function of (seed, iteration, layer, global row, unit): no generator, no state.

    A picture's mask is the same in whatever worker or batch it comes, on CPU and GPU alike, so that a run at another
    number of workers, or resumed, drops the same units.
    """

    def __init__(self, probability: float, layer: int) -> None:
        """probability: share of units set to zero, in [0, 1); layer: number of this dropout in its net."""
        super().__init__()
        assert 0 <= probability < 1, probability
        self.probability = probability
        self.layer = layer
        self.row_keys: Tensor | None = None   # (N,) int64, 32 bits used: all of the mask's name but the unit

    def set_draws(self, seed: int, iteration: int, rows: Tensor) -> None:
        """The draws for the next forward: rows (N,) int64, place of each picture in the global batch, 0..2^32-1."""
        key = int(hash64("dropout", seed, iteration, self.layer))
        self.row_keys = mix32(mix32(rows ^ (key & WORD)) ^ (key >> 32))

    def forward(self, units: Tensor) -> Tensor:
        """units (N, F) -> (N, F): in train mode some are zero, and the others 1/(1-probability) times as large."""
        if not self.training or self.probability == 0:
            return units
        keys = self.row_keys
        assert keys is not None, "train mode needs draws: call net.set_draws(seed, iteration, rows) before forward"
        assert keys.shape[0] == units.shape[0], "draws are for another batch: call net.set_draws with its own rows"
        numbers = torch.arange(units.shape[1], device=units.device)
        bits = mix32(keys[:, None] ^ mix32(numbers))   # (N, F)
        return units * (bits >= round(self.probability * 2**32)) * (1 / (1 - self.probability))

    def extra_repr(self) -> str:
        return f"probability={self.probability}, layer={self.layer}"


class PlacePool(nn.Module):
    """Pools each channel over all places: the average, the maximum, or both one after the other."""

    def __init__(self, how: Pool) -> None:
        super().__init__()
        self.how: Pool = how

    def forward(self, maps: Tensor) -> Tensor:
        """maps (N, C, H, W), H and W at least 1 -> (N, C), or (N, 2C): averages, then maxima."""
        parts = []
        if self.how != "maximum":
            parts.append(maps.mean((2, 3)))
        if self.how != "average":
            parts.append(maps.amax((2, 3)))
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        return f"how={self.how!r}"


class Vgg(nn.Module):
    """A net of Table 1 with torchvision's names and indices: features, avgpool, classifier.

    head: which classifier it has; map_side: places on a side of one crop's feature map, crop/32; taps: of a linear head,
    the modules of `features`, max pools, whose outputs it pools.
    """

    def __init__(
        self,
        features: nn.Sequential,
        avgpool: nn.Module,
        classifier: nn.Sequential,
        *,
        head: Head,
        map_side: int,
        taps: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.features = features
        self.avgpool = avgpool
        self.classifier = classifier
        self.head: Head = head
        self.map_side = map_side
        self.taps = taps

    def set_draws(self, seed: int, iteration: int, rows: Tensor) -> None:
        """HashedDropout.set_draws for both dropouts: what the next forward in train mode needs; rows on its device."""
        for module in self.classifier:
            if isinstance(module, HashedDropout):
                module.set_draws(seed, iteration, rows)

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W), RGB less the mean -> logits (N, classes).

        Height and width are the crop's; a linear head takes any, of one scale.
        """
        if self.head == "linear":
            pooled_logits: Tensor = self.classifier(self.pooled(images))
            return pooled_logits
        features: Tensor = self.features(images)
        # At the crop's size the paper's head has nothing to pool; torch's backward would not be deterministic on a GPU.
        if self.head == "compact" or features.shape[-2:] != (self.map_side, self.map_side):
            features = self.avgpool(features)
        logits: Tensor = self.classifier(torch.flatten(features, 1))
        return logits

    def pooled(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) at one scale -> (N, F): of a linear head, each tapped group pooled over its places, in order."""
        assert self.head == "linear", f"a {self.head} head pools no groups"
        values, found = images, []
        for index, module in enumerate(self.features):
            values = module(values)
            if index in self.taps:
                found.append(self.avgpool(values.float()))     # sums over many places, also where maps are bfloat16
        return torch.cat(found, 1)


def build_net(
    net: NetName,
    *,
    classes: int,
    head: Head = "paper",
    features: Features | None = None,
    width: float = 1.0,
    crop: int = 224,
    dropout: float = 0.5,
) -> Vgg:
    """The net with its weights allocated, but holding anything until initialise_net or load_state_dict sets them.

    width: factor on conv channels and hidden FC units, rounded, at least 1 (ours; the paper's nets have 1). crop:
    pixels, a multiple of 32. head: "paper" (FC-4096, FC-4096, FC-classes), "compact" (global average pooling, FC-120,
    FC-classes) or "linear" (the net cut after the last group of `features`, groups pooled over places, FC-classes on the
    values of all features.scales). dropout: probability, in [0, 1).
    """
    with torch.device("meta"):   # nothing is computed: torch's own first weights would take seconds and be thrown away
        modules = net_modules(
            net, classes=classes, head=head, features=features, width=width, crop=crop, dropout=dropout
        )
    return modules.to_empty(device="cpu")


def net_modules(
    net: NetName, *, classes: int, head: Head, features: Features | None = None, width: float, crop: int, dropout: float
) -> Vgg:
    """The modules of build_net, on torch's current default device."""
    if head == "linear":
        return linear_modules(net, features or Features(), classes=classes, width=width, map_side=crop // STRIDE)
    assert crop > 0 and crop % STRIDE == 0, f"crop is {crop}, wanted a multiple of {STRIDE}"
    map_side = crop // STRIDE
    groups = conv_groups(net, width)
    channels_in = scaled(GROUP_CHANNELS[-1], width)
    if head == "paper":
        avgpool = nn.AdaptiveAvgPool2d(map_side)
        classifier = paper_head(channels_in * map_side**2, scaled(FC_UNITS, width), classes, dropout)
    else:
        avgpool = nn.AdaptiveAvgPool2d(1)
        classifier = compact_head(channels_in, classes, dropout)
    return Vgg(nn.Sequential(*itertools.chain(*groups)), avgpool, classifier, head=head, map_side=map_side)


def linear_modules(net: NetName, features: Features, *, classes: int, width: float, map_side: int) -> Vgg:
    """The net cut after the last of the groups that are pooled, and one linear layer on what is pooled."""
    groups = conv_groups(net, width)[: max(features.groups)]
    ends = list(itertools.accumulate(len(group) for group in groups))
    head = nn.Linear(linear_inputs(features, width), classes)
    return Vgg(
        nn.Sequential(*itertools.chain(*groups)),
        PlacePool(features.pool),
        nn.Sequential(head),
        head="linear",
        map_side=map_side,
        taps=tuple(ends[group - 1] - 1 for group in features.groups),
    )


def linear_inputs(features: Features, width: float = 1.0) -> int:
    """Values that a linear head sees of one picture: over its scales, groups, channels, and averages and maxima."""
    channels = sum(scaled(GROUP_CHANNELS[group - 1], width) for group in features.groups)
    return channels * (2 if features.pool == "both" else 1) * len(features.scales or (0,))


def conv_groups(net: NetName, width: float) -> list[list[nn.Module]]:
    """The modules of the five conv groups, each with its max pool, on torch's current default device."""
    config, channels_in = NETS[net], 3
    groups = []
    for group, (repeats, channels) in enumerate(zip(config.convs, GROUP_CHANNELS, strict=True)):
        channels_out = scaled(channels, width)
        last_kernel = config.third_conv_kernel if repeats == 3 else 3
        lrn = config.lrn and group == 0
        groups.append(conv_block(channels_in, channels_out, repeats, last_kernel=last_kernel, lrn=lrn))
        channels_in = channels_out
    return groups


def scaled(units: int, width: float) -> int:
    """Channels or units at a width: rounded, at least 1."""
    return max(1, round(units * width))


def paper_head(units_in: int, hidden: int, classes: int, dropout: float) -> nn.Sequential:
    """The three FC layers of Table 1, dropout after the first two (Sec. 3.1)."""
    return nn.Sequential(
        nn.Linear(units_in, hidden),
        nn.ReLU(inplace=True),
        HashedDropout(dropout, layer=0),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        HashedDropout(dropout, layer=1),
        nn.Linear(hidden, classes),
    )


def compact_head(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """What follows global average pooling in a small net of our own: dropout, FC-120, dropout, classes."""
    return nn.Sequential(
        HashedDropout(dropout, layer=0),
        nn.Linear(channels, COMPACT_UNITS),
        nn.ReLU(inplace=True),
        HashedDropout(dropout, layer=1),
        nn.Linear(COMPACT_UNITS, classes),
    )


@dataclass(frozen=True)
class LayerRow:
    """One layer of a net at its crop, for one picture."""

    name: str                  # the module's: "features.0"
    kind: str                  # Table 1's "conv3-64", "LRN", "maxpool", "FC-4096"; also "relu", "dropout", "avgpool"
    output: tuple[int, ...]    # (channels, height, width), or (units,)
    parameters: int
    macs: int                  # multiply-adds of convs and FC layers; 0 for all others


def parameter_sizes(
    net: NetName,
    *,
    classes: int,
    head: Head = "paper",
    features: Features | None = None,
    width: float = 1.0,
    crop: int = 224,
    dropout: float = 0.0,
) -> dict[str, int]:
    """Each parameter of build_net's net and how many values it has; allocates nothing, and loads none of what torch computes
    shapes with, which takes seconds."""
    with torch.device("meta"):
        modules = net_modules(net, classes=classes, head=head, features=features, width=width, crop=crop, dropout=dropout)
    return {name: parameter.numel() for name, parameter in modules.named_parameters()}


def layer_table(
    net: NetName,
    *,
    classes: int,
    head: Head = "paper",
    features: Features | None = None,
    width: float = 1.0,
    crop: int = 224,
    dropout: float = 0.5,
) -> list[LayerRow]:
    """Every layer of build_net's net in the order a picture goes through; allocates no weights and computes nothing.

    A linear head's picture is crop x crop; with several scales the layers stand once, at that size.
    """
    rows: list[LayerRow] = []

    def add_row(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not list(module.children()):
            rows.append(layer_row(names[module], module, tuple(output.shape[1:])))

    with torch.device("meta"):
        modules = net_modules(
            net, classes=classes, head=head, features=features, width=width, crop=crop, dropout=dropout
        ).eval()
        names = {module: name for name, module in modules.named_modules()}
        for module in names:
            module.register_forward_hook(add_row)
        picture = torch.empty(1, 3, crop, crop)
        if head == "linear":
            pooled = modules.pooled(picture)
            modules.classifier(pooled.repeat(1, len(features.scales or (0,)) if features else 1))
        else:
            modules(picture)
    return rows


def layer_row(name: str, module: nn.Module, output: tuple[int, ...]) -> LayerRow:
    """A layer's row, from the module and its output's shape without the batch."""
    macs = 0
    match module:
        case nn.Conv2d():
            kind = f"conv{module.kernel_size[0]}-{module.out_channels}"
            macs = math.prod(output) * module.in_channels * math.prod(module.kernel_size)
        case nn.Linear():
            kind = f"FC-{module.out_features}"
            macs = module.in_features * module.out_features
        case nn.ReLU():
            kind = "relu"
        case nn.LocalResponseNorm():
            kind = "LRN"
        case nn.MaxPool2d():
            kind = "maxpool"
        case nn.AdaptiveAvgPool2d():
            kind = "avgpool"
        case PlacePool():
            kind = f"pool-{module.how}"
        case HashedDropout():
            kind = "dropout"
        case _:
            raise AssertionError(f"{name}: no kind for {type(module).__name__}")
    return LayerRow(name, kind, output, sum(parameter.numel() for parameter in module.parameters()), macs)
