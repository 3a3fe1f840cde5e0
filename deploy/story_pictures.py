"""The story's pictures: real solar cells, shared out into deliveries of which one is labelled wrongly and one is broken.

Each delivery goes into a folder that is watched, `pictures/<split>/<class>/<cell>.png`. What is in which delivery is fixed by a
digest of each cell's name, class by class, so that every run tells the same story.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipelines.sources import list_elpv

DEFECTIVE, FUNCTIONAL = "defective", "functional"      # the classes of the package elpv-dataset, in their order
OTHER = {DEFECTIVE: FUNCTIONAL, FUNCTIONAL: DEFECTIVE}
SIDE = 96                                             # pixels; the cells themselves have 300
PAGE = b"<!doctype html><title>502 Bad Gateway</title><h1>502 Bad Gateway</h1>\n"     # what a proxy saves as .png

# fmt: off
# How many cells each delivery has in each split. Why so many: deploy/story_page.py says it on the page.
DELIVERIES: dict[str, dict[str, int]] = {
    "first":  {"gate": 500, "train":  24, "val": 40, "test": 50},
    "second": {"train": 960, "val": 60, "test": 80},
    "third":  {"train": 260, "val": 20, "test": 20},
    "fourth": {"train": 160, "val": 20, "test": 20},
}
# fmt: on


@dataclass(frozen=True)
class Cell:
    """A picture of a delivery: where it comes from, and where it belongs."""

    source: Path
    split: str
    label: str

    def place(self, pictures: Path, label: str | None = None) -> Path:
        """Its file below `pictures`, under its own class or another."""
        return pictures / self.split / (label or self.label) / self.source.name


def share_out() -> dict[str, list[Cell]]:
    """The deliveries by name: every split of each has the classes in the shares of the whole set, to within one cell.

    Raises DatasetError where the package elpv-dataset is not installed.
    """
    listing = list_elpv(labels="certain", threshold=0.5)
    by_class: dict[str, list[str]] = {DEFECTIVE: [], FUNCTIONAL: []}
    for candidate in listing.candidates:
        by_class[candidate.label].append(candidate.path)
    share = len(by_class[DEFECTIVE]) / len(listing.candidates)
    left = {label: iter(sorted(paths, key=draw)) for label, paths in by_class.items()}
    found: dict[str, list[Cell]] = {}
    for name, splits in DELIVERIES.items():
        found[name] = []
        for split, cells in splits.items():
            counts = {DEFECTIVE: round(share * cells), FUNCTIONAL: cells - round(share * cells)}
            for label, count in counts.items():
                found[name] += [Cell(listing.root / path, split, label) for path in take(left[label], count)]
    return found


def draw(path: str) -> str:
    """A picture's place in the order: a digest of its name."""
    return hashlib.blake2b(path.encode(), digest_size=8).hexdigest()


def take(paths: Iterator[str], count: int) -> list[str]:
    """The next `count` paths; there are as many, or DELIVERIES is wrong."""
    return [next(paths) for _ in range(count)]


def picture(cell: Cell) -> bytes:
    """The cell as an 8-bit grey PNG of SIDE x SIDE pixels: decoding 300 x 300 took more time than training on it."""
    out = io.BytesIO()
    with Image.open(cell.source) as opened:
        opened.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(out, format="PNG")
    return out.getvalue()


def deliver(cells: Sequence[Cell], pictures: Path, *, swapped: bool = False) -> None:
    """Writes a delivery into the watched folder; swapped: each cell under the other class's name."""
    for cell in cells:
        place = cell.place(pictures, OTHER[cell.label] if swapped else None)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(cell))


def correct_labels(cells: Sequence[Cell], pictures: Path) -> None:
    """Moves the cells of a swapped delivery to their own class."""
    for cell in cells:
        cell.place(pictures, OTHER[cell.label]).rename(cell.place(pictures))


def deliver_broken(cells: Sequence[Cell], pictures: Path) -> dict[str, int]:
    """A transfer that went wrong: of every eight files of a delivery one is cut off and one is a web page; how many of each."""
    deliver(cells, pictures)
    cut, pages = cells[::8], cells[4::8]
    for cell in cut:
        whole = picture(cell)
        cell.place(pictures).write_bytes(whole[: len(whole) // 3])
    for cell in pages:
        cell.place(pictures).write_bytes(PAGE)
    return {"cut off": len(cut), "web pages": len(pages)}
