"""The lines of a starter recipe that all kinds of recipe share: what a line is, data, precision, what is registered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deploy.machine import Machine
from deploy.starter import Float, Scratch, Sharing, choose_scratch, share_out
from pipelines.folder_look import FolderLook
from vggcore.published import PublishedWeights


class Setting(NamedTuple):
    """A line of the recipe: a key, its value, and why."""

    key: str
    value: Any
    reason: str


class Table(NamedTuple):
    """A table of the recipe; the heading of the first, top one is empty."""

    heading: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Facts:
    """All that a recipe is chosen by."""

    look: FolderLook
    machine: Machine
    root: str                               # the folder, as the recipe has it
    sharing: Sharing
    scratch: Scratch
    weights: PublishedWeights | None

    @property
    def precision(self) -> Float:
        """bfloat16 where the hardware has it."""
        return "bf16" if self.machine.bf16 else "fp32"


def facts_for(
    look: FolderLook, machine: Machine, *, root: str, weights: PublishedWeights | None, with_gate: bool
) -> Facts:
    """What to choose by. weights: published ones to start from, None: from random weights; with_gate: a gate split as well.

    Raises DatasetError for a class too small for the splits.
    """
    sharing = share_out(look, with_gate=with_gate)
    scratch = choose_scratch(look, machine, sharing.train, "bf16" if machine.bf16 else "fp32")
    return Facts(look, machine, root, sharing, scratch, weights)


FLIP = Setting("flip", True, "mirror images; set false where left and right differ, as in digits, letters and signs")
UPSIDE_DOWN = Setting(
    "flip_vertical", False, "photographs have an up; set true where there is none (tiles, cells, views from above)"
)


def data_table(facts: Facts, standardise: Setting | None) -> Table:
    """[data]: where the pictures are and how they are shared out."""
    sizes, sharing = facts.look.sizes, facts.sharing
    looked = f"{facts.look.pictures:,} pictures in {len(facts.look.counts):,} classes; {sizes.looked_at:,} headers were read"
    counts = ", ".join(f"{number:,} {part}" for part, number in sharing.counts.items())
    if sharing.rule is None:
        split: dict[str, Any] = {"by": "folder"}
        reason = f"the folders decide: {counts}"
    else:
        split = {name: value for name, value in sharing.rule.model_dump().items() if name != "group" and value}
        left = ", ".join(f"{number:,} {part}" for part, number in sharing.fewest.items())
        reason = f"{counts}; of the smallest class {left}"
    settings = [Setting("root", facts.root, looked), Setting("split", split, reason)]
    if sharing.rule is not None:
        settings[1] = settings[1]._replace(reason=f"{reason}. {series_hint(facts)}")
    return Table("[data]", (*settings, *([standardise] if standardise else [])))


def series_hint(facts: Facts) -> str:
    """What to do where pictures come in series, with the expression where folders inside the classes show them."""
    if facts.look.subfolders > 1:
        return (
            f"{facts.look.subfolders:,} folders stand inside the classes: if each is a series (a patient, a machine), keep it"
            """ in one split by { by = "group", group = "^[^/]+/(.+)/" }"""
        )
    return 'Pictures in series (one patient, one machine)? Use by = "group"'


def precision_setting(facts: Facts) -> Setting:
    """bf16 where the hardware has it."""
    if facts.machine.bf16:
        return Setting("precision", "bf16", "in this machine's hardware: about twice as fast as fp32")
    return Setting("precision", "fp32", "this machine has no bfloat16 in hardware")


def stages_evaluated(names: Sequence[str]) -> tuple[Setting, ...]:
    """All stages, where there are several."""
    return (Setting("stages", tuple(names), "all of them on test, to compare"),) if len(names) > 1 else ()


def register_table(facts: Facts, names: Sequence[str]) -> Table:
    """[register]: which stage, and what the first champion needs."""
    largest = max(facts.look.counts, key=lambda label: facts.look.counts[label])
    share = facts.look.counts[largest] / facts.look.pictures
    above = min(0.99, (math.floor(100 * share) + 1) / 100)      # a net that always answers with that class is below it
    floor = Setting("floor", above, f"test top-1 that the first champion needs: {largest!r} alone is {share:.1%}")
    best = (Setting("stage", "best on val", "test reports, and decides nothing"),) if len(names) > 1 else ()
    return Table("[register]", (*best, floor))


def about(hours: float) -> str:
    """A rough time: "about 3 minutes"."""
    for unit, size in (("hours", 1.0), ("minutes", 1 / 60), ("seconds", 1 / 3600)):
        number = hours / size
        if number >= 1.5 or unit == "seconds":
            return f"roughly {max(1, round(number)):,} {unit}"
    raise AssertionError("seconds are always told")
