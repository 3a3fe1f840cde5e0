"""Promotion and rollback: the gate is asked, and its decision carried out under a lock (deploy/decision_record.py does it)."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from deploy.contenders import Evidence, gather, rollback_check
from deploy.decision_history import history
from deploy.decision_record import (
    PREVIOUS,
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    begin,
    finish_pending,
    patient_lock,
)
from deploy.gate import Check, Decision, GateRules, bare, decide
from deploy.gate_evidence import count_use, spent_before, use_number
from deploy.registry import CHAMPION, get_model
from deploy.registry_versions import (
    check_target,
    find_challenger,
    find_champion,
    full_name,
    is_copy,
    number,
    reread,
)
from deploy.rights import check_rights, whoever
from training.store import Store
from vggcore.digest import digest
from vggcore.errors import RegistryError

ALREADY = "already champion"
TRIES = 10   # a champion that changes while models are scored: scored again, so often at most


@dataclass(frozen=True)
class Outcome:
    """What a command did, or with dry_run would do; champion is the version that the alias names afterwards."""

    action: str                          # promoted, refused, rolled back, already champion
    model: str
    version: str                         # of `model`; with --to and a refusal: of the candidate's own model
    champion: str | None
    champion_before: str | None
    reason: str
    decision: dict[str, Any] | None      # Decision.to_json()
    dry_run: bool = False


def promote(
    client: MlflowClient,
    *,
    store: Store,
    model: str,
    rules: GateRules | None = None,
    to: str | None = None,
    floor: float = 0.0,
    dry_run: bool = False,
    force: str | None = None,
    by: str | None = None,
    tell: bool = False,
    person: str | None = None,
) -> Outcome:
    """Makes a version champion if the gate lets it; recorded either way. Again is harmless.

    model: a registered model's name (its challenger, else its newest version), models:/NAME@ALIAS or models:/NAME/VERSION.
    to: the production model into which the version is copied and whose champion it shall be. floor: what test top-1 must
    reach where there is no champion yet. dry_run: nothing is written, nothing counted. force: the reason for promoting
    by hand, without asking the gate. by: who decides; None: the user of MLflow, else of this machine. tell: a message for
    the webhook is put where deploy.registry_webhook.tell_waiting finds it. person: the command by which a person decides
    where the challenger has new classes, which then waits for that; None: the gate is asked about it as about any other.
    Raises RegistryError for what is not in the registry, or not ours to change, DatasetError for gate pictures that are gone.
    """
    rules = rules or GateRules()
    wanted = find_challenger(client, model)
    target = to or wanted.name
    if to is not None:
        check_target(client, to)
    if not dry_run:
        check_rights(client, target)   # before any picture is read, and before a use of the gate list is counted
    for _ in range(TRIES):
        champion, rolled = find_champion(client, target), rollback_check(client, wanted, target)
        evidence = None
        if not is_copy(champion, wanted) and force is None:
            evidence = gather(
                client, store, wanted, champion, rules, rolled=rolled, floor=floor, keep=not dry_run, person=person
            )
        if dry_run:
            return rehearse(wanted, champion, target, evidence, rules, force)
        with patient_lock(store, target, wanted.name):
            finish_pending(client, store, target)
            wanted = reread(client, wanted)
            now = find_champion(client, target)
            if is_copy(now, wanted):
                return already(now, target)
            if force is None and (number(now) != number(champion) or rollback_check(client, wanted, target) != rolled):
                continue   # it changed while we scored; back again to what it was, perhaps
            return settle(client, store, wanted, now, target, evidence, rules, force, by or whoever(), tell=tell)
    raise RegistryError(f"models:/{target}@{CHAMPION}: changed {TRIES} times while models were scored; try again")


def settle(
    client: MlflowClient,
    store: Store,
    wanted: ModelVersion,
    champion: ModelVersion | None,
    target: str,
    evidence: Evidence | None,
    rules: GateRules,
    force: str | None,
    by: str,
    *,
    tell: bool,
) -> Outcome:
    """Decides and acts, under the lock of `target`, on a champion that is still the one that was scored."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    use, spent = None, 0.0
    if evidence is not None and evidence.gate is not None and evidence.refusal is None:
        facts = {"challenger": full_name(wanted), "champion": full_name(champion), "at": at, "by": by}
        use = count_use(store, evidence.gate, evidence.id, facts, alpha=rules.alpha / rules.planned_uses)
        spent = spent_before(evidence.gate, evidence.id)
    decision = decision_of(wanted, champion, evidence, rules, force, use=use or 1, spent=spent)
    outcome = Outcome(
        action=PROMOTED if decision.promote else REFUSED,
        model=wanted.name,
        version=str(wanted.version),
        champion=number(champion),
        champion_before=number(champion),
        reason=decision.reason,
        decision=decision.to_json(),
    )
    decision_id = evidence.id if evidence is not None else digest(["by hand", full_name(wanted), at], hex_characters=32)
    if not decision.promote and said_before(store, target, full_name(wanted), decision_id):
        return outcome
    copies = decision.promote and target != wanted.name
    plan = {
        "action": outcome.action,
        "id": decision_id,
        "at": at,
        "by": by,
        "model": target,
        "version": None if copies else str(wanted.version),
        "candidate": full_name(wanted),
        "versions": [[wanted.name, str(wanted.version)]],
        "champion_before": number(champion),
        "forced": force is not None,
        "reason": decision.reason,
        "gate_list": evidence.gate.digest if evidence and evidence.gate else None,
        "use": use,
        "rules": asdict(rules),
        # The gate has spoken. What it was not asked about still waits for a person.
        "challenger_is_done": decision.promote or (evidence is not None and evidence.refusal is None),
        "tell": tell,
        "decision": outcome.decision,
    }
    done = begin(client, store, plan)
    if decision.promote:
        return Outcome(**{**vars(outcome), "model": target, "version": done["version"], "champion": done["version"]})
    return outcome


def said_before(store: Store, target: str, candidate: str | None, decision_id: str) -> bool:
    """Whether the last thing decided about a candidate is this very refusal: it is not written down again."""
    lines = [line for line in history(store, target) if line.get("candidate") == candidate]
    return bool(lines) and (lines[-1]["action"], lines[-1]["id"]) == (REFUSED, decision_id)


def rollback(
    client: MlflowClient,
    *,
    store: Store,
    name: str,
    reason: str | None = None,
    by: str | None = None,
    tell: bool = False,
) -> Outcome:
    """Puts the version that `previous` names back as champion; the gate alone does not promote the other one again.

    tell: as in promote. Raises RegistryError where there is no previous champion, or the model is not ours to change.
    """
    get_model(client, name)
    check_rights(client, name)
    with patient_lock(store, name):
        finished = finish_pending(client, store, name)
        if finished is not None and finished["action"] == ROLLED_BACK:
            return rolled_back(finished)   # this very command, killed before
        aliases = {alias: str(version) for alias, version in get_model(client, name).aliases.items()}
        champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
        if previous is None or previous == champion:
            held = ", ".join(f"{alias!r} is version {version}" for alias, version in sorted(aliases.items())) or "no alias"
            raise RegistryError(f"models:/{name}@{PREVIOUS}: no previous champion to go back to ({held})")
        words = f"rolled back to version {previous}" + (f": {reason}" if reason else "")
        plan = {
            "action": ROLLED_BACK,
            "id": digest([ROLLED_BACK, name, champion, previous, time.time_ns()], hex_characters=32),
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "by": by or whoever(),
            "model": name,
            "candidate": None,
            "version": previous,
            "versions": [[name, champion]] if champion else [],
            "champion_before": champion,
            "reason": words,
            "challenger_is_done": False,
            "tell": tell,
            "decision": None,
        }
        begin(client, store, plan)
        return rolled_back(plan)


def rolled_back(plan: Mapping[str, Any]) -> Outcome:
    """The outcome of a rollback that is done."""
    return Outcome(
        ROLLED_BACK, plan["model"], plan["version"], plan["version"], plan["champion_before"], plan["reason"], None
    )


def decision_of(
    wanted: ModelVersion,
    champion: ModelVersion | None,
    evidence: Evidence | None,
    rules: GateRules,
    force: str | None,
    *,
    use: int,
    spent: float,
) -> Decision:
    """The gate's decision, or a person's."""
    if evidence is None:
        assert force is not None
        check = Check("by hand", True, force, "a reason")
        return Decision(
            True,
            f"promoted by hand: {force}",
            (check,),
            rules.metric,
            challenger=f"models:/{full_name(wanted)}",
            champion=f"models:/{full_name(champion)}" if champion else None,
        )
    if evidence.refusal is not None:
        return evidence.refusal
    assert evidence.challenger is not None and evidence.champion is not None
    return decide(
        evidence.challenger, evidence.champion, rules, use=use, spent=spent, new_classes=evidence.new_classes
    )


def rehearse(
    wanted: ModelVersion,
    champion: ModelVersion | None,
    target: str,
    evidence: Evidence | None,
    rules: GateRules,
    force: str | None,
) -> Outcome:
    """What promote would do now."""
    if is_copy(champion, wanted):
        return Outcome(**{**vars(already(champion, target)), "dry_run": True})
    use, spent = 1, 0.0
    if evidence is not None and evidence.gate is not None:
        use, spent = use_number(evidence.gate, evidence.id), spent_before(evidence.gate, evidence.id)
    decision = decision_of(wanted, champion, evidence, rules, force, use=use, spent=spent)
    return Outcome(
        action=PROMOTED if decision.promote else REFUSED,
        model=wanted.name,
        version=str(wanted.version),
        champion=number(champion),
        champion_before=number(champion),
        reason=decision.reason,
        decision=decision.to_json(),
        dry_run=True,
    )


def already(champion: ModelVersion | None, target: str) -> Outcome:
    """Nothing to do."""
    holder = number(champion)
    return Outcome(ALREADY, target, str(holder), holder, holder, f"version {holder} is the champion already", None)


def outcome_text(outcome: Outcome) -> str:
    """An outcome in a line, for the terminal."""
    model = f"models:/{outcome.model}/{outcome.version}"
    would = "would be " if outcome.dry_run else ""
    if outcome.action == ALREADY:
        return f"{model}: already champion"
    if outcome.action == ROLLED_BACK:
        return f"{model}: champion again ({outcome.reason}; version {outcome.champion_before} was)"
    return f"{model}: {would}{outcome.action} ({bare(outcome.reason)})"
