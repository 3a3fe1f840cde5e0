"""Commands without the seconds of their imports: a process that has loaded torch, Ray and MLflow forks one for each command.

Each command is a process of its own with its own arguments, environment, folder and output, and ends as Python ends. What it
does not show is what a command loads, and in which order: tests of that, and of signals, start Python anew.
"""

import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

MODULES = (
    "deploy.cli", "deploy.line", "deploy.retrain", "deploy.report", "deploy.predict", "training.fit", "ray.train.torch",
    "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store",
    "nvidia.dali.fn", "pandas",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
OWN = ("VGGROW_", "MLFLOW_TRACKING_URI")     # variables that nothing reads while it is imported
CUT = 2**16                                  # bytes of one request, at most


class Preloaded:
    """The process that commands are forked from; one a test process."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Starts it, in this environment."""
        self.environment, self.lock = inherited(environment), threading.Lock()
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.preloaded", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()

    def fits(self, environment: dict[str, str]) -> bool:
        """Whether a command in this environment may be forked here: what is read by imports is as it was."""
        return self.process.poll() is None and inherited(environment) == self.environment

    def run(
        self, words: list[str], *, cwd: Path | None, environment: dict[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run of `python -m deploy` with its output captured. Raises subprocess.TimeoutExpired."""
        request = json.dumps({"words": words, "cwd": str(cwd or Path.cwd()), "environment": environment}).encode()
        ended, done = os.pipe()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, os.fdopen(ended) as answers:
            with self.lock:
                socket.send_fds(self.requests, [request], [out.fileno(), err.fileno(), done])
            os.close(done)
            command = int(answers.readline())
            timer = threading.Timer(timeout_s, os.kill, (command, signal.SIGKILL))
            timer.start()
            code = int(answers.readline())
            late = not timer.is_alive()
            timer.cancel()
            out.seek(0)
            err.seek(0)
            found = out.read().decode(), err.read().decode()
        if late and code == -signal.SIGKILL:
            raise subprocess.TimeoutExpired(words, timeout_s, *found)
        return subprocess.CompletedProcess([*words], code, *found)


def inherited(environment: dict[str, str]) -> dict[str, str]:
    """The variables that an import may read, and pytest's own left out."""
    return {name: value for name, value in environment.items() if not name.startswith((*OWN, "PYTEST_"))}


@functools.cache
def preloaded() -> Preloaded:
    """This test process's own, in the environment of the first command."""
    from tests.end_to_end.command import environment

    return Preloaded(environment())


def serve(requests: socket.socket) -> None:
    """Forks a command for each request until the other end closes; returns in the command's own process alone."""
    for module in MODULES:
        __import__(module)
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
            become(json.loads(message), *descriptors)
            return
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
    sys.argv = ["vggrow", *request["words"]]


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module("deploy", run_name="__main__", alter_sys=True)
