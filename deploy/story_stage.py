"""What the story needs around the real commands: a clock that can be set, a webhook's receiver, and a list of what was typed.

Nothing in the product knows of any of it. The clock is the library time-machine, started in every child process by a
sitecustomize.py on its PYTHONPATH: Python's wall clock is moved, and goes on at its own pace; monotonic time is untouched.
"""

import datetime
import hmac
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from deploy.notify import signature

SECRET_NAME, SECRET = "VGGROW_WEBHOOK_SECRET", "a secret of the story"
AHEAD = "VGGROW_STORY_AHEAD_S"           # how far the story's clock is ahead of the machine's, seconds
FRESH_S = 300.0                          # a message whose time stamp is further away is not taken
COMMAND_LIMIT_S = 1800.0                 # what takes longer hangs
SITECUSTOMIZE = f"""\
import os
import time

if "{AHEAD}" in os.environ:
    import time_machine

    time_machine.travel(time.time() + float(os.environ["{AHEAD}"]), tick=True).start()
"""


class Unexpected(Exception):
    """The story did not come out as it is told: which day, what was found, what was wanted."""


class Clock:
    """The story's time, for this process and for those it starts."""

    def __init__(self, folder: Path) -> None:
        """folder: where sitecustomize.py goes; nothing else may lie there."""
        self.folder = folder
        self.ahead_s = 0.0
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")

    def set(self, moment: datetime.datetime) -> None:
        """Sets the clock (a time with its zone); it goes on from there."""
        self.ahead_s = moment.timestamp() - time.time()

    def now_s(self) -> float:
        """Unix time in the story."""
        return time.time() + self.ahead_s

    def environment(self) -> dict[str, str]:
        """The caller's environment on the story's clock, with the webhook's secret and without a store of his own."""
        left_out = {"VGGROW_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"}
        ours = {name: value for name, value in os.environ.items() if name not in left_out}
        path = os.pathsep.join(filter(None, (str(self.folder), ours.get("PYTHONPATH"))))
        return ours | {"PYTHONPATH": path, AHEAD: f"{self.ahead_s:.3f}", SECRET_NAME: SECRET}


@dataclass(frozen=True)
class Message:
    """What a POST to the receiver said; verified: the signature is right and the time stamp fresh."""

    event: str
    verified: bool
    body: dict[str, Any]


class Receiver:
    """A web server on 127.0.0.1 that takes webhook messages and checks them as docs/tutorial/retraining.md asks."""

    def __init__(self, clock: Clock) -> None:
        """Listens on a free port from `with` on."""
        self.messages: list[Message] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                stamp = self.headers.get("X-Vggrow-Timestamp", "")
                right = signature(SECRET.encode(), stamp, body)
                good = hmac.compare_digest(right, self.headers.get("X-Vggrow-Signature", ""))
                fresh = stamp.isdecimal() and abs(clock.now_s() - int(stamp)) < FRESH_S
                event = self.headers.get("X-Vggrow-Event", "")
                outer.messages.append(Message(event, good and fresh, json.loads(body)))
                self.send_response(200 if good and fresh else 403)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/vggrow"

    def __enter__(self) -> "Receiver":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass(frozen=True)
class Typed:
    """A command as it was typed, and what came of it; ended: "exit 0", or the signal that ended it."""

    words: str
    ended: str
    seconds: float                       # on the machine's clock
    output: str


@dataclass
class Day:
    """A day of the story, as it is shown; times are the story's, on the clocks of its zone."""

    number: int
    title: str
    when: str
    happened: list[str]
    expected: str
    typed: list[Typed] = field(default_factory=list)
    ticks: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    outcome: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Desk:
    """Where commands are typed: a folder, the clock, and who hears of each."""

    folder: Path
    clock: Clock
    say: Callable[[str], None]

    def type(self, day: Day, *words: str, wanted: int = 0) -> Typed:
        """Runs `vggrow ...` to its end. Raises Unexpected for another exit code than the wanted one."""
        typed = shlex.join(["vggrow", *words])
        self.say(f"\n  $ {typed}")
        began = time.monotonic()
        try:
            done = subprocess.run(
                command(words), cwd=self.folder, env=self.clock.environment(), capture_output=True, text=True,
                stdin=subprocess.DEVNULL, timeout=COMMAND_LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Unexpected(f"day {day.number}: `{typed}` takes longer than {COMMAND_LIMIT_S:.0f} s") from error
        output = done.stdout.strip() if done.returncode == 0 else f"{done.stdout}{done.stderr}".strip()
        found = Typed(typed, f"exit {done.returncode}", time.monotonic() - began, output)
        self.record(day, found)
        if done.returncode != wanted:
            raise Unexpected(f"day {day.number}: `{typed}` gave exit {done.returncode}, wanted {wanted}:\n{done.stderr}")
        return found

    def record(self, day: Day, found: Typed) -> None:
        """Keeps and shows what came of a command, less the decoder's own complaints; paths count from here."""
        lines = [line for line in found.output.splitlines() if "[png_parser]" not in line]     # nvImageCodec, a line a file
        found = replace(found, output="\n".join(lines).replace(f"{self.folder}/", ""))
        day.typed.append(found)
        for line in found.output.splitlines():
            self.say(f"    {line}")
        self.say(f"    [{found.ended}, {found.seconds:.0f} s]")


class Standing:
    """`vggrow timetable run`, which stays until a signal ends it; its log is a file."""

    def __init__(self, desk: Desk, day: Day, *words: str) -> None:
        """Starts it, in a session of its own."""
        self.desk, self.day = desk, day
        self.typed = shlex.join(["vggrow", *words])
        self.log = desk.folder / f"timetable-{day.number}-{len(day.typed)}.log"
        desk.say(f"\n  $ {self.typed}")
        self.began = time.monotonic()
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command(words), cwd=desk.folder, env=desk.clock.environment(), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_until(self, condition: Callable[[str], bool], what: str) -> None:
        """Waits for a condition on the log; Unexpected when the process ends first, or when it takes too long."""
        deadline = time.monotonic() + COMMAND_LIMIT_S
        while not condition(self.output()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise Unexpected(f"day {self.day.number}: `{self.typed}` did not come to {what}:\n{self.output()}")
            time.sleep(0.1)

    def output(self) -> str:
        """The log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace").strip()

    def end(self, number: signal.Signals, *, wanted: int) -> None:
        """Sends a signal and waits for the end; Unexpected for another exit code than the wanted one."""
        self.process.send_signal(number)
        code = self.process.wait(COMMAND_LIMIT_S)
        ended = f"ended by {number.name}, exit {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        self.desk.record(self.day, Typed(self.typed, ended, time.monotonic() - self.began, quiet(self.output())))
        if code != wanted:
            raise Unexpected(f"day {self.day.number}: `{self.typed}` gave exit {code}, wanted {wanted}:\n{self.output()}")

    def __enter__(self) -> "Standing":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def command(words: Sequence[str]) -> list[str]:
    """`vggrow ...` by this very interpreter."""
    return [sys.executable, "-m", "deploy", *words]


def quiet(output: str) -> str:
    """A log without its lines of training progress."""
    shown = ("next at", "tick ", "new: ", "note: ", "worse: ", "version ", "stopping")
    return "\n".join(line for line in output.splitlines() if any(words in line for words in shown))
