"""The head of a cluster from outside: which interpreter it runs, by what its dashboard says of its nodes."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deploy import ray_head
from deploy.ray_head import head_python
from vggcore.errors import ClusterError

WORKER = "/srv/ray/setup_worker.py --node-ip-address=10.0.0.1"


def node(python: str | None, *, head: bool = True, state: str = "ALIVE") -> dict[str, Any]:
    """A node as Ray 2.60's dashboard has it, as far as we look."""
    words = ["/srv/ray/raylet", "--node_id=1", *([f"--python_worker_command={python} {WORKER}"] if python else [])]
    return {"cmdline": words, "raylet": {"isHeadNode": head, "state": state}}


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], str]]:
    """Starts a dashboard that gives these bytes for /nodes, the last ones for ever, and gives its address."""
    servers = []

    def start(*answers: bytes) -> str:
        left = list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path == "/nodes?view=summary" and self.headers["Authorization"] == "Bearer t"
                found = (left.pop(0) if len(left) > 1 else left[0]) if known else b""
                self.send_response(200 if found else 403)
                self.end_headers()
                self.wfile.write(found)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def summary(*nodes: dict[str, Any]) -> bytes:
    return json.dumps({"data": {"summary": nodes}}).encode()


def test_the_interpreter_is_the_living_heads_own(serve):
    nodes = [node("/nodes/python", head=False), node("/old/python", state="DEAD"), node('"/opt/my ray/bin/python3"')]

    assert head_python(serve(summary(*nodes)), {"Authorization": "Bearer t"}) == "/opt/my ray/bin/python3"


def test_a_head_that_has_just_started_is_asked_again(serve, monkeypatch):
    silent = summary(node("/venv/bin/python") | {"cmdline": []})

    found = head_python(serve(silent, silent, summary(node("/venv/bin/python"))), {"Authorization": "Bearer t"})

    assert found == "/venv/bin/python"
    monkeypatch.setattr(ray_head, "REPORT_S", 0.6)
    with pytest.raises(ClusterError, match="name it by --python"):
        head_python(serve(silent), {"Authorization": "Bearer t"})


# fmt: off
NO_WORD = [
    # what the dashboard says                       why it does not help
    (b"<html>",                                     "no JSON"),
    (b'{"data": {}}',                               "another shape"),
    (b'{"data": {"summary": [{"raylet": null}]}}',  "a node without a word"),
    (summary(),                                     "no node"),
    (summary(node(None)),                           "no such word in the command line"),
    (summary(node("python3")),                      "no absolute path"),
    (summary(node("/nodes/python", head=False)),    "no head"),
]
# fmt: on


@pytest.mark.parametrize("body", [body for body, _ in NO_WORD], ids=[why for _, why in NO_WORD])
def test_a_dashboard_that_does_not_say_it_is_answered_with_what_to_do(body, serve):
    address = serve(body)

    with pytest.raises(ClusterError) as error:
        head_python(address, {"Authorization": "Bearer t"})

    assert str(error.value).startswith(f"--address {address}: ")
    assert str(error.value).endswith("does not say which interpreter it runs; name it by --python")
