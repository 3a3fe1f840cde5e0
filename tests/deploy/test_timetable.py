"""The timetable: times are right when clocks change, a missed one is caught up once, a stop leaves no half tick."""

import datetime
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from deploy.cron import Cron
from deploy.ticks import Ticks
from deploy.timetable import load_entries, make_scheduler
from tests.end_to_end.command import Running, vggrow, wait_until
from training.store import Store
from vggcore.errors import RecipeError

BERLIN = ZoneInfo("Europe/Berlin")
SPRING = datetime.datetime(2027, 3, 27, 12, tzinfo=BERLIN)      # the clocks skip 02:00 to 03:00 on the 28th
AUTUMN = datetime.datetime(2027, 10, 30, 12, tzinfo=BERLIN)     # they show 02:00 to 03:00 twice on the 31st

RECIPE = """
name = "solar"
[data]
root = "pictures"
[[stage]]
name = "A-256"
net = "A"
scale = 256
"""


def times(cron: str, after: datetime.datetime, count: int) -> list[str]:
    """As APScheduler asks for them, the trigger having been in its job store."""
    trigger = pickle.loads(pickle.dumps(Cron(cron, "Europe/Berlin")))
    found: list[str] = []
    previous, now = None, after
    for _ in range(count):
        previous = now = trigger.get_next_fire_time(previous, now)
        found.append(now.strftime("%d. %H:%M %Z"))
    return found


# fmt: off
CLOCKS = [
    # cron            after     times
    ("30 2 * * *",    SPRING,   ["28. 03:30 CEST", "29. 02:30 CEST"]),                       # skipped: an hour later
    ("30 2 * * *",    AUTUMN,   ["31. 02:30 CEST", "01. 02:30 CET"]),                        # twice: once
    ("0 3 * * *",     SPRING,   ["28. 03:00 CEST", "29. 03:00 CEST"]),
    ("0 3 * * *",     AUTUMN,   ["31. 03:00 CET", "01. 03:00 CET"]),
    ("*/30 2 * * *",  AUTUMN,   ["31. 02:00 CEST", "31. 02:30 CEST", "01. 02:00 CET"]),
    ("0 2 * * 0",     SPRING,   ["28. 03:00 CEST", "04. 02:00 CEST"]),                       # Sunday is 0, as in cron
    ("0 12 * * 1-5",  SPRING,   ["29. 12:00 CEST", "30. 12:00 CEST"]),
]
# fmt: on


@pytest.mark.parametrize(("cron", "after", "wanted"), CLOCKS)
def test_a_time_comes_once_on_the_day_the_clocks_change(cron, after, wanted):
    assert times(cron, after, len(wanted)) == wanted


@pytest.mark.parametrize("after", [SPRING, AUTUMN], ids=["spring", "autumn"])
def test_every_hour_is_an_hour_also_when_the_clocks_change(after):
    trigger = Cron("15 * * * *", "Europe/Berlin")
    moments = [trigger.next_after(after)]
    for _ in range(30):
        moments.append(trigger.next_after(moments[-1]))

    stamps = [moment.timestamp() for moment in moments]
    assert {later - earlier for earlier, later in itertools.pairwise(stamps)} == {3600.0}


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline whose pictures are not there, so that its tick stops at the scan within seconds."""
    (tmp_path / "solar.toml").write_text(RECIPE)

    def make(name: str = "weekly", cron: str = "0 0 1 1 *", more: str = "") -> Path:
        path = tmp_path / f"{name}.toml"
        table = f'[timetable]\ncron = "{cron}"\ntime_zone = "Europe/Berlin"\n'
        path.write_text(f'name = "{name}"\nrecipe = "solar.toml"\n[run]\nstore = "store"\n{table}{more}')
        return path

    return make


def outcomes(folder: Path, name: str) -> list[str]:
    return [tick.outcome for tick in Ticks.of(Store(folder / "store"), name).all()]


def missed(path: Path) -> None:
    """The machine was off when the pipeline was due, some weeks long."""
    scheduler = make_scheduler(load_entries([path]))
    (job,) = scheduler.get_jobs()
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=30)
    scheduler.modify_job(job.id, jobstore=str(path), next_run_time=long_ago)
    scheduler.shutdown()


def stored_time(path: Path) -> datetime.datetime:
    scheduler = make_scheduler(load_entries([path]))
    (job,) = scheduler.get_jobs()
    scheduler.shutdown()
    return job.next_run_time


def test_a_missed_time_outlives_a_restart_unless_the_timetable_changed(pipeline):
    path = pipeline(cron="0 3 * * *")
    missed(path)

    kept = stored_time(path)
    pipeline(cron="0 4 * * *")
    changed = stored_time(path)

    now = datetime.datetime.now(datetime.UTC)
    assert kept < now < changed and changed.astimezone(BERLIN).hour == 4


def test_times_missed_while_nobody_ran_are_caught_up_by_one_tick_of_each_pipeline(pipeline, tmp_path):
    weekly, daily = pipeline("weekly", cron="0 3 * * 1"), pipeline("daily", cron="0 3 * * *")
    missed(weekly), missed(daily)
    running = Running("timetable", "run", weekly, daily, log=tmp_path / "log")
    try:
        wait_until(lambda: [outcomes(tmp_path, name) for name in ("weekly", "daily")] == [["stopped"]] * 2,
                   timeout_s=150, running=running)  # fmt: skip
        refused = vggrow("timetable", "run", weekly)
        wait_until(lambda: not list((tmp_path / "store" / "retraining").glob("*/due.json")), timeout_s=60, running=running)
        running.send(signal.SIGTERM)

        code = running.wait(60)
    finally:
        running.kill_everything()

    assert code == 0, running.output()
    assert "no such folder" in running.output()                     # what the ticks themselves said
    assert [outcomes(tmp_path, name) for name in ("weekly", "daily")] == [["stopped"]] * 2
    assert refused.returncode == 2 and "timetable of pipeline 'weekly' is held by process" in refused.stderr
    assert stored_time(weekly) > datetime.datetime.now(datetime.UTC)


def test_a_stop_waits_for_the_tick_and_starts_no_other(pipeline, tmp_path, monkeypatch):
    """The tick is stood in for by a process that takes a second to stop; what a real one does is in test_retrain.py."""
    from deploy.timetable import Children

    slow = tmp_path / "slow.py"
    slow.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), open(sys.argv[1], 'w').close(), sys.exit(130)))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    children, stopped = Children(), tmp_path / "stopped"
    child = subprocess.Popen([sys.executable, slow, stopped], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    children.running["slow"] = child

    children.stop()

    assert child.wait(20) == 130 and stopped.exists()
    assert children.run_tick("weekly", os.fspath(pipeline())) is None


def test_a_tick_that_was_stopped_before_its_first_record_is_due_again_at_the_next_start(pipeline):
    path = pipeline()
    assert stored_time(path).year > 2026                # far away: once a year
    (entry,) = load_entries([path])
    (entry.shelf / "due.json").write_text("{}")

    again = stored_time(path)

    assert again <= datetime.datetime.now(datetime.UTC)


def test_next_and_list_say_when_and_what_and_make_nothing(pipeline, tmp_path):
    path = pipeline(cron="30 2 * * *")

    text = vggrow("timetable", "next", path, "--count", 2)
    listed = vggrow("timetable", "list", path, "--json")

    assert text.returncode == listed.returncode == 0, text.stderr + listed.stderr
    first, second = (line.split("  ")[0] for line in text.stdout.splitlines())
    assert datetime.datetime.fromisoformat(first) < datetime.datetime.fromisoformat(second)
    (entry,) = json.loads(listed.stdout)
    assert entry["name"] == "weekly" and entry["last"] is None
    assert datetime.datetime.fromisoformat(entry["next"][0]).timestamp() > time.time()
    assert not (tmp_path / "store").exists()


def test_a_pipeline_without_a_timetable_and_two_of_one_name_are_named(pipeline, tmp_path):
    path = pipeline()
    copy, bare = tmp_path / "copy.toml", tmp_path / "bare.toml"
    copy.write_text(path.read_text())
    bare.write_text('name = "bare"\nrecipe = "solar.toml"\n')

    with pytest.raises(RecipeError, match=r"copy\.toml: name 'weekly' in the store of .*weekly\.toml too"):
        load_entries([path, copy])
    with pytest.raises(RecipeError, match=r"bare\.toml: has no \[timetable\]"):
        load_entries([bare])
