"""The vggrow command as its users run it: a process of its own, stopped and killed by real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.end_to_end.preloaded import Forked, preloaded
from training.processes import ray_workers

VGGROW = [sys.executable, "-m", "deploy"]
ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("VGGROW_STORE", "MLFLOW_TRACKING_URI", "PYTHONBREAKPOINT")      # the last: of a Ray in a test's process


def environment(**more: str) -> dict[str, str]:
    """The caller's, without its stores and what Ray left in it."""
    ours = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    return ours | {"PYTHONPATH": str(ROOT)} | more


def vggrow(*words: object, cwd: Path | None = None, timeout_s: float = 240, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, in a process of its own whose imports are done where its environment allows it."""
    typed, wanted = [*map(str, words)], environment(**more)
    if preloaded().fits(wanted):
        return preloaded().run(typed, cwd=cwd, environment=wanted, timeout_s=timeout_s)
    return subprocess.run([*VGGROW, *typed], capture_output=True, text=True, cwd=cwd, env=wanted, timeout=timeout_s)


class Running:
    """A vggrow command that is still running; its output goes to files, so that no pipe can fill."""

    def __init__(self, *words: object, log: Path) -> None:
        """Starts it in a process group of its own."""
        self.log = log
        self.file = log.open("w")
        self.process: subprocess.Popen[bytes] | Forked
        typed, wanted = [*map(str, words)], environment()
        if preloaded().fits(wanted):
            self.process = preloaded().start(
                "deploy", typed, cwd=None, environment=wanted, out=self.file, err=self.file, apart=True
            )
        else:
            self.process = subprocess.Popen(
                [*VGGROW, *typed], stdout=self.file, stderr=self.file, env=wanted, start_new_session=True
            )

    def send(self, number: int) -> None:
        """A signal to the command alone, as a person or a supervisor sends it."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 120) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout_s)
        finally:
            self.file.close()

    def kill_everything(self) -> None:
        """SIGKILL to the command and to all it has started, in any process group."""
        try:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        self.file.close()

    def workers(self) -> list[psutil.Process]:
        """Ray Train's worker processes below this command."""
        return ray_workers(psutil.Process(self.process.pid).children(recursive=True))

    def output(self) -> str:
        """What it has said so far."""
        return self.log.read_text()


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float, running: Running | None = None, every_s: float = 0.02
) -> None:
    """Waits for a condition; fails when it takes too long, or when the command has ended meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if running is not None and running.process.poll() is not None:
            raise AssertionError(f"the command ended ({running.process.returncode}):\n{running.output()}")
        assert time.monotonic() < deadline, f"waited {timeout_s} s" + (f":\n{running.output()}" if running else "")
        time.sleep(every_s)


SIGINT, SIGTERM, SIGKILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
