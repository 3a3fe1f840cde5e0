"""What was decided about registered models, as the store has it: STORE/registry/<model>/history.jsonl, a line a decision."""

import json
from pathlib import Path
from typing import Any

from training.store import Store


def registry_folder(store: Store, name: str) -> Path:
    """pending.json, history.jsonl and notifications/ of a registered model."""
    return store.root / "registry" / name


def history(store: Store, name: str) -> list[dict[str, Any]]:
    """What was decided about a registered model, in order; each line with its sequence number from 1."""
    try:
        text = (registry_folder(store, name) / "history.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    # Not splitlines(): a reason may hold other characters that end a line for it, such as U+2028.
    return [json.loads(line) for line in text.split("\n") if line]


def last_decisions(store: Store, name: str, version: str) -> list[dict[str, Any]]:
    """The last decision about a version in its own model, and in each production model it was a candidate for."""
    found = []
    for path in sorted((store.root / "registry").glob("*/history.jsonl")):
        model = path.parent.name
        found += [line for line in history(store, model) if f"{name}/{version}" in concerned(line, model)][-1:]
    return found


def concerned(line: dict[str, Any], model: str) -> set[str]:
    """The versions, NAME/VERSION, that a line of `model`'s history is about."""
    if line["action"] == "refused":
        return {str(line["candidate"])}
    left = {f"{model}/{line['champion_before']}"} if line["action"] == "rolled back" else set()
    return {str(line.get("candidate")), f"{model}/{line['version']}", *left}
