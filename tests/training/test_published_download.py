"""Publishers' files over HTTP, from a real server on this machine that cuts, stalls, drips, lies and redirects."""

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from tests.training.published_files import convs
from training.published.download import download
from training.published.known import KNOWN, Known, imagenet_classes
from training.published.library import find_weights, import_weights
from training.store import open_store
from vggcore.errors import StoreError, WeightsError

CONTENT = bytes(range(256)) * 4000      # 1,024,000 bytes
NAME = "torchvision/vgg11"


@dataclass
class Publisher:
    """A server of one file; `plan` says how each request is answered: whole, or sent as far as a byte and then cut."""

    content: bytes = CONTENT
    plan: list[str] = field(default_factory=list)     # "cut:N", "stall:N", "drip", "404", "ignore range"; then whole
    asked: list[str | None] = field(default_factory=list)      # the Range of each request
    paths: list[str] = field(default_factory=list)
    let_go: threading.Event = field(default_factory=threading.Event)
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    publisher: Publisher

    def log_message(self, *_args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        here = self.publisher
        if self.path.startswith("/old/"):
            self.send_response(302)
            self.send_header("Location", f"{here.address}/new/{self.path.rpartition('/')[2]}")
            self.end_headers()
            return
        here.asked.append(self.headers.get("Range"))
        here.paths.append(self.path)
        how = here.plan.pop(0) if here.plan else "whole"
        if how == "404":
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", here.asked[-1])[1]) if here.asked[-1] and how != "ignore range" else 0
        if start >= len(here.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(here.content)}")
            self.end_headers()
            return
        rest = here.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(here.content) - 1}/{len(here.content)}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        kind, _, number = how.partition(":")
        if kind in ("cut", "stall"):
            self.wfile.write(rest[: int(number)])
            self.wfile.flush()
            if kind == "stall":
                here.let_go.wait(30)
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        for place in range(0, len(rest), 100_000) if kind == "drip" else [0]:
            self.wfile.write(rest[place : place + 100_000] if kind == "drip" else rest)
            if kind == "drip":
                self.wfile.flush()
                here.let_go.wait(0.05)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    here = Publisher()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"publisher": here}))
    here.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        here.let_go.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def known(publisher, monkeypatch) -> Known:
    """torchvision/vgg11 as if torchvision had published what the server has."""
    return publish(publisher, monkeypatch)


def publish(publisher: Publisher, monkeypatch) -> Known:
    digest = hashlib.sha256(publisher.content).hexdigest()[:8]
    entry = Known(f"{publisher.address}/vgg11-{digest}.pth", "sha256", digest, None, "a server")
    monkeypatch.setitem(KNOWN, NAME, entry)
    return entry


def fetched(folder, **options):
    """The downloaded file, what was said, and the progress."""
    said, seen = [], []
    settings = {"mirror": None, "progress": lambda *at: seen.append(at), "say": said.append, "read_s": 1.0} | options
    return download(NAME, folder, **settings), said, seen


def test_a_file_is_downloaded_with_progress_and_its_digest_verified(tmp_path, publisher, known):
    path, said, seen = fetched(tmp_path)

    assert path.name == known.file_name and path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and said == []
    assert fetched(tmp_path)[0] == path and publisher.asked == [None]       # what is there is not fetched again
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".lock", ".pth"]


def test_a_cut_connection_is_resumed_where_it_was(tmp_path, publisher, known):
    publisher.plan = ["cut:300000", "cut:100000"]

    path, said, _ = fetched(tmp_path)

    assert path.read_bytes() == CONTENT
    first, second = (int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) for asked in publisher.asked[1:])
    assert 0 < first <= 300_000 and first < second <= 400_000
    assert len(said) == 2 and "cut off after" in said[0]


def test_a_server_that_does_not_know_ranges_starts_over(tmp_path, publisher, known):
    publisher.plan = ["cut:300000", "ignore range"]

    path, _, _ = fetched(tmp_path)

    assert path.read_bytes() == CONTENT


def test_a_server_that_falls_silent_is_given_up_and_the_next_call_resumes(tmp_path, publisher, known):
    publisher.plan = ["stall:300000", "stall:0", "stall:0", "stall:0"]

    with pytest.raises(WeightsError, match=r"no byte for a while.*bytes are kept and the same command resumes") as refused:
        fetched(tmp_path, read_s=0.5)
    assert "\n" not in str(refused.value) and known.url in str(refused.value)
    publisher.let_go.set()
    kept = tmp_path.joinpath(f"{known.file_name}.part").stat().st_size
    path, _, _ = fetched(tmp_path)

    assert kept > 0 and publisher.asked[-1] == f"bytes={kept}-"
    assert path.read_bytes() == CONTENT


def test_a_slow_server_is_waited_for_as_long_as_bytes_come(tmp_path, publisher, known):
    publisher.plan = ["drip"]

    path, said, seen = fetched(tmp_path, read_s=0.4)

    assert path.read_bytes() == CONTENT and said == [] and len(seen) > 3


def test_another_file_than_the_publishers_is_removed_and_named(tmp_path, publisher, known):
    publisher.content = b"<html>sign in to go on</html>" * 1000

    with pytest.raises(WeightsError, match=rf"its sha256 is \w{{8}}, expected {known.digest} \(29,000 bytes, removed\)"):
        fetched(tmp_path)

    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_a_part_of_another_file_is_thrown_away(tmp_path, publisher, known):
    part = tmp_path / f"{known.file_name}.part"
    part.write_bytes(b"x" * (len(CONTENT) + 7))                  # longer than what the publisher has

    assert fetched(tmp_path)[0].read_bytes() == CONTENT


def test_a_whole_part_needs_no_byte_more(tmp_path, publisher, known):
    (tmp_path / f"{known.file_name}.part").write_bytes(CONTENT)  # killed just before its digest was verified

    assert fetched(tmp_path)[0].read_bytes() == CONTENT
    assert publisher.asked == [f"bytes={len(CONTENT)}-"]


def test_a_downloaded_file_that_was_changed_is_not_used(tmp_path, publisher, known):
    path, _, _ = fetched(tmp_path)
    path.write_bytes(b"changed")

    with pytest.raises(WeightsError, match="expected"):
        fetched(tmp_path)

    assert fetched(tmp_path)[0].read_bytes() == CONTENT


def test_a_file_that_is_gone_is_one_line_with_what_to_fetch_by_hand(tmp_path, publisher, known):
    publisher.plan = ["404"]

    with pytest.raises(WeightsError) as refused:
        fetched(tmp_path)

    for words in (known.url, "HTTP 404", f"import /PATH/TO/{known.file_name} --name {NAME}"):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_a_network_one_line_names_the_file_and_the_command(tmp_path, known):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}/"   # bound, not listening: refused at once

    with pytest.raises(WeightsError) as refused:
        fetched(tmp_path, mirror=nobody)

    command = f"copy it to this machine and run vggrow weights import /PATH/TO/{known.file_name} --name {NAME}"
    for words in ("connection refused", f"fetch {known.url} by hand", command):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mirror_has_the_publishers_file_names_and_may_redirect(tmp_path, publisher, known):
    path, _, _ = fetched(tmp_path, mirror=f"{publisher.address}/old/")

    assert path.read_bytes() == CONTENT
    assert publisher.paths == [f"/new/{known.file_name}"]


@pytest.mark.parametrize("mirror", ["nowhere", "ftp://127.0.0.1/", "http://", "http://[::1"])
def test_an_address_that_is_none_is_refused_in_one_line(tmp_path, known, mirror):
    with pytest.raises(WeightsError) as refused:
        fetched(tmp_path, mirror=mirror)

    assert "\n" not in str(refused.value)


def test_two_downloads_at_once_fetch_the_file_once(tmp_path, publisher, known):
    publisher.plan = ["drip"]
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetched(tmp_path)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert len(paths) == 2 and publisher.asked == [None]
    assert paths[0].read_bytes() == CONTENT


def test_a_publishers_name_is_downloaded_imported_and_cleared_away(tmp_path, publisher, monkeypatch):
    torch.save(convs("A"), tmp_path / "file.pth")
    publisher.content = (tmp_path / "file.pth").read_bytes()
    publish(publisher, monkeypatch)
    publisher.plan = ["cut:20000000"]
    store = open_store(tmp_path / "store")

    record = import_weights(NAME, store)

    assert (record.name, record.origin, record.source) == (NAME, "a server", NAME)
    assert find_weights(store, NAME)[0] == record
    assert [file.suffix for file in (store.root / "downloads").iterdir()] == [".lock"]
    # the same file by hand is known by its digest, and so has the publisher's name
    assert import_weights(str(tmp_path / "file.pth"), store) == record
    assert import_weights(str(tmp_path / "file.pth"), store, name=NAME) == record
    assert len(imagenet_classes()) == 1000 and record.classes is None        # convs alone have no classes


def test_a_publishers_weights_that_the_store_has_are_not_downloaded_again(tmp_path, publisher, monkeypatch):
    torch.save(convs("A"), tmp_path / "file.pth")
    publisher.content = (tmp_path / "file.pth").read_bytes()
    publish(publisher, monkeypatch)
    publisher.plan = ["drip"]      # the second import begins while the first downloads
    store = open_store(tmp_path / "store")

    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(lambda _: import_weights(NAME, store), range(2)))
    again = import_weights(NAME, store)

    assert records == [again, again] and len(publisher.asked) == 1
    with pytest.raises(StoreError, match=f"--name mine: these weights are in the store already, as '{NAME}'"):
        import_weights(NAME, store, name="mine")
    assert len(publisher.asked) == 1


def test_a_name_that_other_weights_have_is_refused_before_a_byte_is_downloaded(tmp_path, publisher, monkeypatch):
    torch.save(convs("A"), tmp_path / "file.pth")
    publish(publisher, monkeypatch)
    store = open_store(tmp_path / "store")
    import_weights(str(tmp_path / "file.pth"), store, name="mine")

    with pytest.raises(StoreError, match=r"weights 'mine': .* from .*file.pth; give another --name, or .* remove mine"):
        import_weights(NAME, store, name="mine")
    assert publisher.asked == []


def test_a_disk_that_fills_up_while_downloading_is_named(tmp_path, publisher, known):
    import os
    import subprocess

    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        with pytest.raises(StoreError, match="make room"):
            fetched(place)
    finally:
        subprocess.run(["umount", place], check=True)
