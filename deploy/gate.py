"""The gate: whether a challenger takes the champion's place, decided from facts alone, with the reason in one sentence.

No MLflow, no clock, no files: facts in, decision out. What each condition means, and why: docs/adr/0006-gate-statistics.md.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from deploy.gate_classes import NewClass, grown_words
from vggcore.class_order import added_classes
from vggcore.digest import digest
from vggcore.errors import RecipeError
from vggcore.paired import FLIPS, Tally, alpha_of_use, gain_bounds, gain_test, power, strata_power, tally

Metric = Literal["top1", "balanced"]
Bools = NDArray[np.bool_]

SMALLEST_ALPHA = 2 / (1 + FLIPS)   # of one use: below it the sign-flip test's draws could not show anything
METRIC_NAMES = {"top1": "top-1 accuracy", "balanced": "balanced accuracy"}
ROUNDING = 1e-9                    # 52 times 0.05 / 52 is not 0.05 to the last bit
MOST_NAMED = 3                     # leaks, problems, classes that a sentence lists before it counts the rest


@dataclass(frozen=True)
class GateRules:
    """What a challenger must show. Shares are 0..1; RecipeError for rules that no decision could follow.

    alpha: the chance, over all `planned_uses` of one gate list together, that a model no better is promoted.
    min_gain: what the gain's lower bound must exceed. max_class_drop: how far a class's recall may fall.
    """

    metric: Metric = "top1"
    alpha: float = 0.05
    planned_uses: int = 52
    min_gain: float = 0.0
    max_class_drop: float = 0.05
    max_size_mib: float | None = None
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        metrics = " or ".join(map(repr, get_args(Metric)))
        check_rule("metric", self.metric, self.metric in get_args(Metric), metrics)
        check_rule("alpha", self.alpha, 0 < self.alpha <= 0.5, "a chance above 0, at most 0.5")
        whole = isinstance(self.planned_uses, int) and self.planned_uses >= 1
        check_rule("planned_uses", self.planned_uses, whole, "a whole number, 1 at least")
        check_rule("min_gain", self.min_gain, 0 <= self.min_gain < 1, "a share from 0 to below 1")
        check_rule("max_class_drop", self.max_class_drop, 0 <= self.max_class_drop <= 1, "a share from 0 to 1")
        for name, limit in (("max_size_mib", self.max_size_mib), ("max_latency_ms", self.max_latency_ms)):
            check_rule(name, limit, limit is None or 0 < limit < math.inf, "a number above 0, or none")
        most = int(self.alpha / SMALLEST_ALPHA)
        enough = self.alpha / self.planned_uses >= SMALLEST_ALPHA
        check_rule("planned_uses", self.planned_uses, enough, f"at most {most} at alpha {self.alpha:g}")


def check_rule(name: str, found: object, good: bool, wanted: str) -> None:
    """RecipeError unless the rule is good."""
    if not good:
        raise RecipeError(f"gate: {name} is {found!r}, wanted {wanted}")


@dataclass(frozen=True, eq=False)
class Score:
    """What one model said of each gate picture, and what it costs to serve.

    contents: the pictures' digests; labels int64 (n,) and posteriors float32 (n, classes) in their order.
    """

    model: str
    classes: tuple[str, ...]
    contents: tuple[str, ...]
    labels: NDArray[np.int64]
    posteriors: NDArray[np.float32]
    protocol: str
    scales: tuple[int, ...]
    size_mib: float
    latency_ms: float | None
    views: str = "none"            # over which its posteriors are averaged besides: its own, as it is served

    def __post_init__(self) -> None:
        pictures = len(self.contents)
        assert self.labels.shape == (pictures,) and self.posteriors.shape == (pictures, len(self.classes))
        assert not pictures or 0 <= self.labels.min() <= self.labels.max() < len(self.classes)


@dataclass(frozen=True)
class Check:
    """One condition in words: what was found, and what was wanted."""

    name: str
    passed: bool
    found: str
    wanted: str


@dataclass(frozen=True)
class ClassChange:
    """How a class's recall changed from champion to challenger, 0..1; low and high bound the change, -1..1."""

    name: str
    pictures: int
    champion_recall: float
    challenger_recall: float
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class Decision:
    """The verdict, its reason for a person, and the evidence; numbers are None or empty where the two can't be compared.

    gain, gain_low (lower bound, 1 - alpha), needed_gain: shares of the metric; needed_gain is what the gain had to be
    with as many differing pictures as here, power how often a challenger truly better by that much would pass.
    """

    promote: bool
    reason: str
    checks: tuple[Check, ...]
    metric: Metric
    p_value: float | None = None
    alpha_k: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    counts: dict[str, int] | None = None      # both_right, only_challenger, only_champion, both_wrong
    classes: tuple[ClassChange, ...] = ()     # those with a gate picture
    needed_gain: float | None = None          # infinity: no gain could be shown with so few pictures
    power: float | None = None
    challenger: str | None = None
    champion: str | None = None
    use: int | None = None
    new_classes: tuple[NewClass, ...] = ()    # those that the champion does not know, on test

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dumps(allow_nan=False); infinity becomes null."""
        found: dict[str, Any] = asdict(self)
        if self.needed_gain is not None and math.isinf(self.needed_gain):
            found["needed_gain"] = None
        return found


def first_decision(test_top1: float, floor: float) -> Decision:
    """Whether a first version, with no champion to compare it with, becomes champion: test top-1 at or above the floor."""
    check = Check("floor", test_top1 >= floor, f"test top-1 accuracy is {test_top1:.4f}", f"{floor:.4f} or above")
    return Decision(check.passed, verdict((check,), f"{check.found}, at or above the floor {floor:.4f}"), (check,), "top1")


def decide(
    challenger: Score,
    champion: Score,
    rules: GateRules,
    *,
    use: int,
    spent: float = 0.0,
    leaks: Sequence[str] = (),
    lineage_problems: Sequence[str] = (),
    new_classes: Sequence[NewClass] = (),
) -> Decision:
    """Promotes the challenger only if every condition holds; the reason names the first that does not.

    use: which use of this gate list this is, from 1. spent: how much of alpha the uses before it had: with rules that changed
    between them the planned uses alone would not bound it. leaks: gate pictures that either model, or an ancestor, was trained
    on. lineage_problems: what of the challenger's stage, data or code can't be found. Both in words, each refuses.
    A challenger may append classes to the champion's own: both are then scored on pictures of the champion's classes, and
    the challenger's answer is its highest posterior over all its classes. new_classes: reported, no condition.
    """
    same = (same_classes(challenger, champion), same_pictures(challenger, champion), same_protocol(challenger, champion))
    checks = [
        *same,
        few_uses(use, spent, rules),
        Check("leaks", not leaks, listed("gate pictures seen in training", leaks), "none; renew the list or train without"),
        Check("lineage", not lineage_problems, listed("lineage problems", lineage_problems), "stage, data and code on record"),
    ]
    alpha_k = alpha_of_use(rules.alpha, rules.planned_uses, use) if checks[len(same)].passed else 0.0
    evidence: dict[str, Any] = {}
    summary = ""
    if all(check.passed for check in same):
        evidence = compare(challenger, champion, rules, alpha_k)
        summary, found = judge(evidence, champion.classes, rules, alpha_k)
        checks += found
    checks += budgets(challenger, rules)
    return Decision(
        promote=all(check.passed for check in checks),
        reason=verdict(checks, summary),
        checks=tuple(checks),
        metric=rules.metric,
        alpha_k=alpha_k,
        challenger=challenger.model,
        champion=champion.model,
        use=use,
        new_classes=tuple(new_classes),
        **evidence,
    )


def few_uses(use: int, spent: float, rules: GateRules) -> Check:
    """Whether the gate list has a use left, and as much of alpha as this use may spend."""
    found = f"this is use {use} of the gate list, planned for {rules.planned_uses}"
    share = rules.alpha / rules.planned_uses
    if use <= rules.planned_uses and spent + share > rules.alpha * (1 + ROUNDING):
        found += f"; the uses before it had {spent:.3g} of alpha {rules.alpha:g}, and this one wants {share:.3g}"
        return Check("uses", False, found, "as much of alpha left; renew the list, or plan for more uses")
    return Check("uses", use <= rules.planned_uses, found, "a use that is left; renew the list")


def same_classes(challenger: Score, champion: Score) -> Check:
    """Whether both know the same classes in the same order, or the challenger others after all of the champion's."""
    wanted = "the champion's classes in their order, and new ones only after them; otherwise a person decides"
    if challenger.classes == champion.classes:
        return Check("classes", True, f"both have the same {len(champion.classes)} classes", wanted)
    grown = grown_words(champion.classes, challenger.classes)
    if grown is not None:
        return Check("classes", True, f"{grown}; judged on its {len(champion.classes)} classes", wanted)
    new, old = set(challenger.classes), set(champion.classes)
    if new == old:
        return Check("classes", False, "the classes stand in another order", wanted)
    added = listed("classes that only the challenger has", sorted(new - old))
    return Check("classes", False, f"{added}; {listed('only the champion', sorted(old - new))}", wanted)


def same_pictures(challenger: Score, champion: Score) -> Check:
    """Whether both were scored on the same pictures, each once and with the same labels, one at least."""
    wanted = "both scored on the whole gate list, each picture once"
    new, old = (dict(zip(score.contents, score.labels.tolist(), strict=True)) for score in (challenger, champion))
    if not challenger.contents or not champion.contents:
        return Check("pictures", False, "the gate list has no picture", wanted)
    if len(new) < len(challenger.contents) or len(old) < len(champion.contents):
        return Check("pictures", False, "a picture stands twice in the gate list", wanted)
    if new.keys() != old.keys():
        only_new, only_old = len(new.keys() - old.keys()), len(old.keys() - new.keys())
        found = f"{only_new} pictures only the challenger was scored on, {only_old} only the champion"
        return Check("pictures", False, found, wanted)
    differ = sum(new[content] != old[content] for content in new)
    if differ and added_classes(champion.classes, challenger.classes) is not None:
        return Check("pictures", False, f"{differ} pictures have another label in each score", wanted)
    return Check("pictures", True, f"both were scored on the same {len(new)} pictures", wanted)


def same_protocol(challenger: Score, champion: Score) -> Check:
    """Whether both were scored in the same way; linear heads, which have a protocol of their own, and what stands beside them
    are scored as they are served. The views that each averages over are its own.
    """
    new, old = (f"{score.protocol} at {', '.join(map(str, score.scales))}" for score in (challenger, champion))
    found = f"both by {new}" if new == old else f"the challenger was scored by {new}, the champion by {old}"
    if challenger.views != champion.views:
        found += f" (views: challenger {challenger.views}, champion {champion.views})"
    linear = "pooled" in (challenger.protocol, champion.protocol)
    return Check("protocol", new == old or linear, found, "the same protocol and test scales: score the champion again")


def compare(challenger: Score, champion: Score, rules: GateRules, alpha_k: float) -> dict[str, Any]:
    """The evidence of two comparable scores, by the names of Decision's fields."""
    order, other = np.argsort(np.array(challenger.contents)), np.argsort(np.array(champion.contents))
    labels = challenger.labels[order]
    new, old = right(challenger)[order], right(champion)[other]
    seed = int(digest(sorted(challenger.contents), hex_characters=16), 16)
    counts = tally(new, old, labels if rules.metric == "balanced" else None)
    p_value, needed = gain_test(counts, alpha=alpha_k, seed=seed)
    low, _ = gain_bounds(counts, tail=rules.alpha, seed=seed)
    needed = max(needed, rules.min_gain + counts.gain - low)
    if needed > 1:
        strength = 0.0
    elif rules.metric == "top1":
        strength = power(len(labels), counts.discordance, needed, alpha_k)
    else:
        strength = strata_power(counts, needed, needed)
    return {
        "p_value": p_value,
        "gain": counts.gain,
        "gain_low": low,
        "counts": {
            "both_right": int((new & old).sum()),
            "only_challenger": int((new & ~old).sum()),
            "only_champion": int((old & ~new).sum()),
            "both_wrong": int((~new & ~old).sum()),
        },
        "classes": class_changes(challenger.classes, labels, new, old, rules.alpha),
        "needed_gain": needed,
        "power": strength,
    }


def right(score: Score) -> Bools:
    """(n,) which pictures' label has the highest posterior; of equal ones the earlier class; not a number is wrong."""
    own = score.posteriors[np.arange(len(score.labels)), score.labels]
    found: Bools = (score.posteriors.argmax(axis=1) == score.labels) & ~np.isnan(own)
    return found


def class_changes(
    names: Sequence[str], labels: NDArray[np.int64], new: Bools, old: Bools, alpha: float
) -> tuple[ClassChange, ...]:
    """The change of each class that has pictures; the bounds share alpha over them, so that all hold together."""
    count = len(names)
    pictures, gained, lost, kept = (
        np.bincount(labels[which], minlength=count).astype(np.int64)
        for which in (np.ones_like(new), new & ~old, old & ~new, new & old)
    )
    present = np.flatnonzero(pictures)
    changes = []
    for place in present.tolist():
        n, one = int(pictures[place]), slice(place, place + 1)
        low, high = gain_bounds(Tally(pictures[one], gained[one], lost[one]), tail=alpha / len(present))
        recalls = float((kept + lost)[place] / n), float((kept + gained)[place] / n)
        changes.append(ClassChange(names[place], n, *recalls, float((gained - lost)[place] / n), low, high))
    return tuple(changes)


def judge(evidence: dict[str, Any], classes: Sequence[str], rules: GateRules, alpha_k: float) -> tuple[str, list[Check]]:
    """The statistical conditions, and the evidence as a sentence for a challenger that passed."""
    counts, p_value, gain, low = (evidence[name] for name in ("counts", "p_value", "gain", "gain_low"))
    passed = p_value <= alpha_k
    seen = (
        f"on {sum(counts.values())} gate pictures the challenger was right {counts['only_challenger']} times where the"
        f" champion was not, and {counts['only_champion']} times the other way round;"
        f"{' with every class weighing the same' if rules.metric == 'balanced' else ''} that happens by chance with"
        f" p = {p_value:.3g}, {'at or below' if passed else 'above'} {alpha_k:.2g}"
    )
    needed, power_there = evidence["needed_gain"], evidence["power"]
    can_show = "no gain can be shown with so few pictures" if needed > 1 else (
        f"with this split a gain of {points(needed)} points is needed, and it was {points(gain)} (a challenger truly better by"
        f" {points(needed)} points passes {100 * power_there:.0f} times in 100)"
    )
    name, share = METRIC_NAMES[rules.metric], f"{100 * (1 - rules.alpha):g} % confidence"
    bound = f"{name} gained {points(gain)} points, at least {points(low)} with {share}"
    checks = [
        Check("better", passed, f"{seen}; {can_show}", f"p at or below {alpha_k:.2g}"),
        Check("gain", low > rules.min_gain, bound, f"a lower bound above {points(rules.min_gain)} points"),
        class_recalls(evidence["classes"], len(classes), rules),
    ]
    return f"{seen}; {bound}", checks


def class_recalls(changes: Sequence[ClassChange], classes: int, rules: GateRules) -> Check:
    """Refuses where a class fell by more than max_class_drop and its interval leaves no doubt that it fell."""
    limit = points(rules.max_class_drop)
    wanted = f"no class that fell by more than {limit} points, its interval below 0"
    by_change = sorted(changes, key=lambda one: (one.change, one.name))
    fell = [one for one in by_change if one.change < -rules.max_class_drop and one.high < 0]
    if fell:
        more = f"; and {len(fell) - MOST_NAMED} classes more" if len(fell) > MOST_NAMED else ""
        return Check("class recalls", False, "; ".join(map(change_in_words, fell[:MOST_NAMED])) + more, wanted)
    unsure = sum(one.low < -rules.max_class_drop for one in changes)
    found = (
        f"no class is shown to have fallen by more than {limit} points; the lowest change: {change_in_words(by_change[0])};"
        f" such a fall can't be excluded in {unsure} of {len(changes)} classes"
    )
    empty = classes - len(changes)
    return Check("class recalls", True, found + (f"; {empty} more have no gate picture" if empty else ""), wanted)


def change_in_words(one: ClassChange) -> str:
    """A class's recalls, and its change with the interval."""
    return (
        f"class {one.name!r} went from {100 * one.champion_recall:.1f} to {100 * one.challenger_recall:.1f} % on"
        f" {one.pictures} pictures (change {points(one.change)} points, interval {points(one.low)} to {points(one.high)})"
    )


def budgets(challenger: Score, rules: GateRules) -> list[Check]:
    """Whether the challenger is small and fast enough, where the rules say."""
    checks = []
    if rules.max_size_mib is not None:
        found = f"the challenger takes {challenger.size_mib:.1f} MiB"
        checks.append(Check("size", challenger.size_mib <= rules.max_size_mib, found, f"at most {rules.max_size_mib:g} MiB"))
    if rules.max_latency_ms is not None:
        latency = challenger.latency_ms
        taken = "not measured" if latency is None else f"{latency:.1f} ms a picture"
        passed = latency is not None and latency <= rules.max_latency_ms
        checks.append(Check("latency", passed, f"the challenger's latency: {taken}", f"at most {rules.max_latency_ms:g} ms"))
    return checks


def verdict(checks: Sequence[Check], summary: str) -> str:
    """The reason: the summary when all passed, else the first condition that failed, and the names of the others."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return f"promoted: {summary}"
    first, others = failed[0], ", ".join(check.name for check in failed[1:])
    wanted = "" if first.name == "better" else f"; expected {first.wanted}"
    return f"refused: {first.found}{wanted}" + (f" (failed as well: {others})" if others else "")


def bare(reason: str) -> str:
    """A decision's reason without the verdict before it, for where the verdict stands already."""
    return re.sub(r"^(promoted by hand|promoted|refused): ", "", reason)


def listed(what: str, found: Sequence[str]) -> str:
    """How many of something, and the first of them by name."""
    names = ", ".join(found[:MOST_NAMED]) + (", ..." if len(found) > MOST_NAMED else "")
    return f"{what}: {len(found)}" + (f" ({names})" if found else "")


def points(share: float) -> str:
    """A share as percentage points with a decimal; never "-0.0"."""
    return f"{round(100 * share, 1) + 0.0:.1f}"
