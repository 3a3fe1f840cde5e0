"""What a folder of pictures looks like from outside: classes, counts, sizes in a sample of headers; nothing is decoded."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.sources import LIKE_SPLITS, Candidate, Listing, entries, list_folder, printable
from pipelines.split import check_splits
from vggcore.errors import DatasetError
from vggcore.recipe import SPLITS

HEADERS = 400                                       # headers that are read: a 95 % quantile of theirs is known to about 2 %
PERCENT = (5, 50, 95)                               # quantiles that are kept of sizes
WITH_EXIF = frozenset({"JPEG", "MPO", "TIFF", "WEBP"})    # formats whose orientation stands in the header
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)          # EXIF's tag, and its values for pictures that lie on their side


@dataclass(frozen=True)
class Sizes:
    """Sizes in a sample of headers, upright; each a (5 %, 50 %, 95 %) quantile."""

    looked_at: int                                  # headers read
    shorter: tuple[int, int, int]                   # shorter side, pixels
    aspect: tuple[float, float, float]              # width / height

    @property
    def spread(self) -> float:
        """How far aspects differ: the 95 % quantile over the 5 % quantile, 1 where all are equal."""
        return self.aspect[2] / self.aspect[0]


@dataclass(frozen=True)
class FolderLook:
    """A folder of pictures as its names and some headers show it."""

    root: Path
    counts: Mapping[str, int]                       # pictures of each class, in the order of the classes
    splits: Mapping[str, int] | None                # pictures of each split folder; None: the recipe splits
    subfolders: int                                 # distinct folders between class and picture; 0: there are none
    sizes: Sizes
    notes: tuple[str, ...]

    @property
    def pictures(self) -> int:
        """All pictures, by their names."""
        return sum(self.counts.values())


def look_at_folder(root: Path, *, skip: Path | None = None) -> FolderLook:
    """Lists the folder as a scan would, and reads the headers of up to HEADERS pictures, evenly from all classes.

    skip: a folder to leave out (a store among the pictures). Folders train/, val/ and test/ are the splits where all three
    are there; of other folders like them, classes are pooled, with a note. Raises DatasetError as list_folder and
    check_splits do, and where no header can be read.
    """
    listing = list_folder(root, by=splitting(root, skip), skip=skip)
    counts = Counter(candidate.label for candidate in listing.candidates)
    given = [candidate.split for candidate in listing.candidates if candidate.split is not None]
    notes = list(listing.notes)
    if given:
        labels = [candidate.label for candidate in listing.candidates]
        notes += check_splits(printable(root), listing.classes, labels, given, "folder")
    return FolderLook(
        root=root,
        counts={label: counts[label] for label in listing.classes},
        splits=Counter(given) if given else None,
        subfolders=len({place for place in map(inner_folder, listing.candidates) if place}),
        sizes=sample_sizes(listing),
        notes=tuple(notes),
    )


def splitting(root: Path, skip: Path | None) -> str | None:
    """The split rule to list by: None where train/, val/ and test/ are there, or none like them; else all is pooled."""
    if not root.is_dir():
        return None
    folders, _ = entries(root, skip)
    like = [name for name in folders if name.casefold() in LIKE_SPLITS]
    return "stratified" if len(like) > 1 and not set(SPLITS) <= set(folders) else None


def inner_folder(candidate: Candidate) -> str:
    """The folders between a picture's class and its file: "roll_3" for cat/roll_3/0001.jpg, empty where there are none."""
    parts = candidate.path.split("/")
    return "/".join(parts[1 if parts[0] == candidate.label else 2 : -1])      # beside a split folder: train/cat/roll_3/...


def sample_sizes(listing: Listing) -> Sizes:
    """The sizes in an even sample of the listing. Raises DatasetError where no header can be read."""
    files = listing.candidates
    places = np.unique(np.linspace(0, len(files) - 1, min(HEADERS, len(files))).round().astype(int))
    sizes = [size for place in places if (size := header_size(listing.root / files[place].path))]
    if not sizes:
        raise DatasetError(
            f"{printable(listing.root)}: none of {len(places):,} files looked at has a picture's header,"
            f" {printable(files[0].path)} first; expected pictures: put them there"
        )
    shorter = np.percentile([min(size) for size in sizes], PERCENT, method="nearest").tolist()
    aspect = np.percentile([width / height for width, height in sizes], PERCENT, method="nearest").tolist()
    return Sizes(len(sizes), (shorter[0], shorter[1], shorter[2]), (aspect[0], aspect[1], aspect[2]))


def header_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an upright picture by its header alone, None where that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # Pillow's on huge pictures and odd metadata: nothing is decoded here
            with Image.open(path) as opened:
                width, height = opened.size
                turned = opened.format in WITH_EXIF and opened.getexif().get(ORIENTATION) in TURNED
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if min(width, height) < 1:
        return None
    return (height, width) if turned else (width, height)
