"""Scans of a store's data, and which one belongs to a recipe's [data] table."""

from collections.abc import Callable
from pathlib import Path

from pipelines.manifest import Manifest, read_manifest
from training.store import Store, read_json
from vggcore.digest import digest
from vggcore.recipe import Data
from vggcore.whole_file import write_json


def scan_data(data: Data, store: Store, *, threads: int, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Scans, and remembers under the [data] table which fingerprint it gave, for `vggrow plan`."""
    from pipelines.scan import scan  # DALI, which a plan does without

    manifest = scan(data, store.root, threads=threads, progress=progress)
    write_json(last_scan(data, store), {"fingerprint": manifest.fingerprint})
    return manifest


def known_manifest(data: Data, store: Store) -> Manifest | None:
    """The manifest of the last scan of this [data] table, or None; decodes nothing."""
    found = read_json(last_scan(data, store))
    return read_manifest(store.data(found["fingerprint"])) if found is not None else None


def last_scan(data: Data, store: Store) -> Path:
    """Where the fingerprint of the last scan of a [data] table is kept."""
    return store.root / "data" / "scans" / f"{digest(data.model_dump(mode='json'), hex_characters=16)}.json"
