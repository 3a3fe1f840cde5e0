"""A tick's end: the gate is asked, what it says is done, and what came of it is told."""

from collections.abc import Mapping
from typing import Any

from deploy.decision_history import history
from deploy.decision_record import PROMOTED as DID_PROMOTE
from deploy.new_classes import promote_command
from deploy.promote import ALREADY, Outcome, promote
from deploy.registry import CHAMPION
from deploy.registry_versions import find_champion
from deploy.tick_work import Work, champion_json
from deploy.ticks import (
    BELOW_FLOOR,
    KEPT,
    NOTHING_NEW,
    PROMOTED,
    REFUSED,
    STOP,
    STOPPED,
    SUPERSEDED,
    UNCHANGED,
    WAITS,
    Tick,
    ticks_name,
)
from vggcore.digest import digest
from vggcore.errors import VggrowError

TOLD = frozenset({PROMOTED, REFUSED, WAITS, STOPPED, BELOW_FLOOR})     # outcomes that the webhook hears of
TOLD_ONCE = frozenset({STOPPED, BELOW_FLOOR, WAITS})                   # and not again while nothing about them changes


def ask_gate(work: Work, tick: Tick) -> Tick:
    """Asks the gate and does what it says; both records. Asked again about the same two versions it is no second use.

    About a version with new classes the gate is asked where [gate] new_classes is "gate"; else a person is.
    """
    registered, decided = tick.records["register"], tick.records["decide"]
    version, before = registered["version"], decided["facts"]["champion"]
    if registered["alias"] == CHAMPION:
        first = before != version
        facts = {"outcome": PROMOTED if first else KEPT, "reason": registered["reason"], "decision": None}
        if not first:
            facts["reason"] = f"version {version} is the champion already"
        tick = work.write(tick, "gate", facts)
        return work.write(tick, "promote", {"promoted": first, "version": version, "previous": None})
    found = promote(
        work.client,
        store=work.store,
        model=f"models:/{registered['model']}/{version}",
        rules=work.rules,
        floor=work.recipe.register_.floor,
        by=ticks_name(work.pipeline.name),
        person=None if work.pipeline.gate.new_classes == "gate" else command(work, registered["model"], version),
    )
    found = recovered(work, found)
    tick = work.write(tick, "gate", {"outcome": gate_outcome(found), "reason": found.reason, "decision": found.decision})
    done = found.action == DID_PROMOTE
    previous = found.champion_before if done else None
    return work.write(tick, "promote", {"promoted": done, "version": version, "previous": previous})


def command(work: Work, model: str, version: str) -> str:
    """What a person types to decide about a version by the pipeline's rules."""
    run = work.pipeline.run
    return promote_command(model, version, store=run.store, tracking=run.tracking, rules=work.rules)


def recovered(work: Work, found: Outcome) -> Outcome:
    """The promotion itself, where it was done by an attempt that was killed before it could record it."""
    if found.action != ALREADY:
        return found
    wanted = (DID_PROMOTE, found.version)
    lines = [line for line in history(work.store, found.model) if (line["action"], line["version"]) == wanted]
    if not lines:
        return found
    line = lines[-1]
    return Outcome(
        DID_PROMOTE, found.model, found.version, found.version, line["champion_before"], line["reason"], line["decision"]
    )


def gate_outcome(found: Outcome) -> str:
    """In the tick's words; what the gate was not asked about (other classes, no gate list, lineage) waits for a person."""
    if found.action == DID_PROMOTE:
        return PROMOTED
    if found.action == ALREADY:
        return KEPT
    if found.champion is None:
        return BELOW_FLOOR
    asked = found.decision is not None and found.decision.get("p_value") is not None
    return REFUSED if asked else WAITS


def tell(work: Work, tick: Tick) -> Tick:
    """Tells the webhook what came of the tick, once, and writes the last record. A receiver that is down holds up nothing."""
    outcome, reason = ending(tick)
    registered = tick.records.get("register", {})
    content = {
        "pipeline": work.pipeline.name,
        "model": work.recipe.name,
        "outcome": outcome,
        "reason": reason,
        "version": registered.get("version"),
        "previous": tick.records.get("promote", {}).get("previous"),
        "test_top1_accuracy": registered.get("test_top1_accuracy"),
        "fingerprint": tick.records["decide"]["facts"]["fingerprint"],
        "new_classes": tick.records["decide"].get("new_classes", False),
    }
    told_before = outcome in TOLD_ONCE and same_as_before(work, tick, content)
    event = digest([work.pipeline.name, tick.number, tick.began], hex_characters=32)
    delivery = None
    if work.pipeline.notify is not None and outcome in TOLD and not told_before:
        body = {"id": event, "tick": tick.number, "at": tick.began, **content}
        work.outbox.put(event, tick.number, body)
        tell_waiting(work)
        delivery = "sent" if (work.outbox.find(event) or {}).get("sent") else "waits"
    champion = champion_json(find_champion(work.client, work.recipe.name))
    facts = {
        "outcome": outcome,
        "reason": reason,
        "content": digest(content, hex_characters=32),
        "event": event if delivery else None,
        "delivery": "told before" if told_before else delivery,
        "champion": champion,
    }
    return work.write(tick, "notify", facts)


def ending(tick: Tick) -> tuple[str, str]:
    """The outcome of a tick whose steps are all done, and the reason in a sentence."""
    decided = tick.records["decide"]
    if decided["verdict"] == STOP:
        return STOPPED, "; ".join(decided["problems"])
    if decided["verdict"] == NOTHING_NEW:
        return UNCHANGED, f"the pictures, the recipe and the gate rules are those of tick {decided['compared_with']}"
    return tick.records["gate"]["outcome"], tick.records["gate"]["reason"]


def same_as_before(work: Work, tick: Tick, content: Mapping[str, Any]) -> bool:
    """Whether the tick before this one ended with the same words about the same things."""
    earlier = [one for one in work.ticks.all() if one.number < tick.number and one.finished]
    return bool(earlier) and earlier[-1].records["notify"].get("content") == digest(dict(content), hex_characters=32)


def tell_waiting(work: Work) -> None:
    """Sends what earlier attempts could not."""
    if work.pipeline.notify is not None and work.secret is not None:
        work.outbox.send_waiting(work.pipeline.notify, work.secret, first_wait_s=work.first_wait_s)


def supersede(work: Work, tick: Tick, reason: str) -> None:
    """Closes a tick whose question is no longer the question."""
    champion = champion_json(find_champion(work.client, work.recipe.name))
    facts = {"outcome": SUPERSEDED, "reason": reason, "content": None, "event": None, "delivery": None, "champion": champion}
    work.ticks.write(tick.number, "notify", work.clock(), facts)


def fail(work: Work, tick: Tick, error: VggrowError) -> None:
    """Notes what ended this attempt, and tells it once; the tick stays unfinished."""
    message = str(error)
    work.ticks.write(tick.number, "problem", work.clock(), {"message": message})
    if work.pipeline.notify is not None:
        event = digest([work.pipeline.name, tick.number, message], hex_characters=32)
        body = {
            "id": event,
            "tick": tick.number,
            "pipeline": work.pipeline.name,
            "model": work.recipe.name,
            "outcome": "failed",
            "reason": message,
        }
        work.outbox.put(event, tick.number, body)
        tell_waiting(work)
