"""The split rules: which pictures teach, which steer and which are reported; never a draw from the seed."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vggcore.counter_hash import hash64, uniforms
from vggcore.digest import digest
from vggcore.errors import DatasetError
from vggcore.recipe import SPLITS, Split
from vggcore.whole_file import whole_file


def content_words(contents: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The content digests, 32 hex characters each, as two 64-bit words each."""
    return (
        np.array([int(content[:16], 16) for content in contents], np.uint64),
        np.array([int(content[16:], 16) for content in contents], np.uint64),
    )


def split_at(draws: NDArray[np.float64], rule: Split) -> list[str]:
    """The split of each uniform draw: test lowest, then val, then train, so that a changed share moves few pictures."""
    return ["test" if u < rule.test else "val" if u < rule.test + rule.val else "train" for u in draws.tolist()]


def split_by_hash(contents: Sequence[str], rule: Split) -> list[str]:
    """Each picture's split from its content alone, whatever other pictures there are; shares hold on average."""
    return split_at(uniforms("split", *content_words(contents)), rule)


def groups_of(paths: Sequence[str], pattern: str) -> list[str]:
    """Each path's group: what the pattern's first capture group matched, or the whole match where it has none.

    Raises DatasetError for a path that does not match.
    """
    expression, groups = re.compile(pattern), []
    for path in paths:
        found = expression.search(path)
        group = found and found[1 if expression.groups else 0]
        if group is None:
            raise DatasetError(f"{path}: split.group {pattern!r} does not match this path; every picture needs its group")
        groups.append(group)
    return groups


def split_by_group(groups: Sequence[str], rule: Split) -> list[str]:
    """Each picture's split from its group's name alone: a whole group stands in one split."""
    names = sorted(set(groups))
    draws = np.array([float(uniforms("split of groups", name)) for name in names])
    split_of = dict(zip(names, split_at(draws, rule), strict=True))
    return [split_of[group] for group in groups]


def split_stratified(labels: Sequence[str], contents: Sequence[str], rule: Split, known: dict[str, str]) -> list[str]:
    """Each picture's split with the rule's shares in every class, in order of a hash of the content.

    known: splits given at earlier scans, by content; they stay. New contents go, class by class, to whichever split is
    furthest under its share. Without known ones each class's counts are its shares to within one picture (largest
    remainder), counted in different contents: copies go with their original.
    """
    order = hash64("split order", *content_words(contents))
    split_of = dict(known)
    for label in sorted(set(labels)):
        rows = zip(contents, order.tolist(), labels, strict=True)
        of_class = {content: number for content, number, its_label in rows if its_label == label}
        wanted = whole_shares(len(of_class), rule)
        have = Counter(split_of[content] for content in of_class if content in split_of)
        for content in sorted(of_class, key=lambda content: (of_class[content], content)):
            if content not in split_of:
                split = max(SPLITS, key=lambda name: wanted[name] - have[name])
                split_of[content] = split
                have[split] += 1
    return [split_of[content] for content in contents]


def whole_shares(number: int, rule: Split) -> dict[str, int]:
    """How many of `number` pictures each split gets: shares rounded down, what is left by largest remainder."""
    shares = {"train": 1.0 - rule.val - rule.test, "val": rule.val, "test": rule.test}
    exact = {name: number * share for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(SPLITS, key=lambda name: (counts[name] - exact[name], SPLITS.index(name)))
    for name in by_remainder[: number - sum(counts.values())]:
        counts[name] += 1
    return counts


def memory_file(store: Path, rule: Split) -> Path:
    """Where the stratified splits of these shares are remembered."""
    shares = {"val": rule.val, "test": rule.test, **({"gate": rule.gate} if rule.gate else {})}
    return store / "data" / "splits" / f"{digest(shares, hex_characters=16)}.parquet"


def reservoir(rule: Split) -> Split:
    """The rule that pictures are shared out by where there is a gate: its share is test's, and it is chosen from test."""
    return rule.model_copy(update={"test": rule.test + rule.gate, "gate": 0.0})


def read_memory(path: Path) -> dict[str, str]:
    """The remembered splits by content; empty where there is no memory yet."""
    if not path.exists():
        return {}
    table = pq.read_table(path)
    return dict(zip(table["content"].to_pylist(), table["split"].to_pylist(), strict=True))


def write_memory(path: Path, split_of: dict[str, str]) -> None:
    """Writes the remembered splits, whole or not at all."""
    contents = sorted(split_of)
    with whole_file(path) as part:
        pq.write_table(pa.table({"content": contents, "split": [split_of[content] for content in contents]}), part)


def check_splits(place: str, classes: Sequence[str], labels: Sequence[str], splits: Sequence[str], by: str) -> list[str]:
    """Notes on classes that are missing from val or test.

    Raises DatasetError for a split without pictures, and for a class that has none in train.
    """
    counts = Counter(zip(labels, splits, strict=True))
    totals = Counter(splits)
    for split in SPLITS:
        if not totals[split]:
            found = ", ".join(f"{totals[name]:,} in {name}" for name in SPLITS)
            cure = f"add pictures under {split}/" if by == "folder" else "add pictures, or change split.val or split.test"
            raise DatasetError(f"{place}: no picture in {split} (found {found}); each split needs some: {cure}")
    notes = []
    for label in classes:
        if not counts[label, "train"]:
            found = ", ".join(f"{counts[label, name]:,} in {name}" for name in SPLITS)
            raise DatasetError(
                f"{place}: class {label!r} has no picture in train (found {found}); a class is learnt from train alone:"
                " add pictures there, or remove the class"
            )
        for split in ("val", "test"):
            if not counts[label, split]:
                notes.append(f"class {label!r} has no picture in {split}: {split} says nothing about it")
    return notes
