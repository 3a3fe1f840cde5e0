"""The features of a store: rows by picture content, in Parquet files that appear whole and are never changed.

    STORE/features/<key>/features.json             what decides the values, see spec.FeatureSpec
    STORE/features/<key>/parts/<digest>.parquet    content, features; the digest is that of the contents
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from training.features.spec import FeatureSpec
from training.store import Store
from vggcore.errors import StoreError
from vggcore.whole_file import whole_file, write_json


class FeatureTable:
    """The features of one spec, as far as they are in the store."""

    def __init__(self, store: Store, spec: FeatureSpec) -> None:
        """Reads nothing yet."""
        self.spec = spec
        self.folder = store.features(spec.key)
        self.read: dict[str, NDArray[np.float32]] = {}     # rows by content
        self.parts: set[str] = set()                       # the files that `read` holds

    def describe(self) -> None:
        """Writes features.json. Raises StoreError where the store takes no writes."""
        if not (self.folder / "features.json").exists():
            write_json(self.folder / "features.json", json.loads(self.spec.model_dump_json()))

    def refresh(self) -> None:
        """Reads the parts that are new. Raises StoreError for one that is broken."""
        for path in sorted((self.folder / "parts").glob("*.parquet")):
            if path.name not in self.parts:
                self.read |= self.read_part(path)
                self.parts.add(path.name)

    def read_part(self, path: Path) -> dict[str, NDArray[np.float32]]:
        """The rows of one file by their contents."""
        try:
            table = pq.read_table(path)
            contents = table["content"].to_pylist()
            flat = table["features"].combine_chunks().flatten().to_numpy()
            rows = flat.reshape(len(contents), self.spec.values)
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise StoreError(f"{path}: cannot be read ({error}); remove this file: it is computed again") from error
        return dict(zip(contents, rows, strict=True))

    def missing(self, contents: Sequence[str]) -> set[str]:
        """Those of these contents that have no row."""
        return set(contents) - self.read.keys()

    def rows(self, contents: Sequence[str]) -> NDArray[np.float32]:
        """(n, F) float32: the rows of these contents, in their order; all must be there."""
        if not len(contents):
            return np.zeros((0, self.spec.values), np.float32)
        return np.stack([self.read[content] for content in contents])


def write_part(folder: Path, contents: Sequence[str], values: NDArray[np.float32]) -> Path:
    """Writes rows, (n, F), to a file of the folder that is named by their contents; whole or not at all."""
    name = hashlib.blake2b("\n".join(contents).encode(), digest_size=16).hexdigest()
    path = folder / "parts" / f"{name}.parquet"
    table = pa.table({"content": pa.array(contents, pa.string()), "features": fixed_size_list(values)})
    with whole_file(path) as part:
        pq.write_table(table, part)
    return path


def fixed_size_list(values: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """(n, F) as a column of F values a row."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
