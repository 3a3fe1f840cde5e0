"""Drift: how this state of the data differs from the last that was trained on, and whether it got worse. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.manifest import Manifest
from pipelines.near_duplicates import has_near

COLOUR_STEP = 10.0       # levels of 255 by which a channel's mean may move before it is pointed out
COUNT_STEP = 0.5         # share by which a class may shrink before it is pointed out
FEW_BAD = 0.1            # below this share of max_bad a doubling says nothing: 1 bad file in 100,000 has become 2
NEAR_SHARE = 0.01        # share of pictures with a near-duplicate from which on a doubling is pointed out
MOST_NAMED = 3           # conflicts that a sentence names


@dataclass(frozen=True)
class Summary:
    """What drift needs to know of one state of the data; small enough to stand in a tick's record."""

    fingerprint: str
    classes: dict[str, int]              # pictures of each class, in the classes' order
    quarantined: int                     # files that were left out
    shorter_side: float                  # median, pixels
    colour: tuple[float, float, float]   # mean RGB of train, 0..255
    duplicates: int                      # pictures less different contents
    conflicts: dict[str, str]            # content digest: 'a.jpg' and 'b.jpg', the same picture in two classes
    near_duplicates: int | None = None   # pictures with another like them, copies included; None: an older record, or scan

    @property
    def pictures(self) -> int:
        """All pictures, of all splits."""
        return sum(self.classes.values())

    @property
    def bad_share(self) -> float:
        """The share of files that give no picture, 0..1."""
        return self.quarantined / max(1, self.quarantined + self.pictures)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def near_share(self) -> float | None:
        """The share of pictures that have a near-duplicate, 0..1; None where it is not known."""
        return None if self.near_duplicates is None else self.near_duplicates / max(1, self.pictures)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Summary":
        """What to_json gave, of this version or an earlier one."""
        return cls(**{**found, "colour": tuple(found["colour"])})


@dataclass(frozen=True)
class Moved:
    """Contents that came, that went, and that now stand in another class."""

    added: int
    removed: int
    relabelled: int


@dataclass(frozen=True)
class Drift:
    """This state of the data against the last.

    notes: what is worth a look; problems: why nothing should be trained on it before a person has looked. A sentence each.
    """

    last: Summary
    now: Summary
    moved: Moved | None                  # None: the last manifest is not in the store any more
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summarise(manifest: Manifest) -> Summary:
    """The summary of a manifest."""
    table = manifest.table
    paths, labels, contents = (table[name].to_pylist() for name in ("path", "class", "content"))
    counts = Counter(labels)
    sides = np.minimum(table["height"].to_numpy(), table["width"].to_numpy())
    near = int(has_near(table["dhash"].to_numpy().astype(np.uint64)).sum()) if "dhash" in table.column_names else None
    red, green, blue = (round(float(value), 2) for value in manifest.colour.mean)
    return Summary(
        fingerprint=manifest.fingerprint,
        classes={name: counts[name] for name in manifest.classes},
        quarantined=len(manifest.quarantine),
        shorter_side=float(np.median(sides)),
        colour=(red, green, blue),
        duplicates=len(contents) - len(set(contents)),
        conflicts=label_conflicts(paths, labels, contents),
        near_duplicates=near,
    )


def label_conflicts(paths: Sequence[str], labels: Sequence[str], contents: Sequence[str]) -> dict[str, str]:
    """Contents that stand in more than one class, each with two of its paths in words."""
    first: dict[str, tuple[str, str]] = {}
    found: dict[str, str] = {}
    for path, label, content in zip(paths, labels, contents, strict=True):
        path_before, label_before = first.setdefault(content, (path, label))
        if label != label_before and content not in found:
            found[content] = f"{path_before!r} and {path!r}"
    return found


def moved(last: Manifest, now: Manifest) -> Moved:
    """How many different contents came, went and changed their class."""
    before, after = (
        set(zip(one.table["content"].to_pylist(), one.table["class"].to_pylist(), strict=True)) for one in (last, now)
    )
    known, there = {content for content, _ in before}, {content for content, _ in after}
    return Moved(
        added=len(there - known),
        removed=len(known - there),
        relabelled=len({content for content, _ in after - before if content in known}),
    )


def compare(last: Summary, now: Summary, *, max_bad: float, contents: Moved | None = None) -> Drift:
    """What changed from `last` to `now`; max_bad: the recipe's share of files that may be bad, 0..1."""
    return Drift(last, now, contents, tuple(notable(last, now, contents)), tuple(worse(last, now, max_bad)))


def worse(last: Summary, now: Summary, max_bad: float) -> list[str]:
    """Why this data should not be trained on unseen: more bad files, a class lost, a picture in two classes."""
    problems = []
    files = now.quarantined + now.pictures
    shares = f"{now.quarantined:,} of {files:,} files do not decode ({now.bad_share:.2%}, last {last.bad_share:.2%})"
    if now.bad_share > last.bad_share and now.bad_share > max_bad:
        problems.append(f"{shares}, more than max_bad = {max_bad}")
    elif last.quarantined and now.bad_share >= 2 * last.bad_share and now.bad_share > FEW_BAD * max_bad:
        problems.append(f"{shares}, twice the share of the last time or more")
    for name, pictures in last.classes.items():
        if name not in now.classes:
            problems.append(f"class {name!r} is gone; it had {pictures:,} pictures")
    conflicts = [words for content, words in now.conflicts.items() if content not in last.conflicts]
    if conflicts:
        rest = f" and {len(conflicts) - MOST_NAMED:,} more" if len(conflicts) > MOST_NAMED else ""
        problems.append(f"the same picture in two classes: {'; '.join(conflicts[:MOST_NAMED])}{rest}")
    return problems


def notable(last: Summary, now: Summary, contents: Moved | None) -> list[str]:
    """What a person may want to look at; no reason to stop."""
    notes = [f"class {name!r} is new, with {now.classes[name]:,} pictures" for name in now.classes if name not in last.classes]
    for name, before in last.classes.items():
        after = now.classes.get(name)
        if after is not None and after < (1 - COUNT_STEP) * before:
            notes.append(f"class {name!r} has {after:,} pictures, it had {before:,}")
    if contents is not None and contents.relabelled:
        notes.append(f"{contents.relabelled:,} pictures changed their class")
    steps = [after - before for before, after in zip(last.colour, now.colour, strict=True)]
    if max(map(abs, steps)) > COLOUR_STEP:
        notes.append(f"the mean colour moved by {', '.join(f'{step:+.1f}' for step in steps)} (red, green, blue of 0..255)")
    if not 2 / 3 < now.shorter_side / last.shorter_side < 3 / 2:
        notes.append(f"the median shorter side is {now.shorter_side:g} px, it was {last.shorter_side:g}")
    if now.duplicates > last.duplicates:
        notes.append(f"{now.duplicates:,} pictures are copies of others, {last.duplicates:,} were")
    near, near_before = now.near_share, last.near_share
    if near is not None and near_before is not None and near > NEAR_SHARE and near >= 2 * near_before:
        notes.append(
            f"{now.near_duplicates:,} pictures have a near-duplicate ({near:.1%}),"
            f" {last.near_duplicates:,} had one ({near_before:.1%})"
        )
    return notes


def drift_text(drift: Drift) -> list[str]:
    """The drift for a person, a line each: the counts that changed, then notes and problems."""
    last, now = drift.last, drift.now
    changes = [
        f"{name} {last.classes.get(name, 0):,} -> {now.classes.get(name, 0):,}"
        for name in dict.fromkeys([*last.classes, *now.classes])
        if last.classes.get(name) != now.classes.get(name)
    ]
    if last.quarantined != now.quarantined:
        changes.append(f"bad files {last.quarantined:,} -> {now.quarantined:,}")
    counts = f": {', '.join(changes[:12])}{', ...' if len(changes) > 12 else ''}" if changes else ""
    came = drift.moved
    pictures = f" ({came.added:,} came, {came.removed:,} went)" if came is not None else ""
    return [
        f"pictures {last.pictures:,} -> {now.pictures:,}{pictures}{counts}",
        *(f"note: {note}" for note in drift.notes),
        *(f"worse: {problem}" for problem in drift.problems),
    ]
