"""The store: one folder, local or shared by all nodes, that holds everything a schedule makes (DESIGN: store).

    data/<fingerprint>/      stages/<key>/      schedules/<key>/      evaluations/<key>/      locks/      ray/ (scratch)
    weights/<digest>/        downloads/ (what is being downloaded)      features/<key>/
    mlflow.db                artifacts/         (where no tracking server is named)
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vggcore.errors import StoreError
from vggcore.home_path import at_home
from vggcore.whole_file import refusal, write_json, write_text

DEFAULT_STORE = "vggrow-store"
LOOK_S = 0.5
FOREVER = -1.0      # filelock's own


@dataclass(frozen=True)
class Store:
    """The folders of a store; `root` is absolute."""

    root: Path

    def stage(self, key: str) -> Path:
        """stage.json, checkpoints/iteration-<n>/, history.jsonl and, last of all, result.json."""
        return self.root / "stages" / key

    def schedule(self, key: str) -> Path:
        """recipe.toml and stages.json."""
        return self.root / "schedules" / key

    def data(self, fingerprint: str) -> Path:
        """manifest.parquet, quarantine.csv and colour.json."""
        return self.root / "data" / fingerprint

    def evaluation(self, stage_key: str, key: str) -> Path:
        """posteriors.parquet and evaluation.json of one protocol."""
        return self.root / "evaluations" / stage_key / key

    def features(self, key: str) -> Path:
        """features.json and parts/: pooled outputs of a net for pictures, by their content."""
        return self.root / "features" / key

    @property
    def weights(self) -> Path:
        """<digest>/: model.safetensors and weights.json of published weights."""
        return self.root / "weights"

    @property
    def locks(self) -> Path:
        """Lock files, who holds them, fencing numbers and stop requests."""
        return self.root / "locks"

    @property
    def scratch(self) -> Path:
        """Ray Train's own run folders: nothing there is ever read again."""
        return self.root / "ray"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts where no tracking server is named."""
        return self.root / "artifacts"


def store_root(path: Path | str) -> Path:
    """The absolute folder that --store names. Raises StoreError for a home that is not there."""
    return at_home(path, StoreError, place="--store ").absolute()


def open_store(path: Path | str) -> Store:
    """The store at `path`, made if absent. Raises StoreError for a URL, a file, or a folder that cannot be written."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)):
        raise StoreError(
            f"--store {path}: a URL cannot be a store yet: checkpoints appear by renaming a folder, which object stores"
            " cannot do; name a folder, on a cluster one that every node mounts at the same path"
        )
    store = Store(store_root(path))
    try:
        store.locks.mkdir(parents=True, exist_ok=True)
        probe = store.locks / f".probe.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise StoreError(
            f"--store {path}: cannot be written ({error.strerror}); name a folder that you may write to"
        ) from error
    return store


def store_to_read(path: Path | str) -> Store:
    """The store at `path` for a command that only reads. Raises StoreError when there is none."""
    root = store_root(path)
    if not root.is_dir():
        raise StoreError(f"--store {path}: no store there; name one that `vggrow train` or `vggrow data scan` has made")
    return Store(root)


def store_around(path: Path) -> Path | None:
    """The store that an absolute path is, or is inside of; None where it is in none."""
    parts = ("data", "stages", "schedules", "weights")
    for folder in (path, *path.parents):
        if (folder / "locks").is_dir() and any((folder / part).is_dir() for part in parts):
            return folder
    return None


def read_json(path: Path) -> Any:
    """The JSON in `path`, or None when there is no such file. Raises StoreError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); move it away and start the same command again") from error


def take(lock: FileLock, timeout_s: float) -> None:
    """Takes the lock. Raises Timeout where another has it all that time, StoreError where its file cannot be made."""
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:                   # an OSError too
        raise
    except OSError as error:
        raise StoreError(refusal(Path(lock.lock_file), error)) from error


@contextmanager
def lock_file_held(path: Path, timeout_s: float = FOREVER) -> Iterator[None]:
    """Holds the lock file `path` while the block runs. Raises as take."""
    lock = FileLock(path)
    take(lock, timeout_s)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def hold(store: Store, name: str, *, what: str) -> Iterator[int]:
    """Holds the store's lock `name` while the block runs and gives its fencing number, one more at every taking.

    A killed holder's lock is free at once (the kernel drops it); its orphaned workers are kept from writing by the
    number, see fence_holds. Raises StoreError that says who holds the lock.
    """
    lock = FileLock(store.locks / f"{name}.lock")
    try:
        take(lock, LOOK_S)      # `vggrow status` takes a lock for an instant, to see whether it is held
    except Timeout:
        raise StoreError(f"{what} is held by {holder(store, name)}; wait until it has finished, or stop it") from None
    try:
        number = fence_number(store, name) + 1
        write_text(store.locks / f"{name}.fence", f"{number}\n")
        held_by = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(store.locks / f"{name}.holder.json", held_by)
        yield number
    finally:
        lock.release()


@contextmanager
def hold_when_free(path: Path, busy: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file `path` while the block runs, waiting as long as another has it; `say` is told once, by `busy`.

    For work of seconds to minutes whose second caller has nothing to do but wait; its holder leaves no name.
    """
    lock = FileLock(path)
    try:
        take(lock, LOOK_S)
    except Timeout:
        say(f"{busy}: waiting for it")
        take(lock, FOREVER)
    try:
        yield
    finally:
        lock.release()


def holder(store: Store, name: str) -> str:
    """Who took the lock last, in words."""
    found = read_json(store.locks / f"{name}.holder.json")
    if found is None:
        return "another command"
    return f"process {found['pid']} on {found['host']} since {found['since']}"


def fence_number(store: Store, name: str) -> int:
    """How often the lock has been taken."""
    try:
        return int((store.locks / f"{name}.fence").read_text())
    except FileNotFoundError:
        return 0


def fence_holds(store: Store, name: str, number: int) -> bool:
    """Whether nobody has taken the lock since it gave `number`: to be asked before every write."""
    return fence_number(store, name) == number


def request_stop(store: Store, name: str, number: int) -> None:
    """Asks the workers that train under this lock and number to write a checkpoint and return."""
    write_text(store.locks / f"{name}.stop", f"{number}\n")


def stop_requested(store: Store, name: str, number: int) -> bool:
    """Whether request_stop was called for this number."""
    try:
        return (store.locks / f"{name}.stop").read_text() == f"{number}\n"
    except FileNotFoundError:
        return False
