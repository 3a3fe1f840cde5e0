"""What the webhook hears of promotions, refusals and rollbacks by hand: once each, and later where it could not be told.

A message is a file of STORE/registry/<model>/notifications before the decision is done with (deploy/notify.py says how it
is sent). A receiver that is down undoes nothing: the next promotion or rollback of the model tells what waits.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import Timeout

from deploy.notify import FIRST_WAIT_S, Outbox
from deploy.pipeline_file import Notify
from training.store import Store, lock_file_held
from vggcore.digest import digest

logger = logging.getLogger(__name__)

SENDING_S = 120.0   # how long one command waits for another that is sending: four attempts take about a minute at most


def outbox(folder: Path) -> Outbox:
    """What was told, or has yet to be; folder: STORE/registry/<model>."""
    return Outbox(folder / "notifications")


def put_message(folder: Path, plan: Mapping[str, Any]) -> None:
    """Notes what is to be told of a decision that is carried out; again is harmless."""
    event = digest([plan["model"], plan["sequence"], plan["id"]], hex_characters=32)
    decision = plan["decision"] or {}
    body = {
        "id": event,
        "model": plan["model"],
        "outcome": plan["action"],
        "version": plan["version"],
        "candidate": plan.get("candidate"),
        "champion_before": plan["champion_before"],
        "reason": plan["reason"],
        "forced": plan.get("forced", False),
        "by": plan["by"],
        "at": plan["at"],
        "p_value": decision.get("p_value"),
        "gain": decision.get("gain"),
    }
    outbox(folder).put(event, plan["sequence"], body)


def tell_waiting(
    store: Store, name: str, notify: Notify, secret: bytes, *, first_wait_s: float = FIRST_WAIT_S
) -> list[dict[str, Any]]:
    """Sends what waits about model `name`, one command at a time; gives what waits still."""
    waiting = outbox(store.root / "registry" / name)
    if not waiting.waiting():
        return []
    store.locks.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file_held(store.locks / f"webhook-{name}.lock", SENDING_S):
            return waiting.send_waiting(notify, secret, first_wait_s=first_wait_s)
    except Timeout:
        logger.warning("models:/%s: another command is telling the webhook; what is left is told the next time", name)
        return waiting.waiting()
