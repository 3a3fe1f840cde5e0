"""What suits a folder of pictures and a machine: splits, a net's size, views, scales; pure, by the table of starter_rules."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deploy import starter_rules as rules
from deploy.machine import Machine
from deploy.starter_rules import Size
from pipelines.folder_look import FolderLook, Sizes
from pipelines.gate_list import at_least_one
from pipelines.sources import printable
from pipelines.split import reservoir, whole_shares
from vggcore.errors import DatasetError
from vggcore.recipe import GATE, SPLITS, Split

Float = Literal["fp32", "bf16"]

HOUR_S = 3600
TRAINING = 6        # operations for each multiply-add of a view: two forward, four backward
FORWARD = 2
FLOAT64_BYTES = 8


@dataclass(frozen=True)
class Sharing:
    """How pictures are shared out: by a rule, None where folders decide, and what each split gets."""

    rule: Split | None
    counts: Mapping[str, int]       # pictures of each split
    fewest: Mapping[str, int]       # of the smallest class in each split; empty where folders decide

    @property
    def train(self) -> int:
        """Pictures in train."""
        return self.counts["train"]


@dataclass(frozen=True)
class Scratch:
    """A net from random weights: its size, its views, how long it trains."""

    size: Size
    by_count: Size                  # what the number of pictures alone would give, were the machine fast enough
    crop: int
    whole: bool                     # a view is the whole picture
    nets: tuple[str, ...]           # in order, each from the one before
    epochs: int
    hours: float                    # on this machine, roughly

    @property
    def is_papers(self) -> bool:
        """Whether it is the paper's own size."""
        return self.size is rules.SIZES[-1]


@dataclass(frozen=True)
class Scales:
    """Test scales of a linear stage, and how long its features take."""

    scales: tuple[int, ...]
    hours: float                    # on this machine, roughly
    why: str


def share_out(look: FolderLook, *, with_gate: bool) -> Sharing:
    """The shares of val, test and gate that leave at least one picture of each class in every split.

    Raises DatasetError for a class that is too small for that.
    """
    if look.splits is not None:
        return Sharing(None, {name: look.splits[name] for name in (*SPLITS, GATE) if name in look.splits}, {})
    parts = (*SPLITS, *([GATE] if with_gate else []))
    smallest = min(look.counts, key=lambda label: look.counts[label])
    for share in rules.SHARES[rules.SHARES.index(usual_share(look.pictures, with_gate=with_gate)) :]:
        rule = Split(val=share, test=share, gate=share if with_gate else 0.0, by="stratified")
        left = {label: shared(count, rule) for label, count in look.counts.items()}
        if all(of_class[part] >= 1 for of_class in left.values() for part in parts):
            counts = {part: sum(of_class[part] for of_class in left.values()) for part in parts}
            return Sharing(rule, counts, {part: left[smallest][part] for part in parts})
    raise DatasetError(
        f"{printable(look.root)}: class {smallest!r} has {look.counts[smallest]} pictures, expected {len(parts)} at least, one"
        f" for each of {', '.join(parts)}; add pictures to it, or move its folder away"
    )


def usual_share(pictures: int, *, with_gate: bool) -> float:
    """The share of val and of test by the number of pictures alone."""
    enough = [share for share in rules.SHARES if share * pictures >= rules.ENOUGH_IN_TEST]
    if enough:
        return min(enough[0], rules.USUAL_SHARE)
    enough_in_test = rules.USUAL_SHARE * pictures >= rules.TOO_FEW_IN_TEST
    return rules.USUAL_SHARE if enough_in_test or with_gate else rules.LARGEST_SHARE


def shared(count: int, rule: Split) -> dict[str, int]:
    """How many of a class's pictures each split gets, and the gate where the rule has one."""
    counts = whole_shares(count, reservoir(rule))
    if rule.gate:
        counts[GATE] = max(0, at_least_one(counts["test"] * rule.gate / (rule.gate + rule.test), counts["test"]))
        counts["test"] -= counts[GATE]
    return counts


def choose_scratch(look: FolderLook, machine: Machine, train: int, precision: Float) -> Scratch:
    """A net from random weights as large as the number of pictures deserves and this machine can train."""
    by_count = [size for size in rules.SIZES if train >= size.train_pictures][-1]
    limit = rules.SCRATCH_HOURS["gpu" if machine.gpu else "cpu"]
    tried = [sized(look, machine, train, precision, size, by_count) for size in rules.SIZES[: rules.SIZES.index(by_count) + 1]]
    return next((one for one in reversed(tried) if one.hours <= limit), tried[0])


def sized(look: FolderLook, machine: Machine, train: int, precision: Float, size: Size, by_count: Size) -> Scratch:
    """The net of one size, its crop no larger than pictures are, or need be."""
    crop = min(size.crop, max(rules.SMALLEST_CROP, 32 * math.ceil(look.sizes.shorter[1] / 32)))
    papers = size is rules.SIZES[-1]
    nets = ("A", "D", "D") if papers else ("A", "D") if train >= rules.DEEPER_FROM else ("A",)
    epochs = rules.PAPER_EPOCHS if papers else epochs_for(math.ceil(train / size.batch))
    gmacs = sum(rules.A_GMACS if net == "A" else rules.D_GMACS for net in nets) * size.width**2 * (crop / 224) ** 2
    rates = rules.WIDE_GFLOPS if size.width >= 0.5 else rules.NARROW_GFLOPS
    hours = TRAINING * gmacs * train * epochs / gflops(machine, rates, precision) / HOUR_S
    return Scratch(size, by_count, crop, not papers and suits_whole(look.sizes), nets, epochs, hours)


def epochs_for(iterations: int) -> int:
    """Epochs that give the tried number of iterations, within bounds."""
    return min(max(round(rules.ITERATIONS / iterations), rules.FEWEST_EPOCHS), rules.MOST_EPOCHS)


def suits_whole(sizes: Sizes) -> bool:
    """Whether pictures are alike enough in shape for each to be squeezed into one square."""
    middle = sizes.aspect[1]
    return sizes.spread <= rules.WHOLE_SPREAD and max(middle, 1 / middle) <= rules.WHOLE_ASPECT


def gflops(machine: Machine, rates: Mapping[str, float], precision: Float) -> float:
    """GFLOP/s that the machine may reach."""
    return rules.GPU_GFLOPS[precision] if machine.gpu else machine.cores * rates[precision]


def choose_scales(look: FolderLook, machine: Machine, precision: Float) -> Scales:
    """The largest scales of a linear stage that the pictures' sizes, the time and the memory allow."""
    side = look.sizes.shorter[1]
    fitting = [scales for scales in rules.SCALES if scales[-1] <= rules.SCALE_TO_SIDE * side] or [rules.SMALL_SCALES]
    why = "" if fitting[0] is rules.SCALES[0] else f"pictures are small ({side} px)"
    for scales in fitting:
        hours = features_hours(look, machine, precision, scales)
        if hours <= rules.LINEAR_HOURS and features_gib(look.pictures, scales) <= rules.MEMORY_SHARE * memory_gib(machine):
            return Scales(scales, hours, why)
        why = f"larger ones would take more than {rules.LINEAR_HOURS:g} h or {rules.MEMORY_SHARE:.0%} of memory here"
    return Scales(rules.FAST_SCALES, features_hours(look, machine, precision, rules.FAST_SCALES), why)


def features_hours(look: FolderLook, machine: Machine, precision: Float, scales: Sequence[int]) -> float:
    """Hours of the forward passes; a picture twice as wide as high costs twice as much."""
    long = max(look.sizes.aspect[1], 1 / look.sizes.aspect[1])
    gmacs = sum(rules.D_TO_GROUP_4_GMACS * (scale / 224) ** 2 * long for scale in scales)
    return FORWARD * gmacs * look.pictures / gflops(machine, rules.WIDE_GFLOPS, precision) / HOUR_S


def features_gib(pictures: int, scales: Sequence[int]) -> float:
    """GiB of the features that the fit holds, float64: averages and maxima of the groups' channels at each scale."""
    values = 2 * sum(rules.GROUP_CHANNELS[group] for group in rules.GROUPS) * len(scales)
    return pictures * values * FLOAT64_BYTES / 2**30


def memory_gib(machine: Machine) -> float:
    """The machine's memory, a modest one where it is not known."""
    return machine.memory_gib or rules.UNKNOWN_GIB


def micro_batch(machine: Machine, precision: Float, size: Size) -> int:
    """Pictures a forward pass that the memory holds, a power of two; 0 where the whole batch fits."""
    memory = rules.MEMORY_SHARE * 1024 * (machine.gpu_gib if machine.gpu else memory_gib(machine))
    fit = int(memory / (rules.KEPT_MIB[precision] * size.width * (size.crop / 224) ** 2))
    return 0 if fit >= size.batch else 2 ** int(math.log2(max(fit, 1)))
