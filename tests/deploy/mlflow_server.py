"""A real MLflow server over HTTP, one a session, in its own process group, on a free port of 127.0.0.1."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], *, log: Path, address: str, cwd: Path, **more: str) -> Iterator[None]:
    """Runs a server while the block does: waits until `address` answers 200, ends its whole process group in any case.

    more: environment variables that it has besides.
    """
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **more,
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(address):
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(address: str) -> bool:
    """Whether a GET of `address` gives 200."""
    try:
        return requests.get(address, timeout=5).status_code == 200
    except requests.RequestException:
        return False


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server with an empty sqlite store and its own artifact folder (about 13 s to start)."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    address = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with running(command, log=folder / "server.log", address=f"{address}/health", cwd=folder):
        yield address


ADMIN, ADMIN_PASSWORD = "admin", "the-password-of-the-admin"


@contextmanager
def server_with_users(folder: Path) -> Iterator[str]:
    """The address of an MLflow server that asks for a password and lets every user read everything."""
    address = f"http://127.0.0.1:{free_port()}"
    settings = folder / "basic_auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder}/users.db\nadmin_username = {ADMIN}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    command = [
        sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1",
        "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with running(
        command,
        log=folder / "server.log",
        address=f"{address}/health",
        cwd=folder,
        MLFLOW_AUTH_CONFIG_PATH=str(settings),
        MLFLOW_AUTH_ADMIN_PASSWORD=ADMIN_PASSWORD,
        MLFLOW_FLASK_SERVER_SECRET_KEY="a key of the test",
    ):
        yield address
