"""The timetable: starts ticks at their times, each a `vggrow retrain` process of its own, and never two of one pipeline.

APScheduler 3 keeps when each pipeline is next in STORE/retraining/<name>/timetable.sqlite, so that a time that passed while
nobody ran is caught up, once, however many were missed.
"""

import datetime
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deploy.cron import Cron
from deploy.pipeline_file import Pipeline, load_pipeline
from deploy.ticks import Tick, Ticks
from training.store import Store, hold, open_store
from vggcore.errors import RecipeError
from vggcore.whole_file import write_json

logger = logging.getLogger(__name__)

INTERRUPTED = 130        # what `vggrow retrain` exits with after a signal


@dataclass(frozen=True)
class Entry:
    """A pipeline of the timetable."""

    path: Path               # of the pipeline file, absolute
    pipeline: Pipeline
    cron: Cron

    @property
    def ticks(self) -> list[Tick]:
        """Its ticks so far; reading makes no store."""
        return Ticks.of(Store(self.pipeline.run.store), self.pipeline.name).all()

    @property
    def shelf(self) -> Path:
        """timetable.sqlite, and due.json while a tick that we started has not come to its end."""
        return self.pipeline.run.store / "retraining" / self.pipeline.name

    def next_times(self, count: int, after: datetime.datetime) -> list[datetime.datetime]:
        """The next `count` times after a moment, on the clocks of the pipeline's time zone."""
        found: list[datetime.datetime] = []
        moment: datetime.datetime | None = after
        while moment is not None and len(found) < count:
            moment = self.cron.next_after(moment)
            if moment is not None:
                found.append(moment)
        return found

    def to_json(self, count: int, after: datetime.datetime) -> dict[str, Any]:
        """Plain values: what `timetable next` and `timetable list` print."""
        ticks = self.ticks
        return {
            "name": self.pipeline.name,
            "file": str(self.path),
            "cron": self.cron.expression,
            "time_zone": self.cron.time_zone,
            "store": str(self.pipeline.run.store),
            "last": {"tick": ticks[-1].number, "began": ticks[-1].began, "outcome": ticks[-1].outcome} if ticks else None,
            "next": [moment.isoformat() for moment in self.next_times(count, after)],
        }


def load_entries(paths: Sequence[Path]) -> list[Entry]:
    """The pipelines of a timetable. RecipeError for one without [timetable], and for two of one name in one store."""
    entries: list[Entry] = []
    for path in paths:
        pipeline = load_pipeline(path)
        if pipeline.timetable is None:
            example = 'cron = "30 2 * * *" and time_zone = "Europe/Berlin"'
            raise RecipeError(f"{path}: has no [timetable]; add one, such as {example}")
        for other in entries:
            if (other.pipeline.name, other.pipeline.run.store) == (pipeline.name, pipeline.run.store):
                raise RecipeError(
                    f"{path}: name {pipeline.name!r} in the store of {other.path} too; give one of them another name"
                )
        entries.append(Entry(path.absolute(), pipeline, Cron(pipeline.timetable.cron, pipeline.timetable.time_zone)))
    return entries


class Children:
    """The ticks that run now."""

    def __init__(self) -> None:
        """None yet."""
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.Lock()
        self.stopping = False

    def run_tick(self, name: str, path: str) -> int | None:
        """Runs one tick to its end and gives its exit code; None when we are about to stop."""
        with self.lock:
            if self.stopping:
                return None
            # A session of its own: a Ctrl-C on our terminal reaches it once, through us.
            command = [sys.executable, "-m", "deploy", "retrain", path]
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            self.running[path] = child
        logger.info("%s: tick begins (process %d)", name, child.pid)
        code = child.wait()
        with self.lock:
            del self.running[path]
        ended = f"signal {-code}" if code < 0 else f"exit {code}"
        logger.log(logging.INFO if code == 0 else logging.WARNING, "%s: tick ended (%s)", name, ended)
        return code

    def stop(self) -> None:
        """Starts no more ticks, and asks those that run to end where nothing is half done; again: at once."""
        with self.lock:
            self.stopping = True
            for child in self.running.values():
                child.send_signal(signal.SIGTERM)


CHILDREN = Children()      # a module's own: the job store keeps a job as the name of a function, and no more


def start_tick(name: str, path: str, timetable: str, due: str) -> None:
    """What APScheduler calls; `timetable` is what the times were made from.

    due: a file that stays when the tick, or we, are stopped before its end: then it is due again at the next start.
    """
    write_json(Path(due), {"since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    code = CHILDREN.run_tick(name, path)
    if code is not None and code >= 0 and code != INTERRUPTED:
        Path(due).unlink(missing_ok=True)


def make_scheduler(entries: Sequence[Entry]) -> Any:
    """A scheduler, started but paused, that has each entry's next time: the stored one where there is any."""
    from apscheduler.executors.pool import ThreadPoolExecutor
    from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
    from apscheduler.schedulers.background import BackgroundScheduler
    from apscheduler.schedulers.base import STATE_RUNNING

    class Scheduler(BackgroundScheduler):  # type: ignore[misc]
        """Looks at due jobs while it runs and at no other time: 3.11.3 does so once more when it is shut down, paused or
        not, cannot start them any more, and puts them off to their next time as if they had run."""

        def _process_jobs(self) -> float | None:
            return super()._process_jobs() if self.state == STATE_RUNNING else None

    scheduler = Scheduler(
        timezone=datetime.UTC,
        executors={"default": ThreadPoolExecutor(len(entries))},
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
    )
    for entry in entries:
        entry.shelf.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{entry.shelf / 'timetable.sqlite'}"
        scheduler.add_jobstore(SQLAlchemyJobStore(url=url), alias=str(entry.path))
    scheduler.start(paused=True)
    for entry in entries:
        plan(scheduler, entry)
    return scheduler


def plan(scheduler: Any, entry: Entry) -> None:
    """Keeps an entry's stored next time, past or not, unless its timetable has changed; an unfinished tick is due now."""
    name, shelf, due = entry.pipeline.name, str(entry.path), entry.shelf / "due.json"
    kwargs = {"name": name, "path": str(entry.path), "timetable": str(entry.cron), "due": str(due)}
    known = scheduler.get_job(name, jobstore=shelf)
    if known is not None and known.kwargs["timetable"] == kwargs["timetable"]:
        # add_job(replace_existing=True) would reckon the next time from now, and a missed one would be lost.
        scheduler.modify_job(name, jobstore=shelf, kwargs=kwargs)
    else:
        scheduler.add_job(
            start_tick, entry.cron, id=name, name=name, kwargs=kwargs, jobstore=shelf, replace_existing=True
        )
    ticks = entry.ticks
    if due.exists() or (ticks and not ticks[-1].finished):
        scheduler.modify_job(name, jobstore=shelf, next_run_time=datetime.datetime.now(datetime.UTC))


def run_timetable(paths: Sequence[Path], say: Callable[[str], None]) -> None:
    """Runs until SIGINT or SIGTERM, then waits until the ticks that run have stopped cleanly; a second signal hurries them.

    Raises VggrowError before anything starts: for a wrong file, or a pipeline that another timetable already runs.
    """
    entries = load_entries(paths)
    ended = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        ended.set()
        threading.Thread(target=CHILDREN.stop).start()      # it takes a lock that this very thread may hold

    with ExitStack() as held:
        for entry in entries:
            what = f"the timetable of pipeline {entry.pipeline.name!r}"
            held.enter_context(hold(open_store(entry.pipeline.run.store), f"timetable-{entry.pipeline.name}", what=what))
        before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
        scheduler = make_scheduler(entries)
        try:
            for entry in entries:
                job = scheduler.get_job(entry.pipeline.name, jobstore=str(entry.path))
                moment = job.next_run_time.astimezone(entry.cron.zone).isoformat(timespec="seconds")
                say(f"{entry.pipeline.name}: next at {moment}{unfinished(entry)}")
            scheduler.resume()
            ended.wait()
            scheduler.pause()
            if CHILDREN.running:
                say("stopping: waiting for ticks to stop cleanly")
        finally:
            scheduler.shutdown(wait=True)
            for name, handler in before.items():
                signal.signal(name, handler)


def unfinished(entry: Entry) -> str:
    """A word on the tick that is taken up first, where there is one."""
    ticks = entry.ticks
    return f" (tick {ticks[-1].number} is unfinished and is taken up)" if ticks and not ticks[-1].finished else ""


def next_text(found: Sequence[dict[str, Any]]) -> str:
    """Times for a person, a line each."""
    return "\n".join(f"{moment}  {entry['name']}" for entry in found for moment in entry["next"])


def list_text(found: Sequence[dict[str, Any]]) -> str:
    """Pipelines for a person, a block each."""
    blocks = []
    for entry in found:
        last = entry["last"]
        ran = f"tick {last['tick']}, {last['outcome']} ({last['began']})" if last else "none yet"
        blocks.append(
            f"{entry['name']}: {entry['cron']} {entry['time_zone']}\n  file   {entry['file']}\n  store  {entry['store']}\n"
            f"  last   {ran}\n  next   {entry['next'][0] if entry['next'] else 'never'}"
        )
    return "\n".join(blocks)
