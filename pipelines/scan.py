"""The scan: decodes every picture once with DALI itself, quarantines what does not decode, and writes the manifest."""

import hashlib
import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali
import pyarrow as pa
from filelock import FileLock, Timeout
from nvidia.dali import fn, pipeline_def, types

from pipelines.colour import SUMS, Colour, measure_colour, pixel_sums
from pipelines.gate_list import (
    GateList,
    Row,
    choose,
    find_gate,
    gate_key,
    gate_notes,
    listed_before,
    make_gate,
    sort_out,
    write_gate,
)
from pipelines.manifest import (
    SCANNED,
    GateName,
    Manifest,
    Quarantined,
    duplicate_notes,
    fingerprint_of,
    write_manifest,
    write_quarantine,
)
from pipelines.near_duplicates import difference_hash
from pipelines.sources import Candidate, list_pictures, printable
from pipelines.split import (
    check_splits,
    groups_of,
    memory_file,
    read_memory,
    reservoir,
    split_by_group,
    split_by_hash,
    split_stratified,
    write_memory,
)
from vggcore.errors import DatasetError, StoreError
from vggcore.recipe import GATE, Data, Split

logger = logging.getLogger(__name__)

CHUNK = 32  # files that a thread takes at a time
COMMIT_EVERY = 500  # files: what a killed scan loses at most, but for the chunks at work
DECODER = f"dali-{nvidia.dali.__version__}"  # facts of another version are measured again: its pixels may differ


@dataclass(frozen=True)
class Facts:
    """What the scan learns of one picture.

    Sides in pixels, EXIF applied; bytes; blake2b-128 in hex; the 64-bit difference hash; the nine SUMS.
    """

    height: int
    width: int
    bytes: int
    content: str
    dhash: int
    sums: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """Why a file gives no picture; lasting: by its own fault, so that it need not be tried again until it changes."""

    reason: str
    lasting: bool


@dataclass(frozen=True)
class File:
    """A file as it was just before it was read; what is known of it holds for this size and time only."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int


def scan(
    data: Data,
    store: Path,
    *,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
    renew_gate: bool = False,
) -> Manifest:
    """Scans the pictures that `data` names, writes STORE/data/<fingerprint>/ and returns the manifest.

    threads: how many decode side by side, one picture each. progress(done, total) is called as files are done.
    Files unchanged since an earlier scan (path, size, mtime), a killed one included, are not decoded again.
    renew_gate: choose a new gate list instead of the one in force; asked for by `vggrow models renew-gate` alone.
    Raises DatasetError for data that cannot be trained on, or with more than max(10, max_bad * files) bad files, and
    StoreError for a store that cannot be written.
    """
    listing = list_pictures(data, skip=store)
    place = printable(listing.root)
    paths = [candidate.path for candidate in listing.candidates]
    with held(store):
        outcomes = read_pictures(listing.root, paths, store, threads, progress or (lambda _done, _total: None))
        found = list(zip(listing.candidates, outcomes, strict=True))
        good = [(candidate, outcome) for candidate, outcome in found if isinstance(outcome, Facts)]
        bad = [Quarantined(candidate.path, its.reason) for candidate, its in found if isinstance(its, Refused)]
        quarantine = sorted([*listing.quarantine, *bad])
        with written(store):
            refuse_too_many(place, quarantine, len(paths) + len(listing.quarantine), data.max_bad, store)
        if not good:
            first = f"{quarantine[0].path}: {quarantine[0].reason}"
            raise DatasetError(f"{place}: none of {len(paths):,} files can be used ({first}); put pictures there")

        candidates, facts = [candidate for candidate, _ in good], [its for _, its in good]
        gate, left_out, memory, shares = share_out(data, listing.root, candidates, facts, store, renew_gate=renew_gate)
        notes = gate_notes(gate, shares.rows, shares.gate, left_out) if gate else []
        held_out = tuple(Quarantined(candidates[number].path, why) for number, why in sorted(left_out.items()))
        stay = [number for number in range(len(candidates)) if number not in left_out]
        candidates, facts = [candidates[number] for number in stay], [facts[number] for number in stay]
        splits, groups = [shares.splits[number] for number in stay], [shares.rows[number].group for number in stay]
        labels, contents = [candidate.label for candidate in candidates], [its.content for its in facts]
        notes += check_splits(place, listing.classes, labels, splits, splitting_rule(data, candidates))
        notes += duplicate_notes([candidate.path for candidate in candidates], labels, splits, contents)
        table = table_of(candidates, facts, splits, groups)
        manifest = Manifest(
            root=listing.root,
            classes=listing.classes,
            table=table,
            fingerprint=fingerprint_of(table),
            colour=colour_of_train(place, facts, splits, data.standardise),
            quarantine=tuple(quarantine),
            notes=(*listing.notes, *notes),
            gate=GateName(gate.home.name, gate.digest) if gate else None,
            held_out=held_out,
        )
        with written(store):
            if memory:
                write_memory(memory_file(store, data.split), memory)
            if gate:
                write_gate(gate, fingerprint=manifest.fingerprint)
            write_manifest(manifest, store / "data" / manifest.fingerprint)
    logger.info("%s: scanned %d files, fingerprint %s", place, len(paths), manifest.fingerprint)
    return manifest


def splitting_rule(data: Data, candidates: Sequence[Candidate]) -> str:
    """The rule in force: where the recipe names none, the folders' where there are any, else by hash."""
    return data.split.by or ("folder" if candidates and candidates[0].split else "hash")


@dataclass(frozen=True)
class Shares:
    """Every picture's split, what was known of it, and the places of those that the gate has."""

    splits: list[str]
    rows: list[Row]
    gate: set[int]


def share_out(
    data: Data,
    root: Path,
    candidates: Sequence[Candidate],
    facts: Sequence[Facts],
    store: Path,
    *,
    renew_gate: bool = False,
) -> tuple[GateList | None, dict[int, str], dict[str, str], Shares]:
    """The gate list in force, the places it keeps out with the reason, what a stratified split remembers, the splits.

    A list that is new is not written yet. Raises DatasetError for a gate that cannot be chosen, or renewed.
    """
    by = splitting_rule(data, candidates)
    rule = data.split.model_copy(update={"by": by})
    groups: Sequence[str | None] = [None] * len(candidates)
    if by == "group":
        groups = groups_of([candidate.path for candidate in candidates], str(rule.group))
    rows = [
        Row(candidate.path, candidate.label, its.content, its.dhash, group)
        for candidate, its, group in zip(candidates, facts, groups, strict=True)
    ]
    with written(store):
        gate = find_gate(store, data, root, [row.content for row in rows])
    mine, left_out = sort_out(gate, rows) if gate else (set(), {})
    new = None
    if gate is None or renew_gate:
        new = choose_gate(data, rule, root, candidates, rows, store, gate, renew=renew_gate)
    if new is not None:
        gate = new
        mine, left_out = sort_out(gate, rows)
    if by == "folder":
        splits = [str(candidate.split) for candidate in candidates]
        late = [number for number, split in enumerate(splits) if split == GATE and number not in {*mine, *left_out}]
        left_out |= dict.fromkeys(late, "came to gate/ after the list was made")
        memory: dict[str, str] = {}
    else:
        # A new list was chosen from the splits of all pictures: what it keeps out is remembered with them.
        stay = [number for number in range(len(rows)) if new is not None or number not in left_out]
        some, memory = split_rows(rule, [rows[number] for number in stay], store)
        splits = [GATE] * len(rows)
        for number, split in zip(stay, some, strict=True):
            splits[number] = split
    for number in mine:
        splits[number] = GATE
    return gate, left_out, memory, Shares(splits, rows, mine)


def choose_gate(
    data: Data,
    rule: Split,
    root: Path,
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    store: Path,
    gate: GateList | None,
    *,
    renew: bool,
) -> GateList | None:
    """A new list where the recipe or a folder gate/ asks for one, else None; DatasetError where a renewal gives none."""
    home = gate.home if gate else store / "gates" / gate_key(data, root)
    if rule.by == "folder":
        inside = {row.content: row for row, its in zip(rows, candidates, strict=True) if its.split == GATE}
        if rule.gate and not inside:
            raise DatasetError(
                f"{printable(root)}: split.gate = {rule.gate} has no effect where folders are the splits; add a folder gate/"
                ' beside train/, or set split.by = "hash" or "stratified"'
            )
        chosen = list(inside.values())
    elif rule.gate:
        with written(store):
            before = listed_before(home) if renew else set()
        splits, _ = split_rows(rule, rows, store)
        chosen = choose(rows, splits, rule, before=before)
    else:
        chosen = []
    if not chosen:
        if renew:
            raise DatasetError(f"{printable(root)}: no gate to renew; set [data] split.gate = 0.1, say, or add a folder gate/")
        return None
    new = make_gate(home, chosen, share=rule.gate)
    if gate is not None and new.digest == gate.digest:
        raise DatasetError(f"{printable(root)}: the gate list would stay as it is; put other pictures under gate/ first")
    return new


def split_rows(rule: Split, rows: Sequence[Row], store: Path) -> tuple[list[str], dict[str, str]]:
    """Each picture's split by a rule other than "folder", the gate's share being test's, and what is to be remembered."""
    contents, shares = [row.content for row in rows], reservoir(rule)
    if rule.by == "group":
        return split_by_group([str(row.group) for row in rows], shares), {}
    if rule.by == "hash":
        return split_by_hash(contents, shares), {}
    with written(store):
        known = read_memory(memory_file(store, rule)) or read_memory(memory_file(store, rule.model_copy(update={"gate": 0.0})))
    splits = split_stratified([row.label for row in rows], contents, shares, known)
    return splits, known | dict(zip(contents, splits, strict=True))


def table_of(
    candidates: Sequence[Candidate], facts: Sequence[Facts], splits: Sequence[str], groups: Sequence[str | None]
) -> pa.Table:
    """The manifest's rows, in the order of `candidates`, which is that of their paths."""
    columns: dict[str, list[Any]] = {
        "path": [candidate.path for candidate in candidates],
        "class": [candidate.label for candidate in candidates],
        "split": list(splits),
        "height": [its.height for its in facts],
        "width": [its.width for its in facts],
        "bytes": [its.bytes for its in facts],
        "content": [its.content for its in facts],
        "group": list(groups),
        "dhash": [its.dhash for its in facts],
    }
    for number, name in enumerate(SUMS):
        columns[name] = [its.sums[number] for its in facts]
    return pa.table(columns, schema=SCANNED)


def colour_of_train(place: str, facts: Sequence[Facts], splits: Sequence[str], standardise: bool) -> Colour:
    """The training split's colours; DatasetError where `standardise` would divide by a deviation of 0."""
    train = [its for its, split in zip(facts, splits, strict=True) if split == "train"]
    colour = measure_colour([its.sums for its in train], [its.height * its.width for its in train])
    if standardise and colour.deviation.min() < 1e-3:
        raise DatasetError(
            f"{place}: a colour channel is the same in every training pixel, and standardise = true divides by its"
            " deviation, 0; set standardise = false"
        )
    return colour


def refuse_too_many(place: str, quarantine: Sequence[Quarantined], files: int, max_bad: float, store: Path) -> None:
    """DatasetError with the first few where more than max(10, max_bad * files) are bad; the whole list is written."""
    limit = max(10, int(max_bad * files))
    if len(quarantine) > limit:
        path = store / "data" / "quarantine.csv"
        write_quarantine(quarantine, path)
        first = "; ".join(f"{bad.path}: {bad.reason}" for bad in quarantine[:3])
        raise DatasetError(
            f"{place}: {len(quarantine):,} of {files:,} files cannot be used, more than {limit:,}"
            f" (max_bad = {max_bad}): {first}; the list is in {path}: mend or remove them, or allow"
            " more by [data] max_bad in a recipe (a folder alone is read with the default)"
        )


def read_pictures(
    root: Path, paths: Sequence[str], store: Path, threads: int, progress: Callable[[int, int], None]
) -> list[Facts | Refused]:
    """What each file gives, from the ledger where it is known and unchanged, else by decoding it now."""
    outcomes: dict[int, Facts | Refused] = {}
    unread: list[tuple[int, File]] = []
    with written(store), closing(open_ledger(store / "data" / "facts.sqlite")) as ledger:
        for number, path in enumerate(paths):
            name = os.path.join(root, path)  # noqa: PTH118 (a million Paths are slow)
            try:
                state = os.stat(name)  # noqa: PTH116
            except OSError as error:
                outcomes[number] = unreadable(error)
                continue
            file = File(name, state.st_size, state.st_mtime_ns)
            known = recall(ledger, file)
            if known is None:
                unread.append((number, file))
            else:
                outcomes[number] = known
        progress(len(outcomes), len(paths))
        uncommitted = 0
        try:
            for chunk, found in decode_all(unread, threads):
                for (number, file), outcome in zip(chunk, found, strict=True):
                    outcomes[number] = outcome
                    remember(ledger, file, outcome)
                uncommitted += len(chunk)
                if uncommitted >= COMMIT_EVERY:
                    ledger.commit()
                    uncommitted = 0
                progress(len(outcomes), len(paths))
        finally:
            ledger.commit()  # also on Ctrl-C: what is decoded stays decoded
    return [outcomes[number] for number in range(len(paths))]


def decode_all(
    files: Sequence[tuple[int, File]], threads: int
) -> Iterator[tuple[Sequence[tuple[int, File]], list[Facts | Refused]]]:
    """Chunks of `files` with what they gave, in order; `threads` chunks are at work, each thread with its own graph."""
    own = threading.local()

    def work(chunk: Sequence[tuple[int, File]]) -> list[Facts | Refused]:
        if not hasattr(own, "graph"):
            own.graph = decode_graph(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
            own.graph.build()
        return [decode(own.graph, file) for _, file in chunk]

    waiting: deque[tuple[Sequence[tuple[int, File]], Future[list[Facts | Refused]]]] = deque()
    with ThreadPoolExecutor(max_workers=max(1, threads), thread_name_prefix="scan") as pool:
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            waiting.append((chunk, pool.submit(work, chunk)))
            if len(waiting) > 2 * threads:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


@pipeline_def(exec_dynamic=True)  # type: ignore[untyped-decorator]   # without it one bad picture breaks the graph
def decode_graph() -> Any:
    """Reads and decodes files whole, as the training graph does: their bytes, and RGB pixels (H, W, 3) uint8."""
    paths = fn.external_source(name="paths", dtype=types.UINT8, ndim=1)
    encoded = fn.io.file.read(paths, dont_use_mmap=True)  # mmap: a file truncated meanwhile kills the process
    return encoded, fn.decoders.image(encoded, device="cpu", output_type=types.RGB)


def decode(graph: Any, file: File) -> Facts | Refused:
    """What one file gives.

    Never more than one: DALI 2.4.0 fails a batch as a whole and without the file's name, and after a batch of several
    failed, going on in the same process ended in a segmentation fault in most trials; after a batch of one in none.
    """
    graph.feed_input("paths", [np.frombuffer(os.fsencode(file.path), np.uint8)])
    try:
        encoded, pixels = graph.run()
    except RuntimeError as error:
        return why_refused(file, str(error))
    return measure(file, np.asarray(encoded[0]), np.asarray(pixels[0]))


def measure(file: File, encoded: np.ndarray, pixels: np.ndarray) -> Facts | Refused:
    """The facts of one decoded picture, unless the file is no longer what it was when the scan came to it."""
    try:
        state = os.stat(file.path)  # noqa: PTH116
    except OSError as error:
        return unreadable(error)
    if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime_ns) or len(encoded) != file.size:
        return Refused("changed while it was scanned; scan again", lasting=False)
    height, width, _ = pixels.shape
    content = hashlib.blake2b(encoded.data, digest_size=16).hexdigest()
    return Facts(height, width, len(encoded), content, difference_hash(pixels), pixel_sums(pixels))


def unreadable(error: OSError) -> Refused:
    if isinstance(error, FileNotFoundError):
        return Refused("not there any more, or a link that leads nowhere", lasting=False)
    return Refused(f"cannot be read ({error.strerror})", lasting=False)


def why_refused(file: File, complaint: str) -> Refused:
    """The reason in words, found by looking into the file: DALI's own is "nvImageCodec failure: '#4'" for most."""
    try:
        with open(file.path, "rb") as opened:  # noqa: PTH123
            head = opened.read(512)
            opened.seek(max(0, file.size - 64))
            tail = opened.read()
    except OSError as error:
        return unreadable(error)
    lines = [line.strip() for line in complaint.partition("encountered:")[2].splitlines()]
    said = next((line for line in lines if line), "no reason given").rstrip(" :")
    if not head:
        return Refused("0 bytes", lasting=True)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return Refused("a GIF, whatever its name, which DALI does not decode", lasting=True)
    if head.lstrip().startswith(b"<"):
        return Refused("a web page or XML (it begins with '<'), not a picture", lasting=True)
    if head[4:8] == b"ftyp":
        return Refused("a HEIF, AVIF or video file, which DALI does not decode", lasting=True)
    for magic, end in ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND")):
        if head.startswith(magic) and end not in tail:
            return Refused("truncated: its end is missing", lasting=True)
    short_of_memory = "alloc" in complaint.lower()
    return Refused(f"not a picture that DALI decodes ({said})", lasting=not short_of_memory)


def open_ledger(path: Path) -> sqlite3.Connection:
    """The file of facts by absolute path; it only saves work, so that one that is no SQLite file is begun anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ", ".join(f"{name} INTEGER" for name in ("height", "width", *SUMS))
    table = (
        "CREATE TABLE IF NOT EXISTS facts (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, decoder TEXT,"
        f" reason TEXT, content TEXT, {columns}, dhash INTEGER) WITHOUT ROWID"
    )
    ledger = sqlite3.connect(path)
    try:
        ledger.execute(table)
        if "dhash" not in {column for _, column, *_ in ledger.execute("PRAGMA table_info(facts)")}:
            ledger.execute("ALTER TABLE facts ADD COLUMN dhash INTEGER")  # a ledger of 0.1: its pictures are decoded again
    except sqlite3.OperationalError:  # cannot be opened, is read-only, disk full: the store's trouble
        ledger.close()
        raise
    except sqlite3.DatabaseError as error:
        logger.warning("%s: broken (%s); begun anew, all pictures are decoded again", path, error)
        ledger.close()
        path.unlink()
        ledger = sqlite3.connect(path)
        ledger.execute(table)
    return ledger


def recall(ledger: sqlite3.Connection, file: File) -> Facts | Refused | None:
    """What an earlier scan found in this very file; None if it has changed since, or DALI has."""
    row = ledger.execute(
        f"SELECT size, mtime_ns, decoder, reason, content, height, width, dhash, {', '.join(SUMS)} FROM facts WHERE path = ?",
        (os.fsencode(file.path),),
    ).fetchone()
    if row is None or row[:3] != (file.size, file.mtime_ns, DECODER):
        return None
    _, _, _, reason, content, height, width, dhash, *sums = row
    if reason is not None:
        return Refused(reason, lasting=True)
    return Facts(height, width, file.size, content, dhash % 2**64, tuple(sums)) if dhash is not None else None


def remember(ledger: sqlite3.Connection, file: File, outcome: Facts | Refused) -> None:
    """Notes an outcome that will be the same next time."""
    if isinstance(outcome, Facts):
        signed = outcome.dhash - 2**64 if outcome.dhash >= 2**63 else outcome.dhash  # SQLite's integers have a sign
        values = (None, outcome.content, outcome.height, outcome.width, *outcome.sums, signed)
    elif outcome.lasting:
        values = (outcome.reason, None, None, None, *[None] * len(SUMS), None)
    else:
        return
    row = (os.fsencode(file.path), file.size, file.mtime_ns, DECODER, *values)
    ledger.execute(f"INSERT OR REPLACE INTO facts VALUES ({', '.join('?' * len(row))})", row)


@contextmanager
def held(store: Path) -> Iterator[None]:
    """Holds STORE/locks/data.lock, after waiting for another scan; StoreError where the store cannot be written."""
    path = store / "locks" / "data.lock"
    lock = FileLock(path)
    with written(store):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("%s: another command scans into this store; waiting for it", store)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def written(store: Path) -> Iterator[None]:
    """What goes wrong with the store's own files inside, as StoreError."""
    try:
        yield
    except (OSError, sqlite3.Error, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StoreError(
            f"{store}: the store cannot be read and written ({reason}); make it writable, or name another with --store"
        ) from error
