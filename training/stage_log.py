"""A stage's log files: what a person wants to know of it three weeks later, in STORE/stages/<key>/logs/.

    conductor.log       the command: when it began and with what, starts of workers, notices, how the stage ended
    worker-<rank>.log   a worker: when it began and with what, each epoch, each checkpoint, what went wrong

    2026-11-24T18:22:01.123+0000 node7 4711 worker-0 INFO epoch 3 of 74 ended at iteration 48: ...

Our lines go there alone; what anybody in the process warns of (Python's warnings too) goes there besides the screen. A line
an epoch and a checkpoint, never one an iteration. A disk that takes no more costs lines and nothing else.
"""

import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("vggrow", "torch", "nvidia-dali-cuda130", "ray", "numpy")
FIT = "fit-"       # how the name of the thread begins in which the conductor waits for a stage's workers
CONDUCTOR = "conductor"


def logs_folder(stage_folder: Path) -> Path:
    """Where a stage's log files stand."""
    return stage_folder / "logs"


def worker_name(rank: int) -> str:
    """What a worker is called in its lines and in its file's name."""
    return f"worker-{rank}"


def stage_logger(key: str, who: str) -> logging.Logger:
    """The logger whose lines go to the stage's file alone; to nowhere while no stage_log of this name is open."""
    found = logging.getLogger(f"vggrow-stage.{key}.{who}")
    if not found.handlers:
        found.addHandler(logging.NullHandler())
        found.propagate = False
        found.setLevel(logging.INFO)
    return found


@contextmanager
def stage_log(
    stage_folder: Path, key: str, who: str, hears: Callable[[logging.LogRecord], bool]
) -> Iterator[logging.Logger]:
    """Keeps a log while the block runs and gives the logger for our own lines; lines are added to what is there.

    hears: which of the warnings of this process concern the stage (see worker_hears, conductor_hears). An exception that
    ends the block is written with its traceback. What the disk refuses is passed over and counted.
    """
    logger, root = stage_logger(key, who), logging.getLogger()
    handler = LogFile(logs_folder(stage_folder) / f"{who}.log", who)
    handler.addFilter(lambda record: record.name == logger.name or (record.levelno >= logging.WARNING and hears(record)))
    for one in (logger, root):
        one.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield logger
    except BaseException:
        logger.exception("ended by what no line above explains:")
        raise
    finally:
        for one in (logger, root):
            one.removeHandler(handler)
        if not any(isinstance(other, LogFile) for other in root.handlers):
            logging.captureWarnings(False)


class LogFile(logging.Handler):
    """A file that is opened for each line: no buffer, so nothing is lost in a kill, and nothing fails when it is closed."""

    def __init__(self, path: Path, who: str) -> None:
        """Makes no file yet."""
        super().__init__()
        self.path, self.lost = path, 0
        self.setFormatter(LogLine(who))

    def emit(self, record: logging.LogRecord) -> None:
        """Adds the record's line; when that fails it is counted, for the next line that succeeds to say."""
        try:
            line = self.format(record) + "\n"
            if self.lost:
                line = f"\n({self.lost} lines before this one could not be written)\n{line}"
            self.path.parent.mkdir(exist_ok=True)      # not its parents: a worker may not see the store at all
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                text = line.encode(errors="replace")
                if os.write(file, text) < len(text):
                    raise OSError("the disk took a part of it")
            finally:
                os.close(file)
            self.lost = 0
        except Exception:      # whatever it is, it must not end a training run, nor show on its screen
            self.lost += 1


class LogLine(logging.Formatter):
    """Time with its zone, host, process, who, level, words; a traceback follows in lines of its own."""

    def __init__(self, who: str) -> None:
        """who: "conductor" or "worker-<rank>"."""
        super().__init__(f"%(asctime)s {socket.gethostname()} %(process)d {who} %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 (logging's own name)
        """As in starts.jsonl, with milliseconds."""
        local = time.localtime(record.created)
        return time.strftime("%Y-%m-%dT%H:%M:%S", local) + f".{int(record.msecs):03}" + time.strftime("%z", local)


def worker_hears(record: logging.LogRecord) -> bool:
    """In a worker all threads but the main one: that is Ray's, or the conductor's where the only worker is in its process."""
    return record.thread != threading.main_thread().ident


def conductor_hears(stage_name: str, *, in_this_process: bool) -> Callable[[logging.LogRecord], bool]:
    """In the conductor all threads but those of other stages; of what is said of no stage in particular each that runs hears.

    in_this_process: the worker is in this process, and what its threads say is in its own file.
    """
    if in_this_process:
        return lambda record: record.thread == threading.main_thread().ident
    return lambda record: record.threadName == FIT + stage_name or not str(record.threadName).startswith(FIT)


def versions() -> str:
    """This process's Python and the libraries that matter, for a log's first lines."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:      # a node that got our code with the job has it, but has not installed it
            found.append(f"{name} without a version")
    return ", ".join([f"Python {platform.python_version()}", *found])
