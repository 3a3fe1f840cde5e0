"""Scans of a store's data, and which one belongs to a recipe's [data] table."""

from collections.abc import Callable
from pathlib import Path

from pipelines.manifest import Manifest, read_manifest
from training.store import Store, read_json
from vggcore.class_order import spoken_classes
from vggcore.digest import digest
from vggcore.errors import DatasetError
from vggcore.recipe import Data
from vggcore.whole_file import write_json


def scan_data(data: Data, store: Store, *, threads: int, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Scans, and remembers under the [data] table which fingerprint it gave, for `vggrow plan`.

    The classes stand in the order of [data] classes. Raises DatasetError where that names a class without pictures, and
    as pipelines.scan.scan does.
    """
    from pipelines.scan import scan  # DALI, which a plan does without

    manifest = scan(data, store.root, threads=threads, progress=progress)
    write_json(last_scan(data, store), {"fingerprint": manifest.fingerprint})
    return as_listed(manifest, data)


def as_listed(manifest: Manifest, data: Data) -> Manifest:
    """The manifest in the order of [data] classes. Raises DatasetError where that names a class without pictures."""
    absent = [name for name in data.classes or () if name not in manifest.classes]
    if absent:
        raise DatasetError(
            f"[data] classes: no picture of {spoken_classes(absent)} below {str(manifest.root)!r} (found"
            f" {', '.join(map(repr, manifest.classes))}); put pictures there, or remove the name"
        )
    return manifest.in_order(data.classes or ())


def known_manifest(data: Data, store: Store) -> Manifest | None:
    """The manifest of the last scan of this [data] table, or None; decodes nothing."""
    found = read_json(last_scan(data, store))
    return as_listed(read_manifest(store.data(found["fingerprint"])), data) if found is not None else None


def last_scan(data: Data, store: Store) -> Path:
    """Where the fingerprint of the last scan of a [data] table is kept."""
    pictures = data.model_dump(mode="json", exclude={"classes"})      # their order is no matter of the scan's
    return store.root / "data" / "scans" / f"{digest(pictures, hex_characters=16)}.json"
