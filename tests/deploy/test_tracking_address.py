import http.server
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest

from deploy.tracking_address import artifact_location, check_sqlite, check_tracking, resolve_tracking, using_tracking
from tests.deploy.mlflow_server import free_port
from vggcore.errors import TrackingError


@contextmanager
def answering(status):
    """A server that answers every GET with `status`."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent():
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_without_an_address_the_store_has_its_own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    uri = resolve_tracking(None, Path("store"))

    assert uri == f"sqlite:///{tmp_path}/store/mlflow.db"
    assert artifact_location(uri, Path("store")) == f"file://{tmp_path}/store/artifacts"


def test_a_server_keeps_its_own_artifact_location_and_a_relative_file_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert resolve_tracking("http://host:5000/", tmp_path) == "http://host:5000"
    assert artifact_location("http://host:5000", tmp_path) is None
    assert resolve_tracking("sqlite:///runs.db", tmp_path) == f"sqlite:///{tmp_path}/runs.db"
    assert resolve_tracking("sqlite:////data/runs.db", tmp_path) == "sqlite:////data/runs.db"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("mlruns", "is a folder"),
        ("/data/mlruns", "is a folder"),
        ("file:///data/mlruns", "is a folder"),
        ("ftp://host/x", "unknown kind of address 'ftp'"),
        ("databricks", "is a folder"),
        ("http://", "no host"),
        ("sqlite://", "no file"),
        ("sqlite:///", "no file"),
        ("sqlite:///:memory:", "no file"),
    ],
)
def test_another_kind_of_address_is_refused_with_the_kinds_there_are(tmp_path, uri, words):
    with pytest.raises(TrackingError, match=words) as caught:
        resolve_tracking(uri, tmp_path)

    assert "wanted sqlite:///FILE or http(s)://HOST:PORT" in str(caught.value)
    assert repr(uri) in str(caught.value)


def refused(tracking):
    started = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        check_tracking(tracking)
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_that_is_down_is_named_within_10_s():
    address = f"http://127.0.0.1:{free_port()}"

    message = refused(address)

    assert f"{address}: no MLflow server answers (connection refused); start it" in message


def test_a_server_that_never_answers_is_named_within_10_s():
    with silent() as address:
        assert "no answer within" in refused(address)


def test_an_unknown_host_is_named_within_10_s():
    assert "no MLflow server answers" in refused("http://nowhere.invalid:5000")


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "HTTP 401.*MLFLOW_TRACKING_USERNAME"), (403, "HTTP 403.*--allowed-hosts"), (404, "HTTP 404"), (503, "HTTP 503")],
)
def test_a_server_that_refuses_us_or_is_another_is_said(status, words):
    with answering(status) as address, pytest.raises(TrackingError, match=words):
        check_tracking(address)


def test_a_password_in_the_address_is_not_shown():
    message = refused(f"http://ann:secret@127.0.0.1:{free_port()}")

    assert "secret" not in message
    assert "--tracking http://127.0.0.1:" in message


def test_a_web_server_that_is_no_mlflow_is_said():
    with answering(200) as address, pytest.raises(TrackingError, match=r"server answers|not an MLflow server"):
        check_tracking(address)


def test_a_sqlite_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "notes.db").write_text("not a database " * 100)

    assert "not a database" in refused(f"sqlite:///{tmp_path}/notes.db")
    assert "no folder" in refused(f"sqlite:///{tmp_path}/absent/mlflow.db")
    check_tracking(f"sqlite:///{tmp_path}/new.db")
    assert not (tmp_path / "new.db").exists()


def test_mlflow_is_left_patient_only_where_the_user_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)

    check_tracking(resolve_tracking(None, tmp_path))

    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_the_process_wide_address_is_put_back(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow.set_tracking_uri(None)

    with using_tracking(f"sqlite:///{tmp_path}/a.db"):
        with using_tracking(f"sqlite:///{tmp_path}/b.db"):
            inner = mlflow.get_tracking_uri()
        between = mlflow.get_tracking_uri()

    assert (inner, between) == (f"sqlite:///{tmp_path}/b.db", f"sqlite:///{tmp_path}/a.db")
    assert not mlflow.tracking.is_tracking_uri_set()
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_database_whose_writer_was_killed_is_rolled_back_and_used(tmp_path):
    path = tmp_path / "mlflow.db"
    killed = (
        "import os, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('CREATE TABLE runs (name TEXT)')\n"
        "connection.execute('PRAGMA cache_size = 1')\n"
        "connection.execute('BEGIN')\n"
        "connection.executemany('INSERT INTO runs VALUES (?)', [('x' * 1000,)] * 1000)\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", killed, path])
    assert path.with_name("mlflow.db-journal").stat().st_size > 0

    check_sqlite(path)

    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchall() == [(0,)]
