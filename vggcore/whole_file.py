"""Files that appear whole or not at all: a temporary name in the same folder, fsync, rename; and lines added to a file."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vggcore.errors import StoreError

# What a person can mend: no room, a file larger than may be, or a folder that takes no writes (any more).
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; renames it to `path` when the block ends without an error.

    A crash at any line leaves either the old file or the new one, never a part. The folder is made if absent.
    Raises StoreError where the disk is full or takes no writes.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise StoreError(refusal(path, error)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def refusal(path: Path, error: OSError) -> str:
    """What to say of a file that cannot be written, in one line: in the system's words, as h5py's have several."""
    said = os.strerror(error.errno) if error.errno else next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"{path}: cannot be written ({said}); make room, or make the folder writable, and start the same command"
        " again"
    )


def append_text(path: Path, text: str) -> None:
    """Adds `text` at the end of `path`. Raises StoreError where it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StoreError(refusal(path, error)) from error


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, whole or not at all; NaN is refused (it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable: after a rename, the rename itself survives a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
