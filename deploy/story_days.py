"""The seven days: what happens in the world, what is typed, and what must come of it; the first that differs ends the story."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from signal import SIGKILL, SIGTERM
from zoneinfo import ZoneInfo

from deploy.story_pictures import Cell, correct_labels, deliver, deliver_broken
from deploy.story_stage import Day, Desk, Receiver, Standing, Unexpected
from deploy.ticks import PROMOTED, REFUSED, STOPPED, UNCHANGED, Tick, Ticks
from training.store import Store

ZONE = ZoneInfo("Europe/Berlin")
MONDAY = datetime.date(2026, 3, 2)
PIPELINE, NAME, MODEL, STORE = "pipeline.toml", "week", "cells", "vggrow-store"


class Story:
    """The week so far: its folder, its days, and what is on the desk."""

    def __init__(self, desk: Desk, receiver: Receiver) -> None:
        """desk.folder: the story's folder, with nothing in it but the clock."""
        self.desk, self.receiver = desk, receiver
        self.pictures = desk.folder / "pictures"
        self.store = desk.folder / STORE
        self.days: list[Day] = []

    @property
    def ticks(self) -> list[Tick]:
        """The pipeline's ticks, as they stand in the store."""
        return Ticks.of(Store(self.store), NAME).all()

    def begin(self, title: str, moment: datetime.datetime, happened: Sequence[str], expected: str) -> Day:
        """The next day begins: the clock is set, and the day is announced."""
        day = Day(len(self.days) + 1, title, moment.isoformat(timespec="minutes"), list(happened), expected)
        self.days.append(day)
        self.desk.clock.set(moment)
        self.desk.say(f"\nDay {day.number}, {moment:%A %d %B %Y, %H:%M}: {title}")
        for words in happened:
            self.desk.say(f"  {words}")
        return day

    def retrain(self, day: Day, outcomes: Sequence[str], *, wanted: int = 0) -> Tick:
        """`vggrow retrain`, and the tick that came of it."""
        before = len(self.ticks)
        self.desk.type(day, "retrain", PIPELINE, wanted=wanted)
        return self.one_more(day, before, outcomes)

    def one_more(self, day: Day, before: int, outcomes: Sequence[str]) -> Tick:
        """The one tick that there is more than before, on the story's date, with an outcome that the story tells."""
        ticks = self.ticks
        check(day, "ticks", len(ticks) - before, [1])
        tick = ticks[-1]
        began = datetime.datetime.fromisoformat(tick.began).timestamp()
        check(day, "a tick on the story's clock", 0 <= self.desk.clock.now_s() - began < 3600, [True])
        check(day, f"outcome of tick {tick.number} ({tick.reason})", tick.outcome, outcomes)
        day.ticks.append(tick.number)
        day.outcome = tick.outcome
        return tick

    def hear(self, day: Day, outcomes: Sequence[str]) -> None:
        """What the webhook was told since the last time; Unexpected for other outcomes, or a wrong signature."""
        told = sum(len(one.messages) for one in self.days)
        day.messages = self.receiver.messages[told:]
        for message in day.messages:
            signed = "signature right" if message.verified else "SIGNATURE WRONG"
            self.desk.say(f"  webhook: {message.body['outcome']} ({signed})")
        check(day, "messages", [message.body["outcome"] for message in day.messages], [list(outcomes)])
        check(day, "signatures", all(message.verified for message in day.messages), [True])


def check(day: Day, what: str, found: object, wanted: Sequence[object]) -> None:
    """Unexpected unless what was found is one of those wanted."""
    if found not in wanted:
        words = " or ".join(map(repr, wanted))
        raise Unexpected(f"day {day.number} ({day.title}): {what}: found {found!r}, wanted {words}")


def at(weekday: int, hour: int, minute: int = 0) -> datetime.datetime:
    """A time of the story's week; 0 is Monday."""
    return datetime.datetime.combine(MONDAY + datetime.timedelta(weekday), datetime.time(hour, minute), ZONE)


def monday(story: Story, first: Sequence[Cell]) -> None:
    """Day 1."""
    deliver(first, story.pictures)
    learnt = sum(cell.split == "train" for cell in first)
    gate = sum(cell.split == "gate" for cell in first)
    day = story.begin(
        "the first champion",
        at(0, 9),
        [
            f"The folder is new: {learnt} labelled cells to learn from, and {gate} more that were checked with care and set"
            " aside in gate/. They will decide about every later model, and no model ever learns from them.",
        ],
        "There is no champion, so the first model above the recipe's floor becomes it. From so few cells it learns little more"
        " than that most are functional: it will be easy to beat, if the gate can see it.",
    )
    tick = story.retrain(day, [PROMOTED])
    check(day, "version", tick.records["register"]["version"], ["1"])
    story.hear(day, [PROMOTED])


def tuesday(story: Story) -> None:
    """Day 2."""
    day = story.begin(
        "nothing new",
        at(1, 9),
        ["Nobody has delivered anything."],
        "Same pictures, same recipe, same rules: nothing is trained and nobody is told.",
    )
    story.retrain(day, [UNCHANGED])
    story.hear(day, [])


def wednesday(story: Story, second: Sequence[Cell]) -> None:
    """Day 3."""
    deliver(second, story.pictures)
    learnt = sum(cell.split == "train" for cell in second)
    day = story.begin(
        "more pictures, a better model",
        at(2, 9),
        [f"A large delivery: {len(second):,} labelled cells, {learnt:,} of them to learn from."],
        "A new model learns from all of them. On the gate pictures it must be better than the champion, beyond chance.",
    )
    tick = story.retrain(day, [PROMOTED])
    check(day, "champion", tick.records["notify"]["champion"]["version"], ["2"])
    story.hear(day, [PROMOTED])


def thursday(story: Story, third: Sequence[Cell]) -> None:
    """Day 4."""
    deliver(third, story.pictures, swapped=True)
    day = story.begin(
        "wrong labels",
        at(3, 9),
        [
            f"Another delivery, {len(third):,} cells. Somebody has swapped the two columns of its label sheet: every defective"
            " cell is called functional, and every functional one defective. No file is broken; no scan can see it.",
        ],
        "The new model learns from wrong labels. Val and test have some too, so that test is no judge; the gate's pictures were"
        " set aside on Monday and have none.",
    )
    tick = story.retrain(day, [REFUSED])
    check(day, "champion", tick.records["notify"]["champion"]["version"], ["2"])
    story.hear(day, [REFUSED])


def friday(story: Story, fourth: Sequence[Cell]) -> None:
    """Day 5."""
    broken = deliver_broken(fourth, story.pictures)
    day = story.begin(
        "a broken delivery",
        at(4, 9),
        [
            f"{len(fourth):,} cells come over a bad line: {broken['cut off']} files are cut off in the middle, and"
            f" {broken['web pages']} are not pictures at all but a proxy's error page, saved as .png.",
        ],
        "Too many bad files: the tick stops at the scan, before any training, and says so (exit 2).",
    )
    tick = story.retrain(day, [STOPPED], wanted=2)
    check(day, "steps of the tick", sorted(tick.records), [["decide", "notify", "scan"]])
    story.hear(day, [STOPPED])


def weekend(story: Story, third: Sequence[Cell], fourth: Sequence[Cell]) -> None:
    """Day 6: Friday's evening to Sunday's morning."""
    correct_labels(third, story.pictures)
    deliver(fourth, story.pictures)
    day = story.begin(
        "the machine was off",
        at(4, 20),
        [
            "On Friday afternoon Thursday's labels are put right, and the broken delivery is sent again, whole.",
            "At 20:00 the timetable is started, to look every night at 02:30. A minute later the power goes. It comes back on"
            " Sunday at 09:00: two nights were missed.",
        ],
        "Started again, the timetable catches up: once, not twice. Then SIGTERM ends it cleanly.",
    )
    before = len(story.ticks)
    with Standing(story.desk, day, "timetable", "run", PIPELINE) as timetable:
        timetable.wait_until(lambda log: "next at 2026-03-07T02:30" in log, "the next time, Saturday 02:30")
        timetable.end(SIGKILL, wanted=-SIGKILL)
    check(day, "ticks before the power went", len(story.ticks), [before])

    story.desk.clock.set(at(6, 9))
    story.desk.say("\n  (Sunday, 09:00: the power is back)")
    due = story.store / "retraining" / NAME / "due.json"
    with Standing(story.desk, day, "timetable", "run", PIPELINE) as timetable:
        timetable.wait_until(
            lambda _: len(story.ticks) > before and story.ticks[-1].finished and not due.exists(), "the end of a tick"
        )
        timetable.end(SIGTERM, wanted=0)
    tick = story.one_more(day, before, [PROMOTED, REFUSED])
    story.hear(day, [tick.outcome])
    story.desk.type(day, "timetable", "list", PIPELINE)


def sunday(story: Story) -> None:
    """Day 7."""
    champion = story.ticks[-1].records["notify"]["champion"]["version"]
    previous = champion_before(story.store, champion)
    day = story.begin(
        "rollback",
        at(6, 15),
        [
            f"The people at the line do not like version {champion}: it calls too many cells of a new module type defective."
            " No number here says so. A person decides.",
        ],
        f"`rollback` makes version {previous} champion again, at a price that the drawing above shows. The next tick leaves"
        f" it so, and version {champion} returns by a person's word alone.",
    )
    story.desk.type(day, "models", "rollback", MODEL, "--reason", "false alarms on the new module type")
    tick = story.retrain(day, [UNCHANGED])
    check(day, "champion", tick.records["notify"]["champion"]["version"], [previous])
    day.outcome = "rolled back"
    story.hear(day, [])
    story.desk.type(day, "history", PIPELINE, "--out", "history.html")


def champion_before(store: Path, version: str) -> str:
    """Which version was champion before this one was promoted."""
    lines = (store / "registry" / MODEL / "history.jsonl").read_text(encoding="utf-8").splitlines()
    found = [line for line in map(json.loads, lines) if line["action"] == "promoted" and line["version"] == version]
    return str(found[-1]["champion_before"])
