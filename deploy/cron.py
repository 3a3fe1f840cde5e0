"""A timetable's five cron fields in a time zone, and the moments they stand for; right when clocks change."""

import datetime
import zoneinfo
from typing import Any

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger

from vggcore.recipe import nearest

DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")      # cron counts from Sunday = 0, and 7 is Sunday too
WANTED = "wanted five fields: minute hour day-of-month month day-of-week, such as '30 2 * * *'"


def find_zone(name: str) -> zoneinfo.ZoneInfo:
    """The time zone of an IANA name, such as "Europe/Berlin". Raises ValueError that names the nearest one."""
    known = zoneinfo.available_timezones()
    if name in known:
        return zoneinfo.ZoneInfo(name)
    hint = nearest(name, sorted(known)) if len(known) and "/" in name else "; wanted a name such as 'Europe/Berlin' or 'UTC'"
    raise ValueError(f"no time zone {name!r}{hint if len(hint) < 200 else '; wanted a name such as Europe/Berlin'}")


class Cron(BaseTrigger):  # type: ignore[misc]   # APScheduler 3 has no types
    """When five cron fields come round on the clocks of a time zone.

    A time that the clocks skip in spring comes once, as much later as the clocks are put forward; a time that they show
    twice in autumn comes once, at its first showing, unless the hour is "*": each hour is then an hour. (APScheduler's
    own CronTrigger, 3.11.3, fires a daily 02:30 twice on that day, and counts weekdays from Monday = 0.)
    """

    def __init__(self, expression: str, time_zone: str) -> None:
        """Raises ValueError for fields or a time zone that cannot be."""
        self.expression, self.time_zone = expression, time_zone
        self.zone = find_zone(time_zone)
        fields = expression.split()
        if len(fields) != 5:
            raise ValueError(f"found {expression!r}, {len(fields)} fields; {WANTED}")
        minute, hour, day, month, weekday = fields
        if not day.startswith("*") and not weekday.startswith("*"):
            raise ValueError(
                f"found {expression!r}, a day of the month and a day of the week; cron programs differ on whether both must"
                " hold: set one of them to *"
            )
        self.every_hour = hour == "*"
        try:
            self.inner = CronTrigger(
                minute=minute, hour=hour, day=day, month=month.lower(), day_of_week=weekdays(weekday), timezone=self.zone
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"found {expression!r}, which cron cannot read ({one_line(error)}); {WANTED}") from error
        if self.next_after(datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)) is None:      # a leap year
            raise ValueError(f"found {expression!r}, which never comes: no month has such a day")

    def next_after(self, moment: datetime.datetime) -> datetime.datetime | None:
        """The first time after `moment` (with a time zone), on the zone's own clocks; None: never again."""
        found = self.inner.get_next_fire_time(None, self.just_after(moment))
        while found is not None and found.fold and not self.every_hour:
            found = self.inner.get_next_fire_time(None, self.just_after(found))
        # By way of UTC: 02:30 on the day that has none becomes the 03:30 it stands for.
        return None if found is None else found.astimezone(datetime.UTC).astimezone(self.zone)

    def just_after(self, moment: datetime.datetime) -> datetime.datetime:
        """A microsecond later, added in UTC: sums on a zone's clocks forget which showing of an hour was meant."""
        return (moment.astimezone(datetime.UTC) + datetime.timedelta(microseconds=1)).astimezone(self.zone)

    def get_next_fire_time(self, previous: datetime.datetime | None, now: datetime.datetime) -> datetime.datetime | None:
        """APScheduler asks this: the first time at or after `now` and after `previous`."""
        moment = now.astimezone(datetime.UTC) - datetime.timedelta(microseconds=1)
        return self.next_after(moment if previous is None else max(previous, moment, key=datetime.datetime.timestamp))

    def __getstate__(self) -> dict[str, Any]:
        """What the job store keeps: the words, not what was made of them."""
        return {"expression": self.expression, "time_zone": self.time_zone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Reads the words again."""
        self.__init__(**state)  # type: ignore[misc]

    def __str__(self) -> str:
        return f"{self.expression} {self.time_zone}"


def weekdays(field: str) -> str:
    """Cron's day-of-week field as APScheduler reads it, days by name: "1-5" is mon,tue,wed,thu,fri. ValueError if wrong."""
    if field == "*":
        return field
    numbers: set[int] = set()
    for part in field.lower().split(","):
        span, slash, step = part.partition("/")
        low, dash, high = span.partition("-")
        first = 0 if span == "*" else weekday(low)
        last = weekday(high) if dash else 6 if span == "*" or slash else first
        if last < first:
            last += 7                                                        # sat-mon
        numbers |= {number % 7 for number in range(first, last + 1, int(step) if slash else 1)}
    return ",".join(DAYS[number] for number in sorted(numbers))


def weekday(word: str) -> int:
    """0 (Sunday) to 7 (Sunday again) for a number or a name."""
    if word in DAYS:
        return DAYS.index(word)
    if word.isdecimal() and int(word) <= 7:
        return int(word)
    raise ValueError(f"no day of the week {word!r}")


def one_line(error: Exception) -> str:
    """An exception's text in one line."""
    return " ".join(str(error).split())
