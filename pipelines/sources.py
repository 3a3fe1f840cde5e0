"""Where pictures come from: a folder of class folders, or the solar cells of elpv-dataset; nothing is decoded here."""

import importlib.util
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

from pipelines.manifest import Quarantined
from vggcore.errors import DatasetError
from vggcore.recipe import GATE, SPLITS, Data

# What DALI's decoder knows; a GIF, which it does not, is not listed, and counted among the files left out.
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pnm", ".jp2"}
)
# Folders that a user may have meant as splits; two of them together are never taken for classes.
LIKE_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


class Candidate(NamedTuple):
    """A file that should be a picture."""

    path: str  # relative to the listing's root, with "/"
    label: str  # its class
    split: str | None  # the split folder it stands in; None: there are no split folders


@dataclass
class Listing:
    """All candidates of a source."""

    root: Path
    candidates: list[Candidate] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)  # names that no manifest can hold
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, sorted by name."""
        return tuple(sorted({candidate.label for candidate in self.candidates}))


def list_pictures(data: Data, *, skip: Path | None = None) -> Listing:
    """The candidates that `data` names; `skip` is a folder to leave out (a store inside the pictures' folder).

    Raises DatasetError where there is nothing to train on: see list_folder and list_elpv.
    """
    if data.source == "elpv":
        return list_elpv(labels=data.labels, threshold=data.threshold)
    assert data.root is not None, "Data has a root or a source"
    return list_folder(Path(os.path.abspath(data.root)), by=data.split.by, skip=skip)  # noqa: PTH100 (keeps links)


def list_folder(root: Path, *, by: str | None, skip: Path | None = None) -> Listing:
    """The candidates below `root`: class folders, with train/ val/ test/ above them or not; hidden names are left out.

    Beside the three a folder gate/ may stand; where splits are pooled it is left out, as any other folder is.

    by: the split's rule; "folder" wants train/ val/ test/, None takes them where they are, others pool them.
    Raises DatasetError for a folder that is absent, no folder, empty, without classes or pictures, of one class only,
    with two spellings of one class, or without one of the three split folders.
    """
    try:
        exists = root.exists()
    except OSError as error:
        refuse_listing(error)
    if not exists:
        raise DatasetError(f"{printable(root)}: no such folder; wanted a folder of class folders with pictures")
    if not root.is_dir():
        raise DatasetError(f"{printable(root)}: is a file; wanted a folder of class folders with pictures")
    listing, others = Listing(root), Counter[str]()
    folders, loose = entries(root, skip)
    if not folders and not loose:
        raise DatasetError(f"{printable(root)}: is empty; wanted a folder of class folders with pictures")

    homes: list[tuple[str | None, str, list[str]]] = [(None, "", folders)]  # split, what stands before it, its classes
    split_folders = [name for name in folders if name.casefold() in LIKE_SPLITS]
    if by == "folder" or len(split_folders) > 1:
        pooled = by not in ("folder", None)
        if not pooled:
            check_split_folders(root, folders)
            split_folders = [*SPLITS, *([GATE] if GATE in folders else [])]
        homes = []
        for name in split_folders:
            inner, inner_loose = entries(root / name, skip)
            homes.append((None if pooled else name, f"{name}/", inner))
            loose += [f"{name}/{file}" for file in inner_loose]
        if extra := sorted(set(folders) - set(split_folders)):
            listing.notes.append(f"folders beside {spoken(split_folders)} are left out: {spoken(map(repr, extra))}")
        if pooled:
            listing.notes.append(f'{spoken(split_folders)} are pooled: split.by = "{by}" shares all pictures anew')

    strays = sorted(name for name in loose if is_picture(name))
    others.update(extension(name) for name in loose if not is_picture(name))
    for split, before, labels in homes:
        for label in labels:
            check_class_name(root, before + label)
            for path in files_below(root, before + label, skip):
                if not is_picture(path):
                    others[extension(path)] += 1
                elif not is_utf8(path):
                    listing.quarantine.append(Quarantined(printable(path), "its name is not UTF-8; rename it"))
                else:
                    listing.candidates.append(Candidate(path, label, split))
    listing.candidates.sort()

    check_classes(listing, [label for _, _, labels in homes for label in labels], strays, others)
    if strays:
        first = printable(strays[0])
        listing.notes.append(f"{counted(len(strays), 'picture')} outside any class folder left out, {first!r} first")
    if others:
        endings = ", ".join(f"{number} {ending}" for ending, number in sorted(others.items()))
        listing.notes.append(f"{counted(others.total(), 'file')} without a picture's extension left out ({endings})")
    return listing


def check_split_folders(root: Path, folders: list[str]) -> None:
    """DatasetError where one of train/ val/ test/ is not there."""
    absent = [f"{name}/" for name in SPLITS if name not in folders]
    if absent:
        raise DatasetError(
            f"{printable(root)}: no folder {spoken(absent)} (found {spoken(map(repr, folders[:10])) or 'none'});"
            " a split by folder wants train/ val/ test/, each with the class folders: add it, rename one,"
            ' or let the recipe split the pictures with split.by = "hash" or "stratified"'
        )


def check_class_name(root: Path, folder: str) -> None:
    """DatasetError for a class whose name cannot be kept with the weights: not UTF-8, or with control characters."""
    if not is_utf8(folder) or not folder.isprintable():
        raise DatasetError(f"{printable(root)}: class folder '{printable(folder)}' is not printable UTF-8; rename it")


def check_classes(listing: Listing, folders: list[str], strays: list[str], others: Counter[str]) -> None:
    """DatasetError unless two classes or more have pictures and one spelling each; notes empty class folders."""
    place = printable(listing.root)
    if not folders and strays:
        raise DatasetError(
            f"{place}: {counted(len(strays), 'picture')} without a class folder, {printable(strays[0])!r} first;"
            " wanted one folder a class: move each picture into its class's folder"
        )
    spellings: dict[str, str] = {}
    for name in sorted(set(folders)):
        first = spellings.setdefault(spelling(name), name)
        if first != name:
            raise DatasetError(
                f"{place}: two spellings of one class, {ascii_if_alike(first, name)}; they differ in case, blanks or"
                " Unicode form only: put the pictures in one folder, or name the classes apart"
            )
    if not listing.candidates:
        found = f"found {counted(others.total(), 'other file')}" if others else "found no file"
        if listing.quarantine:
            found = f"found {counted(len(listing.quarantine), 'name')} that is not UTF-8"
        raise DatasetError(f"{place}: no picture in any class folder ({found}); wanted {', '.join(sorted(EXTENSIONS))}")
    if len(listing.classes) == 1:
        raise DatasetError(f"{place}: one class only, {listing.classes[0]!r}; wanted two class folders with pictures, or more")
    empty = sorted(set(folders) - set(listing.classes))
    if empty:
        listing.notes.append(f"class folders without a picture left out: {spoken(map(repr, empty))}")


def list_elpv(*, labels: str, threshold: float) -> Listing:
    """The solar cells of the package elpv-dataset (Deitsch et al. 2019), classes "defective" and "functional".

    labels: "certain" keeps the cells whose defect probability is 0 or 1; "all" calls a cell defective when its
    probability is above `threshold`. The package's code is not run: it would read all pictures. Raises DatasetError
    where the package is not installed.
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise DatasetError("source = \"elpv\": the package elpv-dataset is not installed; run pip install 'vggrow[demo]'")
    listing = Listing(Path(spec.origin).parent / "data")
    for line in (listing.root / "labels.csv").read_text(encoding="utf-8").splitlines():
        path, probability_text, _kind = line.split()
        probability = float(probability_text)
        if labels == "all" or probability in (0.0, 1.0):
            defective = probability > (threshold if labels == "all" else 0.5)
            listing.candidates.append(Candidate(path, "defective" if defective else "functional", None))
    listing.candidates.sort()
    return listing


def entries(folder: Path, skip: Path | None) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in `folder`, sorted, without hidden ones, or DatasetError."""
    try:
        found = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
        folders = [name for name in found if (folder / name).is_dir() and not same_folder(folder / name, skip)]
        return folders, [name for name in found if (folder / name).is_file()]
    except OSError as error:
        refuse_listing(error)


def files_below(root: Path, folder: str, skip: Path | None) -> Iterator[str]:
    """Paths, relative to `root`, of all files below `folder`, links followed, hidden names left out."""
    for place, inner, files in os.walk(root / folder, followlinks=True, onerror=refuse_listing):
        here = os.path.relpath(place, root)
        inner[:] = sorted(
            name
            for name in inner
            if not name.startswith(".") and not same_folder(Path(place, name), skip) and not leads_back(Path(place, name))
        )
        for name in sorted(files):
            if not name.startswith(".") and is_not_special(Path(place, name)):
                yield f"{here}/{name}"


def refuse_listing(error: OSError) -> NoReturn:
    """A folder that cannot be listed, as a DatasetError."""
    name = printable(error.filename or "")
    raise DatasetError(f"{name}: the folder cannot be listed ({error.strerror}); make it readable") from error


def leads_back(folder: Path) -> bool:
    """Whether a linked folder leads to one it stands in, round and round."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def is_not_special(file: Path) -> bool:
    """Whether this is a file, or a broken link (to be quarantined); reading a pipe or a device might never end."""
    return os.path.isfile(file) or not os.path.exists(file)  # noqa: PTH110, PTH113 (what may not be read is False)


def same_folder(folder: Path, other: Path | None) -> bool:
    return other is not None and other.exists() and folder.samefile(other)


def is_picture(path: str) -> bool:
    return extension(path) in EXTENSIONS


def extension(path: str) -> str:
    return printable(os.path.splitext(path)[1].lower()) or "without one"  # noqa: PTH122 (a name, no path)


def is_utf8(name: str) -> bool:
    """Whether the file system's bytes were UTF-8; Python keeps others as lone surrogates, which Parquet cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: str | Path) -> str:
    """A path for a message, in one line: with backslashes for bytes that are not UTF-8, and for what is no visible sign."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def spelling(name: str) -> str:
    """What two spellings of one name have in common: compatible Unicode form, no case, no blanks."""
    return "".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())


def ascii_if_alike(first: str, second: str) -> str:
    """Both names as Python writes them; in ASCII where they would look the same."""
    alike = unicodedata.normalize("NFKC", first) == unicodedata.normalize("NFKC", second)
    return f"{first!a} and {second!a}" if alike else f"{first!r} and {second!r}"


def spoken(words: Iterable[str]) -> str:
    return ", ".join(words)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
