"""The manifest: which pictures there are, what each is, and the fingerprint that names this state of the data."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.colour import SUMS, Colour
from vggcore.class_order import grown_order
from vggcore.digest import digest
from vggcore.errors import StoreError
from vggcore.recipe import GATE, SPLITS
from vggcore.whole_file import whole_file, write_json

SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # relative to the root, with "/"
        pa.field("class", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # as decoded: EXIF orientation applied
        pa.field("width", pa.int32(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("content", pa.string(), nullable=False),  # blake2b-128 of the file, hex
        pa.field("group", pa.string()),
        *(pa.field(name, pa.int64(), nullable=False) for name in SUMS),
    ]
)
# What a scan writes; manifests of before the gate end with SCHEMA, and are read as they are.
SCANNED = SCHEMA.append(pa.field("dhash", pa.uint64(), nullable=False))  # pipelines.near_duplicates
HEADER = b"vggrow"  # the key of our own JSON in the Parquet file's metadata


@dataclass(frozen=True, order=True)
class Quarantined:
    """A file that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class GateName:
    """Which gate list a manifest was made with: STORE/gates/<key>/<digest>."""

    key: str
    digest: str


@dataclass(frozen=True)
class Pictures:
    """The pictures of one split, in the order of their paths; every array has one entry a picture."""

    root: Path
    paths: NDArray[np.object_]  # str, relative to root
    labels: NDArray[np.int64]  # index into the manifest's classes
    heights: NDArray[np.int64]  # pixels, EXIF orientation applied
    widths: NDArray[np.int64]
    contents: NDArray[np.object_]  # str, 32 hex characters

    def __len__(self) -> int:
        return len(self.paths)

    def some(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> "Pictures":
        """Those that a mask or row numbers name, in that order."""
        columns = {name: getattr(self, name)[which] for name in ("paths", "labels", "heights", "widths", "contents")}
        return replace(self, **columns)


@dataclass(frozen=True)
class Manifest:
    """One state of the data: root is absolute, table as SCHEMA, sorted by path; classes number the labels.

    A scan, and what is kept of it, has classes sorted by name; whoever trains or evaluates puts them in the model's order.
    """

    root: Path
    classes: tuple[str, ...]
    table: pa.Table
    fingerprint: str
    colour: Colour
    quarantine: tuple[Quarantined, ...]
    notes: tuple[str, ...]
    gate: GateName | None = None
    held_out: tuple[Quarantined, ...] = ()  # pictures that the gate keeps out of every split

    def in_order(self, known: Sequence[str]) -> "Manifest":
        """The same pictures with the classes of `known` first, in its order, and others after them, sorted."""
        return replace(self, classes=grown_order(known, self.classes))

    def split(self, name: str) -> Pictures:
        """The pictures of split `name`: "train", "val", "test" or "gate" (none where there is no gate list)."""
        assert name in (*SPLITS, GATE), name
        return self.pictures_of(self.table.filter(pc.equal(self.table["split"], name)))

    def pictures_of(self, rows: pa.Table) -> Pictures:
        """Rows of `table` as pictures."""
        number_of = {label: number for number, label in enumerate(self.classes)}
        return Pictures(
            root=self.root,
            paths=np.array(rows["path"].to_pylist(), object),
            labels=np.array([number_of[label] for label in rows["class"].to_pylist()], np.int64),
            heights=rows["height"].to_numpy().astype(np.int64),
            widths=rows["width"].to_numpy().astype(np.int64),
            contents=np.array(rows["content"].to_pylist(), object),
        )


def fingerprint_of(table: pa.Table) -> str:
    """32 hex characters for the rows (path, class, split, content), sorted: the same pictures in the same splits."""
    columns = [table[name].to_pylist() for name in ("path", "class", "split", "content")]
    return digest(sorted(zip(*columns, strict=True)), hex_characters=32)


def duplicate_notes(paths: Sequence[str], labels: Sequence[str], splits: Sequence[str], contents: Sequence[str]) -> list[str]:
    """Notes on files of the same bytes: in two classes (a label is wrong), in two splits (a leak), or merely twice."""
    copies: dict[str, list[int]] = {}
    for number, content in enumerate(contents):
        copies.setdefault(content, []).append(number)
    conflicts, leaks, plain = [], [], []
    for numbers in copies.values():
        if len(numbers) == 1:
            continue
        in_classes, in_splits = {labels[number] for number in numbers}, {splits[number] for number in numbers}
        if len(in_classes) > 1:
            conflicts.append(numbers)
        if len(in_splits) > 1:
            leaks.append(numbers)
        if len(in_classes) == len(in_splits) == 1:
            plain.append(numbers)
    notes = []
    for found, meaning in (
        (conflicts, "in two classes (label conflict: one label is wrong)"),
        (leaks, "in two splits (leak: test or val measures what train has seen)"),
        (plain, "twice or more in one class and split (each copy counts)"),
    ):
        if found:
            first = " and ".join(repr(paths[number]) for number in found[0][:2])
            notes.append(f"the same picture {meaning}: {len(found):,} found, the first is {first}")
    return notes


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes quarantine.csv, colour.json and, last, manifest.parquet to `folder`, each whole or not at all.

    Where a gate keeps pictures out, held_out.csv lists them.
    """
    header = {
        "root": str(manifest.root),
        "classes": manifest.classes,
        "notes": manifest.notes,
        "fingerprint": manifest.fingerprint,
        **({"gate": asdict(manifest.gate)} if manifest.gate else {}),
    }
    write_quarantine(manifest.quarantine, folder / "quarantine.csv")
    if manifest.held_out:
        write_quarantine(manifest.held_out, folder / "held_out.csv")
    write_json(folder / "colour.json", manifest.colour.to_json())
    with whole_file(folder / "manifest.parquet") as part:
        pq.write_table(manifest.table.replace_schema_metadata({HEADER: json.dumps(header)}), part)


def write_quarantine(quarantine: Sequence[Quarantined], path: Path) -> None:
    """Writes the list as CSV with a heading, whole or not at all."""
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "reason"))
        writer.writerows((bad.path, bad.reason) for bad in quarantine)


def read_manifest(folder: Path) -> Manifest:
    """What write_manifest wrote to `folder` (STORE/data/<fingerprint>); StoreError where that is absent or broken."""
    try:
        table = pq.read_table(folder / "manifest.parquet")
        header = json.loads(table.schema.metadata[HEADER])
        colour = Colour.from_json(json.loads((folder / "colour.json").read_text(encoding="utf-8")))
        quarantine = read_quarantine(folder / "quarantine.csv")
        held_out = read_quarantine(folder / "held_out.csv") if (folder / "held_out.csv").exists() else ()
        gate = GateName(**header["gate"]) if "gate" in header else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise StoreError(f"{folder}: no whole manifest here ({error}); run `vggrow data scan` on the recipe") from error
    return Manifest(
        root=Path(header["root"]),
        classes=tuple(header["classes"]),
        table=table.replace_schema_metadata(None),
        fingerprint=header["fingerprint"],
        colour=colour,
        quarantine=quarantine,
        notes=tuple(header["notes"]),
        gate=gate,
        held_out=held_out if gate else (),
    )


def read_quarantine(path: Path) -> tuple[Quarantined, ...]:
    """What write_quarantine wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return tuple(Quarantined(path, reason) for path, reason in list(csv.reader(file))[1:])


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest's summary for programs (`--json`); the pictures themselves are in manifest.parquet."""
    sides = shorter_sides(manifest)
    return {
        "root": str(manifest.root),
        "fingerprint": manifest.fingerprint,
        "classes": list(manifest.classes),
        "pictures": split_counts(manifest),
        "shorter_side": {"smallest": int(sides.min()), "median": int(np.median(sides)), "largest": int(sides.max())},
        "bytes": int(pc.sum(manifest.table["bytes"]).as_py()),
        "different_contents": int(pc.count_distinct(manifest.table["content"]).as_py()),
        "colour": manifest.colour.to_json(),
        "quarantine": [{"path": bad.path, "reason": bad.reason} for bad in manifest.quarantine],
        **({"gate": asdict(manifest.gate) | {"held_out": len(manifest.held_out)}} if manifest.gate else {}),
        "notes": list(manifest.notes),
    }


def scan_summary(manifest: Manifest) -> list[str]:
    """The manifest's summary for people, a line each: counts by class and split, sizes, colours, what is amiss."""
    counts, sides = split_counts(manifest), shorter_sides(manifest)
    first = max(len("class"), *(len(label) for label in manifest.classes))
    rows = [(label, [counts[split][label] for split in counts]) for label in manifest.classes]
    rows.append(("all", [sum(counts[split].values()) for split in counts]))
    copies = manifest.table.num_rows - int(pc.count_distinct(manifest.table["content"]).as_py())
    red_green_blue = ", ".join(f"{value:.1f}" for value in manifest.colour.mean)
    deviations = ", ".join(f"{value:.1f}" for value in manifest.colour.deviation)
    return [
        f"{manifest.table.num_rows:,} pictures in {len(manifest.classes)} classes below {str(manifest.root)!r}",
        f"{'class':<{first}}" + "".join(f"{split:>10}" for split in counts),
        *(f"{label:<{first}}" + "".join(f"{number:>10,}" for number in numbers) for label, numbers in rows),
        f"shorter side: {sides.min():,} to {sides.max():,} px, median {int(np.median(sides)):,}",
        f"mean RGB of train: {red_green_blue} (0..255); deviation {deviations}",
        f"duplicates: {copies:,}; quarantined: {len(manifest.quarantine):,}",
        *(f"  {bad.path}: {bad.reason}" for bad in manifest.quarantine[:5]),
        *(["  ... the others are in quarantine.csv"] if len(manifest.quarantine) > 5 else []),
        *(f"note: {note}" for note in manifest.notes),
        f"fingerprint: {manifest.fingerprint}",
    ]


def split_counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Pictures by split and class; "gate" only where there is a gate list."""
    counts = Counter(zip(manifest.table["split"].to_pylist(), manifest.table["class"].to_pylist(), strict=True))
    splits = (*SPLITS, GATE) if manifest.gate else SPLITS
    return {split: {label: counts[split, label] for label in manifest.classes} for split in splits}


def shorter_sides(manifest: Manifest) -> NDArray[np.int64]:
    """The shorter side of every picture, pixels."""
    sides: NDArray[np.int64] = np.minimum(manifest.table["height"].to_numpy(), manifest.table["width"].to_numpy())
    return sides
