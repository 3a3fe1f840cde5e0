"""Commands without the seconds of their imports: a process that has loaded torch, Ray and MLflow forks one for each command.

Each command is a process of its own with its own arguments, environment, folder and output, takes signals and ends as Python
does. What it does not show is what a command loads, and in which order: tests of that start Python anew.
"""

import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

MODULES = (
    "deploy.cli", "deploy.line", "deploy.retrain", "deploy.report", "deploy.predict", "training.fit", "ray.train.torch",
    "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store",
    "nvidia.dali.fn", "pandas", "matplotlib.font_manager",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
READ = ("OMP_", "MKL_", "CUDA_", "LD_", "PYTHON", "TMPDIR")     # variables that imports read, by how their names begin
CUT = 2**16                                  # bytes of one request, at most


class Preloaded:
    """The process that commands are forked from; one a test process."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Starts it, in this environment."""
        self.environment, self.lock = inherited(environment), threading.Lock()
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.preloaded", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], cwd=ROOT, stdin=subprocess.DEVNULL,
            env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
        theirs.close()

    def fits(self, environment: dict[str, str]) -> bool:
        """Whether a command in this environment may be forked here: what is read by imports is as it was."""
        return self.process.poll() is None and inherited(environment) == self.environment

    def start(
        self,
        module: str,
        words: list[str],
        *,
        cwd: Path | None,
        environment: dict[str, str],
        out: IO[Any],
        err: IO[Any],
        apart: bool = False,
    ) -> "Forked":
        """As subprocess.Popen of `python -m module words`; apart: in a session of its own."""
        place = str(cwd or Path.cwd())
        request = {"module": module, "words": words, "cwd": place, "environment": environment, "apart": apart}
        answers, done = os.pipe()
        with self.lock:
            socket.send_fds(self.requests, [json.dumps(request).encode()], [out.fileno(), err.fileno(), done])
        os.close(done)
        return Forked(answers)

    def run(
        self, words: list[str], *, cwd: Path | None, environment: dict[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run of `python -m deploy` with its output captured. Raises subprocess.TimeoutExpired."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            forked = self.start("deploy", words, cwd=cwd, environment=environment, out=out, err=err)
            try:
                code = forked.wait(timeout_s)
            except subprocess.TimeoutExpired:
                forked.kill()
                raise
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess([*words], code, out.read().decode(), err.read().decode())


class Forked:
    """A forked command, with what the tests use of subprocess.Popen."""

    def __init__(self, answers: int) -> None:
        """answers: a pipe that brings its number, and at its end its exit code, a line each."""
        self.answers, self.returncode = os.fdopen(answers), None
        self.pid = int(self.answers.readline())

    def __del__(self) -> None:
        self.answers.close()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self.answers], [], [], 0)[0]:
            self.returncode = int(self.answers.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not select.select([self.answers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """A signal, where it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def inherited(environment: dict[str, str]) -> dict[str, str]:
    """The variables that an import reads; a command has all others of its own."""
    return {name: value for name, value in environment.items() if name.startswith(READ)}


@functools.cache
def preloaded() -> Preloaded:
    """This test process's own, in the environment of the first command."""
    from tests.end_to_end.command import environment

    return Preloaded(environment())


def serve(requests: socket.socket) -> str:
    """Forks a command for each request until the other end closes; in the command's own process alone gives its module."""
    for module in MODULES:
        __import__(module)
    from mlflow.utils import requirements_utils

    requirements_utils._init_modules_to_packages_map()      # which installed package has which module: 1.5 s a command
    gc.freeze()                              # else each command spends four seconds at its end on what it did not make
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, CUT, 3)
        if not message:
            os._exit(0)
        between = os.fork()
        if between == 0 and (os.fork() or watch(descriptors[2])):
            os._exit(0)                      # who is between goes at once; who watches has written the exit code
        if between == 0:
            requests.close()
            request = json.loads(message)
            become(request, *descriptors)
            return str(request["module"])
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def watch(done: int) -> bool:
    """Forks the command, where it returns False; writes its number and, at its end, its exit code, and returns True."""
    command = os.fork()
    if not command:
        return False
    os.write(done, f"{command}\n".encode())
    _, status = os.waitpid(command, 0)
    os.write(done, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return True


def become(request: dict, out: int, err: int, done: int) -> None:
    """Takes on the arguments, environment, folder and output of a request."""
    os.close(done)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    if request["apart"]:
        os.setsid()
    sys.argv = [request["module"], *request["words"]]


if __name__ == "__main__":
    runpy.run_module(serve(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__", alter_sys=True)
