"""What a store's schedules are doing now, read from its files alone: no lock is taken for longer than it takes to look."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from training.history import parse_rows, read_history
from training.stage_log import logs_folder
from training.store import Store, holder, lock_file_held, read_json

RUNNING, FINISHED, STOPPED, TO_DO, FAILED = "running", "finished", "stopped", "to do", "failed"


@dataclass(frozen=True)
class StageStatus:
    """Where a stage stands; figures are None before there are any. Accuracies 0..1."""

    name: str
    key: str
    state: str                       # running, finished, stopped, failed, to do
    by: str | None                   # who trains it: process and host
    epoch: int                       # whole epochs done
    max_epochs: int | None           # None: not begun yet
    iteration: int
    train_loss: float | None
    val_top1_accuracy: float | None
    learning_rate: float | None
    images_per_second: float | None  # of the last whole epoch, validation included
    seconds_since_news: float | None
    workers: int | None
    problem: str | None              # what ended the last attempt, if it failed
    logs: str | None                 # the folder of its log files, unless it has finished


@dataclass(frozen=True)
class ScheduleStatus:
    """A schedule of the store with its stages, in their order."""

    recipe: str
    key: str
    running: bool
    stages: tuple[StageStatus, ...]
    registered: str | None           # models:/..., once it is


def store_status(store: Store) -> list[ScheduleStatus]:
    """Every schedule of the store, the one with the latest news last."""
    found = []
    for path in (store.root / "schedules").glob("*/stages.json"):
        record = read_json(path)
        stages = tuple(stage_status(store, entry) for entry in record["stages"])
        latest = max((news_at(store, entry["key"]) or path.stat().st_mtime for entry in record["stages"]), default=0.0)
        registered = (record.get("registered") or {}).get("uri")
        running = is_held(store, f"schedule-{record['key']}")
        found.append((latest, ScheduleStatus(record["name"], record["key"], running, stages, registered)))
    return [status for _, status in sorted(found, key=lambda pair: pair[0])]


def stage_status(store: Store, entry: dict[str, Any]) -> StageStatus:
    """One stage, by its entry in stages.json."""
    key, folder, lock = entry["key"], store.stage(entry["key"]), f"stage-{entry['key']}"
    about, result = read_json(folder / "stage.json"), read_json(folder / "result.json")
    rows = read_history(folder / "history.jsonl")
    epochs = [row for row in rows if "epoch" in row]
    error = read_json(folder / "error.json")
    held = result is None and is_held(store, lock)
    state = FINISHED if result is not None else RUNNING if held else FAILED if error else STOPPED if rows else TO_DO
    last = epochs[-1] if epochs else {}
    seconds = last.get("seconds", 0.0) - (epochs[-2]["seconds"] if len(epochs) > 1 else 0.0)
    logistic = about is not None and about["stage"].get("fit") == "logistic"      # it has penalties, no epochs
    starts = read_starts(folder / "starts.jsonl")
    at = news_at(store, key)
    speed = None
    if about and seconds > 0:
        iterations = last["iteration"] - (epochs[-2]["iteration"] if len(epochs) > 1 else 0)
        speed = iterations * about["stage"]["global_batch"] / seconds
    return StageStatus(
        name=entry["name"],
        key=key,
        state=state,
        by=holder(store, lock) if held else None,
        epoch=last.get("epoch", 0),
        max_epochs=about["stage"]["max_epochs"] if about and not logistic else None,
        iteration=rows[-1]["iteration"] if rows else 0,
        train_loss=rows[-1].get("train_loss") if rows else None,
        val_top1_accuracy=(result or {}).get("val_top1_accuracy") if logistic else last.get("val_top1_accuracy"),
        learning_rate=last.get("learning_rate"),
        images_per_second=speed,
        seconds_since_news=None if at is None else max(0.0, time.time() - at),
        workers=starts[-1]["world_size"] if starts else None,
        problem=error["message"] if error and state == FAILED else None,
        logs=str(logs_folder(folder)) if state in (RUNNING, STOPPED, FAILED) and logs_folder(folder).is_dir() else None,
    )


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts of a stage's workers, oldest first."""
    return parse_rows(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []


def news_at(store: Store, key: str) -> float | None:
    """When the stage's history was last written, seconds since 1970."""
    try:
        return (store.stage(key) / "history.jsonl").stat().st_mtime
    except FileNotFoundError:
        return None


def is_held(store: Store, lock: str) -> bool:
    """Whether a command holds a lock of the store now; one that nobody ever took has no file, and none is made."""
    path = store.locks / f"{lock}.lock"
    if not path.exists():
        return False
    try:
        with lock_file_held(path, 0):
            return False
    except Timeout:
        return True


def status_json(found: Sequence[ScheduleStatus]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(one) for one in found]


def status_text(found: Sequence[ScheduleStatus]) -> str:
    """For a person: a block a schedule, a line a stage."""
    if not found:
        return "no schedule has begun here; start one with vggrow train"
    blocks = []
    for one in found:
        rows = [("stage", "state", "epoch", "loss", "val top-1", "lr", "images/s", "workers", "news")]
        for stage in one.stages:
            rows.append(
                (
                    stage.name,
                    stage.state,
                    f"{stage.epoch}/{stage.max_epochs}" if stage.max_epochs else "-",
                    shown(stage.train_loss, "{:.4f}"),
                    shown(stage.val_top1_accuracy, "{:.4f}"),
                    shown(stage.learning_rate, "{:g}"),
                    shown(stage.images_per_second, "{:,.0f}"),
                    shown(stage.workers, "{}"),
                    f"{ago(stage.seconds_since_news)} ago" if stage.seconds_since_news is not None else "-",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"  {stage.name}: {stage.problem}" for stage in one.stages if stage.problem]
        lines += [f"  {stage.name}: trained by {stage.by}" for stage in one.stages if stage.by]
        lines += [f"  {stage.name}: logs in {stage.logs}" for stage in one.stages if stage.logs]
        what = "running" if one.running else "registered as " + one.registered if one.registered else "not running"
        blocks.append("\n".join([f"{one.recipe} ({one.key}): {what}", *lines]))
    return "\n\n".join(blocks)


def shown(value: float | int | None, pattern: str) -> str:
    """A value, or a dash."""
    return "-" if value is None else pattern.format(value)


def ago(seconds: float) -> str:
    """A span in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
