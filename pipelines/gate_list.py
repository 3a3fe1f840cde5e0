"""The gate list: which pictures alone decide promotions, chosen once for a set of pictures and kept in the store.

    STORE/gates/<key>/current.json           which list is in force: {"digest"}, or {"same_as": another key}
    STORE/gates/<key>/<digest>/list.parquet  content, class, dhash, group
    STORE/gates/<key>/<digest>/list.json     digest, made, from_fingerprint, share, pictures
    STORE/gates/<key>/<digest>/uses.jsonl    a line for each decision that looked at the list (deploy writes them)

The key is a digest of where the pictures are (root or source), and of nothing else: a scan knows neither a recipe's name nor
a model's, and one list must hold for every recipe, seed and split that reads the same pictures. A root that is new to the
store, but has half of a known list's pictures or more, is that folder moved or copied: it goes on with that list and its uses.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.near_duplicates import components, near_pairs, nearest_listed
from pipelines.split import content_words
from vggcore.class_order import spoken_classes
from vggcore.counter_hash import uniforms
from vggcore.digest import digest
from vggcore.errors import DatasetError, StoreError
from vggcore.recipe import Data, Split
from vggcore.whole_file import whole_file, write_json

LIST, ABOUT, USES, CURRENT = "list.parquet", "list.json", "uses.jsonl", "current.json"
SCHEMA = pa.schema(
    [
        pa.field("content", pa.string(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        pa.field("dhash", pa.uint64(), nullable=False),
        pa.field("group", pa.string()),
    ]
)


@dataclass(frozen=True)
class GateList:
    """A stored list, sorted by content; home is STORE/gates/<key>."""

    home: Path
    digest: str                       # 32 hex characters of contents and classes
    contents: tuple[str, ...]
    classes: tuple[str, ...]          # each picture's class when the list was made: later changes of labels do not count
    dhashes: NDArray[np.uint64]
    groups: tuple[str | None, ...]    # None but for a split by group
    share: float                      # as the recipe had it; 0.0 for a folder gate/
    made: str                         # ISO 8601, UTC

    @property
    def folder(self) -> Path:
        """Where list and uses lie."""
        return self.home / self.digest


@dataclass(frozen=True)
class Row:
    """What the choice must know of each picture of a scan."""

    path: str
    label: str
    content: str
    dhash: int
    group: str | None


def gate_key(data: Data, root: Path) -> str:
    """16 hex characters for the pictures' place; see the module."""
    place = {"source": data.source} if data.source else {"root": os.path.abspath(root)}  # noqa: PTH100 (keeps links)
    return digest(place, hex_characters=16)


def find_gate(store: Path, data: Data, root: Path, contents: Collection[str]) -> GateList | None:
    """The list in force for these pictures, or None; `contents` are the scan's, by which a moved folder is known again."""
    home = store / "gates" / gate_key(data, root)
    found = read_gate(home)
    if found is not None or not (store / "gates").is_dir():
        return found
    have = set(contents)
    for other in sorted((store / "gates").iterdir()):
        known = read_gate(other) if not same_as(other) else None
        if known is not None and 2 * len(have.intersection(known.contents)) >= len(known.contents):
            write_json(home / CURRENT, {"same_as": other.name})
            return known
    return None


def same_as(home: Path) -> str | None:
    """The key of the gate that a moved folder goes on with, or None."""
    try:
        return json.loads((home / CURRENT).read_text(encoding="utf-8")).get("same_as")  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def read_gate(home: Path) -> GateList | None:
    """The list in force in STORE/gates/<key>, None where there is none; StoreError where it is broken."""
    if not (home / CURRENT).exists():
        return None
    try:
        current = json.loads((home / CURRENT).read_text(encoding="utf-8"))
        if "same_as" in current:
            return read_gate(home.parent / current["same_as"])
        about = json.loads((home / current["digest"] / ABOUT).read_text(encoding="utf-8"))
        table = pq.read_table(home / current["digest"] / LIST)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise StoreError(f"{home}: the gate list cannot be read ({error}); put it back from a copy of the store") from error
    return GateList(
        home=home,
        digest=about["digest"],
        contents=tuple(table["content"].to_pylist()),
        classes=tuple(table["class"].to_pylist()),
        dhashes=table["dhash"].to_numpy().astype(np.uint64),
        groups=tuple(table["group"].to_pylist()),
        share=about["share"],
        made=about["made"],
    )


def make_gate(home: Path, rows: Sequence[Row], *, share: float) -> GateList:
    """A list of these pictures, not written yet."""
    chosen = sorted(rows, key=lambda row: row.content)
    contents, classes = tuple(row.content for row in chosen), tuple(row.label for row in chosen)
    return GateList(
        home=home,
        digest=digest(list(zip(contents, classes, strict=True)), hex_characters=32),
        contents=contents,
        classes=classes,
        dhashes=np.array([row.dhash for row in chosen], np.uint64),
        groups=tuple(row.group for row in chosen),
        share=share,
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def write_gate(gate: GateList, *, fingerprint: str) -> None:
    """Writes a list and, last, puts it in force; one that is in force already is left as it is."""
    known = read_gate(gate.home)
    if known is not None and known.digest == gate.digest:
        return
    columns = {"content": gate.contents, "class": gate.classes, "dhash": gate.dhashes, "group": gate.groups}
    with whole_file(gate.folder / LIST) as part:
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}, schema=SCHEMA), part)
    about = {"digest": gate.digest, "made": gate.made, "from_fingerprint": fingerprint, "share": gate.share}
    write_json(gate.folder / ABOUT, {**about, "pictures": len(gate.contents)})
    write_json(gate.home / CURRENT, {"digest": gate.digest})


def listed_before(home: Path) -> set[str]:
    """The contents of every list that was ever in force here."""
    found: set[str] = set()
    for path in home.glob(f"*/{LIST}"):
        found.update(pq.read_table(path, columns=["content"])["content"].to_pylist())
    return found


def choose(rows: Sequence[Row], splits: Sequence[str], rule: Split, *, before: Collection[str]) -> list[Row]:
    """The pictures of a new list: the share gate / (gate + test) of those in test, class by class, one of each likeness.

    splits: as shared out with test = test + gate. Chosen from test alone, lowest draws first: so no model that was trained
    with the same shares has learnt from them, not even one from before there was a gate. Pictures with a near-duplicate
    outside test are taken last, as each costs the training set its likeness. before: contents never to be chosen again.
    With groups, whole groups are chosen. Raises DatasetError where that gives no picture, or a new list half the size.
    """
    share = rule.gate / (rule.gate + rule.test)
    likeness = likenesses(rows)
    outside = {like for like, split in zip(likeness, splits, strict=True) if split != "test"}
    labels_of: dict[str, set[str]] = {}
    for row in rows:
        labels_of.setdefault(row.content, set()).add(row.label)
    order = uniforms("split", *content_words([row.content for row in rows])).tolist()
    free, taken = [], set()
    for place in sorted(range(len(rows)), key=lambda place: (likeness[place] in outside, order[place], rows[place].path)):
        row = rows[place]
        alone = likeness[place] not in taken and len(labels_of[row.content]) == 1
        if splits[place] == "test" and alone and row.content not in before:
            taken.add(likeness[place])
            free.append(row)
    if rule.by == "group":
        groups = sorted({row.group for row in free if row.group}, key=lambda name: float(uniforms("split of groups", name)))
        some = set(groups[: at_least_one(share * len(groups), len(groups))])
        chosen = [row for row in free if row.group in some]
    else:
        reservoir = Counter(rows[place].label for place, split in enumerate(splits) if split == "test")
        wanted = {label: at_least_one(share * count, count) for label, count in reservoir.items()}
        chosen, have = [], Counter[str]()
        for row in free:
            if have[row.label] < wanted[row.label]:
                have[row.label] += 1
                chosen.append(row)
        if before and 2 * len(chosen) < sum(wanted.values()):
            raise DatasetError(
                f"split.gate = {rule.gate}: {len(chosen):,} pictures of test were on no earlier list, and a new one wants"
                f" {sum(wanted.values()):,}; add pictures, or raise split.test"
            )
    if not chosen:
        why = "every picture of test was on an earlier list" if before else "too few pictures in test"
        raise DatasetError(f"split.gate = {rule.gate}: no picture for a gate list ({why}); add pictures, or raise split.test")
    return chosen


def at_least_one(wanted: float, count: int) -> int:
    """`wanted` rounded, at least 1 and at most all but one of `count`; 0 of a single one."""
    return min(max(1, round(wanted)), count - 1)


def likenesses(rows: Sequence[Row]) -> list[int]:
    """For each picture the number of its likeness: copies, near-duplicates and their near-duplicates have the same."""
    first: dict[str, int] = {}
    copies = [(first.setdefault(row.content, place), place) for place, row in enumerate(rows)]
    near = near_pairs(np.array([row.dhash for row in rows], np.uint64))
    found = components(np.concatenate([np.array(copies, np.int64).reshape(-1, 2), near]), len(rows))
    return [int(number) for number in found]


def sort_out(gate: GateList, rows: Sequence[Row]) -> tuple[set[int], dict[int, str]]:
    """Places in `rows` that are the gate's, one for each content that is there, and those left out, with the reason.

    Left out, neither learnt from nor measured on: copies and near-duplicates of gate pictures, and other pictures of the
    groups that the gate was given. Nothing else touches them; once the list is renewed they are pictures like any other.
    """
    class_of = dict(zip(gate.contents, gate.classes, strict=True))
    home: dict[str, int] = {}
    for place, row in enumerate(rows):
        its = class_of.get(row.content)
        if its is not None and (row.content not in home or (row.label == its and rows[home[row.content]].label != its)):
            home[row.content] = place
    near = nearest_listed(np.array([row.dhash for row in rows], np.uint64), gate.dhashes).tolist()
    groups = {group for group in gate.groups if group is not None}
    out: dict[int, str] = {}
    for place, row in enumerate(rows):
        if row.content in home:
            if home[row.content] != place:
                out[place] = f"a copy of gate picture {rows[home[row.content]].path}"
        elif near[place] >= 0:
            at = home.get(gate.contents[near[place]])
            out[place] = f"a near-duplicate of gate picture {rows[at].path if at is not None else gate.contents[near[place]]}"
        elif row.group in groups:
            out[place] = f"of group {row.group!r}, which the gate has"
    return set(home.values()), out


def gate_notes(gate: GateList, rows: Sequence[Row], mine: Collection[int], left_out: dict[int, str]) -> list[str]:
    """What a scan says of the gate: pictures left out, gone, or in another class than when the list was made."""
    notes = []
    if left_out:
        first = min(left_out)
        notes.append(
            f"left out for the gate: {len(left_out):,} pictures, the first is {rows[first].path!r} ({left_out[first]});"
            " all are in held_out.csv"
        )
    gone = len(gate.contents) - len(mine)
    if gone:
        notes.append(
            f"{gone:,} of {len(gate.contents):,} gate pictures are not there any more: nothing is promoted until they are"
            " back, or `vggrow models renew-gate` makes a new list"
        )
    class_of = dict(zip(gate.contents, gate.classes, strict=True))
    changed = [place for place in sorted(mine) if rows[place].label != class_of[rows[place].content]]
    if changed:
        row = rows[changed[0]]
        notes.append(
            f"{len(changed):,} gate pictures have another class than when the list was made, the first is {row.path!r}"
            f" (then {class_of[row.content]!r}): the gate goes by the list, until `vggrow models renew-gate`"
        )
    absent = sorted({row.label for row in rows}.difference(gate.classes))
    if absent:
        has = "has" if len(absent) == 1 else "have"
        notes.append(
            f"{spoken_classes(absent)} {has} no picture on the gate list: promotions are decided by the others alone, until"
            " `vggrow models renew-gate` makes a new list"
        )
    return notes
