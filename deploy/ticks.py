"""The records of a pipeline's ticks, and what they tell: which tick is unfinished, and whether there is anything new.

    STORE/retraining/<pipeline>/ticks/<n>/{scan,decide,train,evaluate,register,gate,promote,notify}.json

Each record is a whole file, written when its step is done. notify.json is the last: from then on the tick is finished.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.store import Store, read_json
from vggcore.whole_file import write_json

STEPS = ("scan", "decide", "train", "evaluate", "register", "gate", "promote", "notify")
TRAIN, NOTHING_NEW, STOP = "train", "nothing new", "stop"      # what a tick may decide

# How a finished tick ended.
PROMOTED, REFUSED, WAITS = "promoted", "refused", "waits for a person"
UNCHANGED, STOPPED, SUPERSEDED = "nothing new", "stopped", "superseded"
BELOW_FLOOR, KEPT = "no champion", "already champion"


@dataclass(frozen=True)
class Tick:
    """One tick, as far as its records go."""

    number: int
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)      # by step
    problem: dict[str, Any] | None = None                                    # what ended the last attempt, if it failed

    @property
    def finished(self) -> bool:
        """Whether its last record is there."""
        return "notify" in self.records

    @property
    def outcome(self) -> str:
        """How it ended; of an unfinished one, which step is next."""
        if self.finished:
            return str(self.records["notify"]["outcome"])
        return f"unfinished: {next(step for step in STEPS if step not in self.records)}"

    @property
    def reason(self) -> str:
        """Why it ended so, in a sentence; of an unfinished one, what ended the last attempt."""
        if self.finished:
            return str(self.records["notify"]["reason"])
        return str(self.problem["message"]) if self.problem else "the next `vggrow retrain` goes on here"

    @property
    def began(self) -> str:
        """When its first record was written; "" before that."""
        return min((str(record["at"]) for record in self.records.values()), default="")

    @property
    def trained(self) -> bool:
        """Whether a version came of it: from then on its data and recipe are what the next tick is compared with."""
        return self.finished and "register" in self.records

    @property
    def new_classes(self) -> list[dict[str, Any]]:
        """How the version does on test with classes that the champion does not know (deploy.gate_classes.NewClass)."""
        decision = self.records.get("gate", {}).get("decision") or {}
        return list(decision.get("new_classes", ()))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "tick": self.number,
            "began": self.began,
            "finished": self.finished,
            "outcome": self.outcome,
            "reason": self.reason,
            "steps": dict(self.records),
        }


@dataclass(frozen=True)
class Ticks:
    """The ticks of one pipeline."""

    folder: Path

    @classmethod
    def of(cls, store: Store, pipeline: str) -> "Ticks":
        """Those of the pipeline of this name in a store."""
        return cls(store.root / "retraining" / pipeline / "ticks")

    def all(self) -> list[Tick]:
        """Every tick, the oldest first."""
        numbers = sorted(int(path.name) for path in self.folder.glob("[0-9]*")) if self.folder.is_dir() else []
        return [self.read(number) for number in numbers]

    def read(self, number: int) -> Tick:
        """One tick."""
        folder = self.folder / str(number)
        found = {step: read_json(folder / f"{step}.json") for step in STEPS}
        records = {step: record for step, record in found.items() if record is not None}
        return Tick(number, records, read_json(folder / "problem.json"))

    def write(self, number: int, step: str, at: datetime.datetime, facts: Mapping[str, Any]) -> Tick:
        """Writes the record of a step that is done, and gives the tick as it is then."""
        write_json(self.folder / str(number) / f"{step}.json", {"at": iso(at), **facts})
        return self.read(number)


def ticks_name(pipeline: str) -> str:
    """As whom a pipeline's ticks decide, in the registry's records."""
    return f"vggrow retrain {pipeline}"


@dataclass(frozen=True)
class Facts:
    """What may be new: data, recipe (its digest), gate rules, and which version is champion."""

    fingerprint: str
    recipe: str
    rules: Mapping[str, Any]
    champion: str | None


def last_trained(ticks: Sequence[Tick]) -> Tick | None:
    """The newest tick that came to a version."""
    return next((tick for tick in reversed(ticks) if tick.trained), None)


def facts_of(tick: Tick) -> Facts:
    """What a tick that has decided was about."""
    found = tick.records["decide"]["facts"]
    rules = {"new_classes": "person", **found["rules"]}      # records of before that rule had no other
    return Facts(found["fingerprint"], found["recipe"], rules, found["champion"])


def news(
    last: Facts | None, now: Facts, *, age: datetime.timedelta | None, max_age: datetime.timedelta | None
) -> tuple[str, ...]:
    """Why a schedule should be run now, a sentence each; none: there is nothing new. Pure.

    last: of the newest tick that came to a version, `age` old.
    """
    if last is None:
        return ("nothing was trained by this pipeline yet",)
    found = []
    if last.fingerprint != now.fingerprint:
        found.append(f"the pictures changed (fingerprint {last.fingerprint} -> {now.fingerprint})")
    if last.recipe != now.recipe:
        found.append("the recipe changed")
    if dict(last.rules) != dict(now.rules):
        names = [name for name in now.rules if last.rules.get(name) != now.rules[name]]
        changes = ", ".join(f"{name} {last.rules.get(name)} -> {now.rules[name]}" for name in names)
        found.append(f"gate rules changed: {changes}")
    if now.champion is None:
        found.append("there is no champion")
    if age is not None and max_age is not None and age > max_age:
        found.append(f"the last training is {words(age)} old, more than max_age {words(max_age)}")
    return tuple(found)


def renewal(last: Facts | None, now: Facts, last_renewal: int, *, too_old: bool) -> int:
    """How often these pictures and this recipe have been trained again for their age alone: added to the recipe's seed."""
    if last is None or (last.fingerprint, last.recipe) != (now.fingerprint, now.recipe):
        return 0
    return last_renewal + 1 if too_old else last_renewal


def iso(moment: datetime.datetime) -> str:
    """A moment as ISO 8601 in UTC, to the millisecond."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def words(age: datetime.timedelta) -> str:
    """An age in its largest unit."""
    seconds = age.total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def stop_problem(tick: Tick) -> str | None:
    """What stopped a tick, or would stop it, before training; None: nothing did."""
    decided = tick.records.get("decide")
    if decided is None or decided["verdict"] != STOP:
        return None
    stopped = "stopped" if tick.finished else "would stop"
    return f"tick {tick.number} {stopped} before training: {'; '.join(decided['problems'])}"
