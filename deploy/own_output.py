"""Files that a command writes where its user says: an earlier one of ours is replaced, anything else is left alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.manifest import HEADER
from vggcore.errors import StoreError
from vggcore.whole_file import check_target

HEAD = 4096       # bytes in which a file of ours says that it is one
CREATOR = "vggrow"       # in the metadata of figures
PAGES = (b": Vggrow report</title>", b": Vggrow history</title>")
FIGURES = (f"Software\0{CREATOR}".encode(), f"<dc:title>{CREATOR}</dc:title>".encode())      # PNG, SVG
FEATURE_COLUMNS = {"path", "class", "content", "features"}


def check_page(out: Path) -> None:
    """StoreError where `out` is there and no page of ours."""
    check_replaceable(out, lambda file: marked(file, PAGES), "a page of vggrow's")


def check_figure(out: Path) -> None:
    """StoreError where `out` is there and no figure of ours."""
    check_replaceable(out, lambda file: marked(file, FIGURES), "a figure of vggrow's")


def check_features(out: Path) -> None:
    """StoreError where `out` is there and no file of `vggrow features`."""
    check_replaceable(out, is_features, "a file of `vggrow features`")


def check_replaceable(out: Path, ours: Callable[[Path], bool], what: str) -> None:
    """StoreError unless nothing is at `out`, an empty file, or one that is `ours`."""
    check_target(out)
    try:
        replaceable = not out.exists() or out.stat().st_size == 0 or ours(out)
    except OSError as error:
        raise StoreError(f"{out}: cannot be read ({error.strerror}); name another file by --out") from error
    if not replaceable:
        raise StoreError(f"{out}: exists already and is not {what}; name another file by --out, or remove it first")


def marked(file: Path, marks: Sequence[bytes]) -> bool:
    """Whether a file says at its beginning that it is ours."""
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    return any(mark in head for mark in marks)


def is_features(file: Path) -> bool:
    """Whether a file is a Parquet table that `vggrow features` wrote."""
    try:
        with file.open("rb") as opened:
            schema = pq.read_schema(opened)
    except pa.ArrowException:      # no Parquet, or one that is cut short
        return False
    return HEADER in (schema.metadata or {}) and set(schema.names) >= FEATURE_COLUMNS
