"""The decoded cache: a set's pictures as raw pixels in one file of the store, made once, mapped by every worker.

    STORE/data/<fingerprint>/cache/pixels.u8       the pictures one after another, (height, width, channels) uint8 each
    STORE/data/<fingerprint>/cache/index.parquet   content, offset, height, width; written last: where it is, all is there

Small sets are read again and again, and PNG decoding was 44 to 63 % of a narrow net's CPU time (measured, DESIGN 5). What
comes out is the same to the last bit (tests/pipelines/test_cache.py). A set whose pictures are all grey keeps one channel.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from pipelines import graph
from pipelines.manifest import Manifest, Pictures
from pipelines.plan import Integers
from vggcore.errors import DatasetError
from vggcore.recipe import SPLITS
from vggcore.whole_file import whole_file

PIXELS, INDEX = "pixels.u8", "index.parquet"
AT_ONCE = 8              # pictures a decode: DALI 2.4 may crash after a failed batch of more than 4 * (threads + 1)
FREE_SHARE = 0.5         # of the disk's free space that a cache may take


@dataclass(frozen=True)
class DecodedCache:
    """A cache that is whole; pixels are mapped, not read, until they are asked for."""

    pixels: NDArray[np.uint8]           # (all bytes,)
    row_of: dict[str, int]              # content -> row
    offsets: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    channels: int                       # 1: every picture is grey; 3: RGB

    def rows(self, pictures: Pictures) -> Integers:
        """The row of each picture, (n,)."""
        return np.array([self.row_of[str(content)] for content in pictures.contents], np.int64)

    def picture(self, row: int) -> NDArray[np.uint8]:
        """A picture's pixels, (height, width, channels), as a view of the map."""
        height, width = int(self.heights[row]), int(self.widths[row])
        start = int(self.offsets[row])
        return self.pixels[start : start + height * width * self.channels].reshape(height, width, self.channels)

    def windows(self, rows: Integers, start: NDArray[np.int32], end: NDArray[np.int32]) -> list[NDArray[np.uint8]]:
        """Copies of windows [start, end), (n, 2) y and x each."""
        return [
            np.ascontiguousarray(self.picture(int(row))[top:bottom, left:right])
            for row, (top, left), (bottom, right) in zip(rows, start.tolist(), end.tolist(), strict=True)
        ]


def cache_folder(store: Path, fingerprint: str) -> Path:
    """Where the cache of these pictures lies."""
    return store / "data" / fingerprint / "cache"


def open_cache(folder: Path) -> DecodedCache | None:
    """The cache in a folder; None where there is none, or where it is not whole."""
    if not (folder / INDEX).exists():
        return None
    table = pq.read_table(folder / INDEX)
    channels = int(table.schema.metadata[b"channels"])
    offsets, heights, widths = (table[name].to_numpy().astype(np.int64) for name in ("offset", "height", "width"))
    try:
        pixels = np.memmap(folder / PIXELS, np.uint8, "r")
    except (OSError, ValueError):
        return None
    if pixels.size != int((heights * widths).sum()) * channels:
        return None
    row_of = {content: row for row, content in enumerate(table["content"].to_pylist())}
    return DecodedCache(pixels, row_of, offsets, heights, widths, channels)


def make_cache(
    manifest: Manifest, store: Path, *, budget_bytes: int, threads: int, say: Callable[[str], None]
) -> DecodedCache | None:
    """The cache of a manifest's pictures, made if it is not there; None where they are larger than the budget.

    budget_bytes: what decoded pictures may take in the store, RGB counted; caches of other states of the data are removed,
    the oldest first, to stay within it. One command makes it, others wait. Raises DatasetError for a picture that is not
    what was scanned, StoreError for a disk that takes no more.
    """
    folder = cache_folder(store, manifest.fingerprint)
    known = open_cache(folder)
    if known is not None:
        return known
    pictures = unique_pictures(manifest)
    wanted = int((pictures.heights * pictures.widths).sum()) * 3
    folder.mkdir(parents=True, exist_ok=True)
    if wanted > budget_bytes or wanted > FREE_SHARE * shutil.disk_usage(folder).free:
        return None
    with FileLock(folder / ".lock"):
        known = open_cache(folder)
        if known is not None:
            return known
        make_room(store, budget_bytes - wanted, but=folder)
        say(f"decoding {len(pictures):,} pictures once, {wanted / 2**20:,.0f} MiB at most, into the store's cache")
        write_cache(folder, pictures, threads)
    return open_cache(folder)


def unique_pictures(manifest: Manifest) -> Pictures:
    """The pictures of train, val and test, each content once."""
    parts = [manifest.split(name) for name in SPLITS]
    names = ("paths", "labels", "heights", "widths", "contents")
    whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    _, first = np.unique(whole["contents"].astype(str), return_index=True)
    return Pictures(root=manifest.root, **{name: values[first] for name, values in whole.items()})


def make_room(store: Path, budget_bytes: int, *, but: Path) -> None:
    """Removes other caches, the oldest first, until they take no more than the budget; who has one mapped keeps it."""
    others = [path for path in (store / "data").glob(f"*/cache/{INDEX}") if path.parent != but]
    sizes = {path: (path.parent / PIXELS).stat().st_size for path in others if (path.parent / PIXELS).exists()}
    for path in sorted(sizes, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) <= budget_bytes:
            return
        path.unlink()
        (path.parent / PIXELS).unlink()
        del sizes[path]


class NotGrey(Exception):
    """A picture has colours."""


def write_cache(folder: Path, pictures: Pictures, threads: int) -> None:
    """Decodes pictures and writes both files, whole or not at all; three channels from the first picture with colours on."""
    channels = 1
    try:
        write_pixels(folder / PIXELS, pictures, channels, threads)
    except NotGrey:
        channels = 3
        write_pixels(folder / PIXELS, pictures, channels, threads)
    sizes = pictures.heights * pictures.widths * channels
    columns = {
        "content": pa.array([str(content) for content in pictures.contents]),
        "offset": pa.array(np.cumsum(sizes) - sizes),
        "height": pa.array(pictures.heights),
        "width": pa.array(pictures.widths),
    }
    table = pa.table(columns).replace_schema_metadata({"channels": str(channels)})
    with whole_file(folder / INDEX) as part:
        pq.write_table(table, part)


def write_pixels(path: Path, pictures: Pictures, channels: int, threads: int) -> None:
    """One file of all pixels. Raises NotGrey where one channel is too few."""
    with whole_file(path) as part, part.open("wb") as file:
        for pixels in decoded(pictures, threads):
            if channels == 1 and not is_grey(pixels):
                raise NotGrey
            file.write(np.ascontiguousarray(pixels[:, :, :channels]).data)


def decoded(pictures: Pictures, threads: int) -> Iterator[NDArray[np.uint8]]:
    """Every picture's pixels, (height, width, 3), in order. Raises DatasetError for one that is not what was scanned."""
    chunks = [range(start, min(start + AT_ONCE, len(pictures))) for start in range(0, len(pictures), AT_ONCE)]

    def source(info: Any) -> Any:
        if info.iteration >= len(chunks):
            raise StopIteration
        names = (os.fsencode(pictures.root / pictures.paths[place]) for place in chunks[info.iteration])
        return [np.frombuffer(name, np.uint8) for name in names]

    pipeline = graph.build(graph.decode_graph, source, "cpu", batch=AT_ONCE, threads=threads)
    for chunk in chunks:
        try:
            encoded, pixels = pipeline.run()
        except RuntimeError as error:
            raise changed(pictures, next((place for place in chunk if not is_as_scanned(pictures, place)), chunk[0])) from error
        for number, place in enumerate(chunk):
            found = np.asarray(pixels[number])
            content = hashlib.blake2b(np.asarray(encoded[number]).data, digest_size=16).hexdigest()
            if content != pictures.contents[place] or found.shape[:2] != (pictures.heights[place], pictures.widths[place]):
                raise changed(pictures, place)
            yield found


def is_as_scanned(pictures: Pictures, place: int) -> bool:
    """Whether a picture's file has the content that the scan found."""
    try:
        content = (pictures.root / str(pictures.paths[place])).read_bytes()
    except OSError:
        return False
    return hashlib.blake2b(content, digest_size=16).hexdigest() == str(pictures.contents[place])


def changed(pictures: Pictures, place: int) -> DatasetError:
    """The error for a file that is no longer what was scanned."""
    path = pictures.root / str(pictures.paths[place])
    return DatasetError(
        f"{path}: not the picture that was scanned any more; restore or remove it, then start the same command again"
    )


def is_grey(pixels: NDArray[np.uint8]) -> bool:
    """Whether red, green and blue are the same everywhere."""
    return bool((pixels[:, :, 0] == pixels[:, :, 1]).all() and (pixels[:, :, 0] == pixels[:, :, 2]).all())
