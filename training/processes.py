"""A command as a process of its own, with all that it starts: watched, and ended for certain."""

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from vggcore.errors import TrainingError

LOOK_S = 0.01
GONE_S = 10.0


class Command:
    """A command that runs in a session of its own; what it says goes to a file, so that no pipe can fill."""

    def __init__(self, words: Sequence[str], *, environment: dict[str, str], log: Path) -> None:
        """Starts it; `began` is time.monotonic() just before."""
        self.words, self.log = words, log
        with log.open("wb") as file:
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                words, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )

    def family(self) -> list[psutil.Process]:
        """The command's process and all below it."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """Ray Train's worker processes below it, oldest first."""
        return sorted(ray_workers(self.family()), key=lambda process: process.pid)

    def wait_for(self, condition: Callable[[], bool], what: str, *, limit_s: float) -> float:
        """time.monotonic() when the condition first held. Raises TrainingError when the command ends, or takes too long."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None:
                raise TrainingError(f"{what}: the command ended ({self.process.returncode}): {self.last_line()}")
            if time.monotonic() > deadline:
                raise TrainingError(f"{what}: nothing after {limit_s:.0f} s; the command's last line: {self.last_line()}")
            time.sleep(LOOK_S)
        return time.monotonic()

    def last_line(self) -> str:
        """The last thing it said."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def kill(self) -> None:
        """SIGKILL to the command and to all that it has started, in whatever session; returns when they are gone."""
        family = self.family()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        psutil.wait_procs([process for process in family if process.pid != self.process.pid], timeout=GONE_S)


def environment_without(*names: str) -> dict[str, str]:
    """This process's environment but for some variables."""
    return {name: value for name, value in os.environ.items() if name not in names}


def ray_workers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that are Ray Train's workers; one that has gone meanwhile is none."""
    found = []
    for process in processes:
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found
