"""Files that appear whole or not at all: a temporary name in the same folder, fsync, rename; and lines added to a file."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vggcore.errors import StoreError

# No room, a file larger than may be, or a folder that takes no writes (any more).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# A place where no file can be, or a disk that fails.
NO_PLACE = (
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EIO),
    *(errno.ENXIO, errno.ENODEV, errno.ETXTBSY, errno.EBUSY, errno.ESTALE),
)
REFUSED = NO_ROOM + NO_PLACE      # of writing a file; other errors of the system may come from a network
KINDS = (
    *((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket")),
    (lambda _mode: True, "a device"),
)
LONGEST_NAME = 200                # bytes of a file's name that its temporary one repeats; most systems allow 255


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; renames it to `path` when the block ends without an error.

    A crash at any line leaves either the old file or the new one, never a part. The folder is made if absent. A link to a
    file stays, and the file is replaced. Raises StoreError for whatever keeps the file from being written, a device or
    folder in its place included.
    """
    check_target(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    name = os.fsencode(path.name).decode("utf-8", "ignore").encode()[:LONGEST_NAME].decode("utf-8", "ignore")
    part = path.with_name(f".{name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(refusal(path, error)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """StoreError where something other than a file is at `path`, or a link to nothing: none of them may be replaced."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise StoreError(f"{path}: is a link to nothing, expected a file; remove it, or name another") from None
        return
    except OSError as error:
        raise StoreError(refusal(path, error)) from error
    if not stat.S_ISREG(mode):
        kind = next(words for kind, words in KINDS if kind(mode))
        raise StoreError(f"{path}: is {kind}, expected a file's name; name another")


def refusal(path: Path, error: OSError) -> str:
    """What to say of a file that cannot be written, in one line: in the system's words, as h5py's have several."""
    reason = os.strerror(error.errno) if error.errno else next(iter(str(error).splitlines()), type(error).__name__)
    advice = "name another file"
    if error.errno not in NO_PLACE:
        advice = "make room, or make the folder writable, and start the same command again"
    return f"{path}: cannot be written ({reason}); {advice}"


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
