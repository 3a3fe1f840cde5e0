"""Promotion and rollback: the gate's decision is carried out under a lock, recorded where people read, and never half done.

What is about to happen is written to STORE/registry/<model>/pending.json first. Every step after that may be taken twice, so
that a command that was killed at any line is finished by the next one, whichever it is; history.jsonl gets its line last.
"""

import getpass
import json
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from deploy.decision_page import decision_of_json
from deploy.gate import Check, Decision, GateRules, Score, decide, first_decision, listed, same_classes, verdict
from deploy.gate_chart import decision_figure
from deploy.gate_evidence import Lineage, count_use, gate_of, gate_pictures, leaks, score, stage_of, trace, use_number
from deploy.registry import (
    CHALLENGER,
    CHAMPION,
    STAGE_KEY_TAG,
    TOP1_TAG,
    all_versions,
    ensure_model,
    get_model,
    get_version,
    model_lock,
)
from deploy.tracking_address import using_tracking
from pipelines.gate_list import GateList
from training.store import Store, read_json
from vggcore.digest import digest
from vggcore.errors import DatasetError, RegistryError, StoreError
from vggcore.whole_file import write_json, write_text

logger = logging.getLogger(__name__)

PREVIOUS = "previous"
DECISION_TAG = "vggrow.decision"                  # promoted, refused, rolled back
REASON_TAG = "vggrow.decision_reason"
AT_TAG = "vggrow.decided_at"
BY_TAG = "vggrow.decided_by"
ID_TAG = "vggrow.decision_id"
BEFORE_TAG = "vggrow.champion_before"             # MODEL/VERSION that was champion before this one
ROLLED_BACK_TAG = "vggrow.rolled_back"            # when; the gate alone does not promote such a version again
PROMOTED, REFUSED, ROLLED_BACK, ALREADY = "promoted", "refused", "rolled back", "already champion"

TRIES = 10           # a champion that changes while models are scored: scored again, so often at most
LOCK_TRIES = 10      # of a minute each (deploy.registry.model_lock)
REASON_CHARACTERS = 2000


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


@dataclass(frozen=True)
class Contender:
    """A model that is compared: opened, with its stage and where it comes from."""

    model: str
    stage_key: str | None
    opened: Any                          # deploy.predict.Predictor
    lineage: Lineage


@dataclass(frozen=True)
class Evidence:
    """What the gate is asked with; `refusal` where it need not be asked, and then no score."""

    id: str                              # the same facts and rules have the same id: asked again it is no new use
    gate: GateList | None
    challenger: Score | None
    champion: Score | None
    refusal: Decision | None


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
) -> Outcome:
    """Makes a version champion if the gate lets it; recorded either way. Again is harmless.

    model: a registered model's name (its challenger, else its newest version), models:/NAME@ALIAS or models:/NAME/VERSION.
    to: the production model into which the version is copied and whose champion it shall be. floor: what test top-1 must
    reach where there is no champion yet. dry_run: nothing is written, nothing counted. force: the reason for promoting
    by hand, without asking the gate. by: who decides; None: the user of MLflow, else of this machine.
    Raises RegistryError for what is not in the registry, DatasetError for gate pictures that are gone.
    """
    rules = rules or GateRules()
    wanted = find_challenger(client, model)
    target = to or wanted.name
    for _ in range(TRIES):
        champion = find_champion(client, target)
        evidence = None
        if not is_copy(champion, wanted) and force is None:
            evidence = gather(client, store, wanted, champion, rules, floor=floor, keep=not dry_run)
        if dry_run:
            return rehearse(wanted, champion, target, evidence, rules, force)
        with patient_lock(store, target):
            finish_pending(client, store, target)
            wanted = reread(client, wanted)
            now = find_champion(client, target)
            if is_copy(now, wanted):
                return already(now, target)
            if force is None and number(now) != number(champion):
                continue   # it changed while we scored
            return settle(client, store, wanted, now, target, evidence, rules, force, by or whoever())
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
) -> Outcome:
    """Decides and acts, under the lock of `target`, on a champion that is still the one that was scored."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    use = None
    if evidence is not None and evidence.gate is not None and evidence.refusal is None:
        facts = {"challenger": full_name(wanted), "champion": full_name(champion), "at": at, "by": by}
        use = count_use(store, evidence.gate, evidence.id, facts)
    decision = decision_of(wanted, champion, evidence, rules, force, use=use or 1)
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
    if not decision.promote and wanted.tags.get(ID_TAG) == decision_id and wanted.tags.get(DECISION_TAG) == REFUSED:
        return outcome
    versions, version = [[wanted.name, str(wanted.version)]], wanted
    if decision.promote and target != wanted.name:
        version = copied(client, wanted, target)
        versions.append([target, str(version.version)])
    plan = {
        "action": outcome.action,
        "id": decision_id,
        "at": at,
        "by": by,
        "model": target,
        "version": str(version.version),
        "candidate": full_name(wanted),
        "versions": versions,
        "champion_before": number(champion),
        "forced": force is not None,
        "reason": decision.reason,
        "gate_list": evidence.gate.digest if evidence and evidence.gate else None,
        "use": use,
        "rules": asdict(rules),
        # The gate has spoken. What it was not asked about still waits for a person.
        "challenger_is_done": decision.promote or (evidence is not None and evidence.refusal is None),
        "decision": outcome.decision,
    }
    begin(client, store, plan)
    if decision.promote:
        return Outcome(**{**vars(outcome), "model": target, "version": plan["version"], "champion": plan["version"]})
    return outcome


def rollback(
    client: MlflowClient, *, store: Store, name: str, reason: str | None = None, by: str | None = None
) -> Outcome:
    """Puts the version that `previous` names back as champion; the gate alone does not promote the other one again.

    Raises RegistryError where there is no previous champion.
    """
    get_model(client, name)
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
            "version": previous,
            "versions": [[name, champion]] if champion else [],
            "champion_before": champion,
            "reason": words,
            "challenger_is_done": False,
            "decision": None,
        }
        begin(client, store, plan)
        return rolled_back(plan)


def rolled_back(plan: Mapping[str, Any]) -> Outcome:
    """The outcome of a rollback that is done."""
    return Outcome(
        ROLLED_BACK, plan["model"], plan["version"], plan["version"], plan["champion_before"], plan["reason"], None
    )


def compare(client: MlflowClient, *, store: Store, a: str, b: str, rules: GateRules | None = None) -> Decision:
    """What the gate would say of A in the place of B; nothing is recorded or counted.

    a, b: any MODEL. Raises DatasetError for models of other classes or pictures, and where there is no gate list.
    """
    from deploy.predict import check_classes, open_model

    rules = rules or GateRules()
    both = []
    for model in (a, b):
        opened = open_model(model, store=store.root, tracking=str(client.tracking_uri))
        key = opened.description["lineage"].get("stage_key")
        both.append(Contender(model, key, opened, trace(store, key, model=model)))
    new, old = both
    if new.opened.classes != old.opened.classes:
        check_classes(new.opened.classes, old.opened.classes)
    gate, other = gate_of(store, new.lineage), gate_of(store, old.lineage)
    if gate is None:
        raise DatasetError(
            f"{a}: no gate list for the pictures it learnt from; set [data] split.gate and train again, or measure each model"
            " with vggrow evaluate"
        )
    if other is not None and other.home != gate.home:
        raise DatasetError(f"{a} and {b} learnt from other pictures, with another gate list each; nothing to compare them on")
    scores = score_both(store, gate, new, old, keep=True)
    asked = decision_id(gate, new.model, old.model, scores[0], rules)
    return decide(
        *scores,
        rules,
        use=use_number(gate, asked),
        leaks=leaks(gate, [new.lineage, old.lineage]),
        lineage_problems=[*new.lineage.problems, *old.lineage.problems],
    )


def gather(
    client: MlflowClient,
    store: Store,
    wanted: ModelVersion,
    champion: ModelVersion | None,
    rules: GateRules,
    *,
    floor: float,
    keep: bool,
) -> Evidence:
    """Lineage, leaks and scores, or the refusal that makes scores needless: the gate list is then not looked at."""
    new = contender(client, store, wanted)
    if champion is None:
        return first_version(wanted, new, floor)
    old = contender(client, store, champion)
    gate = gate_of(store, new.lineage)
    problems = [*new.lineage.problems, *old.lineage.problems]
    seen = leaks(gate, [new.lineage, old.lineage]) if gate else []
    unknown = sorted(set(gate.classes) - set(new.opened.classes)) if gate else []
    rolled = wanted.tags.get(ROLLED_BACK_TAG)
    was = f"this version was rolled back on {rolled}" if rolled else "this version was never rolled back"
    listed_for = "no gate list for its pictures" if gate is None else f"gate list of {len(gate.contents):,} pictures"
    checks = [
        same_classes(nothing(new), nothing(old)),
        Check("rollback", rolled is None, was, "a person's word (--force --reason)"),
        Check("lineage", not problems, listed("lineage problems", problems), "stage, pictures and code on record"),
        Check("gate", gate is not None, listed_for, "[data] split.gate in the recipe it is trained by"),
        Check("gate classes", not unknown, listed("gate classes unknown to it", unknown), "none; renew the gate list"),
        Check("leaks", not seen, listed("gate pictures seen in training", seen), "none; renew the list or train without"),
    ]
    if gate is None or not all(check.passed for check in checks):
        refusal = Decision(
            False, verdict(checks, ""), tuple(checks), rules.metric, challenger=new.model, champion=old.model
        )
        facts = [new.model, old.model, refusal.reason, gate.digest if gate else None]
        return Evidence(digest(["refused", *facts], hex_characters=32), gate, None, None, refusal)
    scores = score_both(store, gate, new, old, keep=keep)
    return Evidence(decision_id(gate, new.model, old.model, scores[0], rules), gate, *scores, None)


def first_version(wanted: ModelVersion, new: Contender, floor: float) -> Evidence:
    """The evidence where there is no champion: test top-1 against the floor, and a lineage on record."""
    try:
        test_top1 = float(wanted.tags[TOP1_TAG])
    except (KeyError, ValueError) as error:
        raise RegistryError(
            f"{new.model}: no tag {TOP1_TAG}, and no champion to compare it with; vggrow did not register it: promote it by"
            " --force --reason"
        ) from error
    decision = first_decision(test_top1, floor)
    if new.lineage.problems:
        found = listed("lineage problems", new.lineage.problems)
        check = Check("lineage", False, found, "stage, pictures and code on record")
        decision = Decision(False, verdict((check,), ""), (check, *decision.checks), decision.metric)
    named = Decision(**{**vars(decision), "challenger": new.model})
    return Evidence(digest(["first", new.model, named.reason], hex_characters=32), None, None, None, named)


def contender(client: MlflowClient, store: Store, version: ModelVersion) -> Contender:
    """A version opened, with its lineage; what its package says of its stage must be what its tag says."""
    from deploy.predict import open_model

    model = f"models:/{full_name(version)}"
    key = version.tags.get(STAGE_KEY_TAG)
    opened = open_model(model, store=store.root, tracking=str(client.tracking_uri))
    packaged = opened.description["lineage"].get("stage_key")
    lineage = trace(store, key, model=model)
    if packaged != key:
        words = f"{model}: its tag names stage {key}, its package {packaged}"
        lineage = Lineage(lineage.stages, (*lineage.problems, words))
    return Contender(model, key, opened, lineage)


def score_both(
    store: Store, gate: GateList, new: Contender, old: Contender, *, keep: bool
) -> tuple[Score, Score]:
    """Both models' scores by the challenger's protocol and test scales, or the champion's own where its crop forbids them."""
    pictures = gate_pictures(store, gate, new.lineage, new.opened.classes)
    protocol, scales = (new.opened.description["protocol"][name] for name in ("name", "scales"))
    found = []
    for each in (new, old):
        own = scales if min(scales) >= stage_of(each.opened).crop else each.opened.description["protocol"]["scales"]
        found.append(
            score(
                gate,
                pictures,
                model=each.model,
                identity=str(each.stage_key),   # the same key is the same result
                opened=each.opened,
                protocol=protocol,
                scales=own,
                keep=keep,
            )
        )
    return found[0], found[1]


def decision_id(gate: GateList, new: str, old: str, challenger: Score, rules: GateRules) -> str:
    """32 hex characters for a question to the gate: asked again it is the same question, and no other use of the list."""
    protocol = [challenger.protocol, list(challenger.scales)]
    return digest([gate.digest, new, old, protocol, asdict(rules)], hex_characters=32)


def nothing(contender: Contender) -> Score:
    """A Score without pictures: for the question of classes alone."""
    classes = contender.opened.classes
    empty = np.zeros((0, len(classes)), np.float32)
    return Score(contender.model, classes, (), np.zeros(0, np.int64), empty, "", (), 0.0, None)


def decision_of(
    wanted: ModelVersion,
    champion: ModelVersion | None,
    evidence: Evidence | None,
    rules: GateRules,
    force: str | None,
    *,
    use: int,
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
    return decide(evidence.challenger, evidence.champion, rules, use=use)


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
    use = use_number(evidence.gate, evidence.id) if evidence and evidence.gate else 1
    decision = decision_of(wanted, champion, evidence, rules, force, use=use)
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


def begin(client: MlflowClient, store: Store, plan: dict[str, Any]) -> None:
    """Writes down what is to be done, and does it."""
    before = history(store, plan["model"])
    numbered = {"sequence": len(before) + 1, **plan}
    write_json(registry_folder(store, plan["model"]) / "pending.json", numbered)
    finish(client, store, numbered)


def finish_pending(client: MlflowClient, store: Store, name: str) -> dict[str, Any] | None:
    """Finishes what a killed command began; gives its plan, or None where nothing was pending."""
    plan: dict[str, Any] | None = read_json(registry_folder(store, name) / "pending.json")
    if plan is None:
        return None
    logger.warning("models:/%s: finishing what was broken off on %s: %s", name, plan["at"], plan["action"])
    try:
        finish(client, store, plan)
    except RegistryError as error:
        logger.warning("models:/%s: that cannot be finished any more (%s)", name, error)
        return None
    return plan


def finish(client: MlflowClient, store: Store, plan: dict[str, Any]) -> None:
    """Takes every step of a plan, those taken before included; the aliases after the record, the history at the end."""
    name, folder = plan["model"], registry_folder(store, plan["model"])
    current = number(find_champion(client, name))
    if current not in (plan["champion_before"], plan["version"]):
        (folder / "pending.json").unlink(missing_ok=True)
        raise RegistryError(f"models:/{name}@{CHAMPION}: moved to version {current} by others meanwhile")
    try:
        for model, version in plan["versions"]:
            record(client, model, version, plan)
        if plan["action"] == PROMOTED:
            move_champion(client, name, plan["version"], before=plan["champion_before"])
        elif plan["action"] == ROLLED_BACK:
            move_back(client, name, plan["version"])
        if plan["challenger_is_done"]:
            drop_challenger(client, *plan["versions"][0])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        (folder / "pending.json").unlink(missing_ok=True)
        raise RegistryError(f"models:/{name}: a version was deleted meanwhile ({error.message}); start again") from error
    lines = history(store, name)
    if len(lines) < plan["sequence"]:
        kept = {key: value for key, value in plan.items() if key not in ("versions", "challenger_is_done")}
        text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in [*lines, kept])
        write_text(folder / "history.jsonl", text)
    (folder / "pending.json").unlink()


def record(client: MlflowClient, model: str, version: str, plan: Mapping[str, Any]) -> None:
    """Writes a decision where people read it: the run's artifacts, the version's description and tags."""
    found = client.get_model_version(model, version)
    if plan["decision"] is not None:
        log_decision(client, found, plan)
    client.update_model_version(model, version, description=described(found.description, plan))
    tags = {
        DECISION_TAG: plan["action"],
        REASON_TAG: plan["reason"][:REASON_CHARACTERS],
        AT_TAG: plan["at"],
        BY_TAG: plan["by"],
        ID_TAG: plan["id"],
    }
    if plan["action"] == PROMOTED and plan["champion_before"]:
        tags[BEFORE_TAG] = f"{plan['model']}/{plan['champion_before']}"
    if plan["action"] == ROLLED_BACK:
        tags[ROLLED_BACK_TAG] = plan["at"]
    for tag, value in tags.items():
        client.set_model_version_tag(model, version, tag, value)
    if plan["action"] == PROMOTED and ROLLED_BACK_TAG in found.tags:
        client.delete_model_version_tag(model, version, ROLLED_BACK_TAG)   # a person's word has lifted it


def log_decision(client: MlflowClient, version: ModelVersion, plan: Mapping[str, Any]) -> None:
    """decision.json and decision.png on the version's run; a run that is gone is said, and stops nothing."""
    whole = {**plan["decision"], **{name: value for name, value in plan.items() if name != "decision"}}
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / "decision.json", whole)
        (Path(scratch) / "decision.png").write_bytes(decision_figure(decision_of_json(plan["decision"])))
        try:
            for name in ("decision.json", "decision.png"):
                client.log_artifact(version.run_id, str(Path(scratch) / name))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"):
                raise
            logger.warning("models:/%s: its run takes no artifact (%s)", full_name(version), error.message)


def described(before: str | None, plan: Mapping[str, Any]) -> str:
    """A version's description with the decision as its first paragraph, in place of an earlier one; the rest is kept."""
    first = f"**{plan['action']}** on {plan['at']} by {plan['by']}: {plan['reason']}".replace("\n", " ")[:REASON_CHARACTERS]
    own = rf"\*\*({PROMOTED}|{REFUSED}|{ROLLED_BACK})\*\* on \S+ by .*"
    paragraphs = [text for text in (before or "").split("\n\n") if text and not re.fullmatch(own, text)]
    return "\n\n".join([first, *paragraphs])


def move_champion(client: MlflowClient, name: str, version: str, *, before: str | None) -> None:
    """`previous` first, then `champion`: at no moment does an alias name nothing, or the way back get lost."""
    if before is not None and before != version:
        client.set_registered_model_alias(name, PREVIOUS, before)
    client.set_registered_model_alias(name, CHAMPION, version)


def move_back(client: MlflowClient, name: str, version: str) -> None:
    """`champion` first, then `previous` goes, which names the same version by then."""
    client.set_registered_model_alias(name, CHAMPION, version)
    if str(get_model(client, name).aliases.get(PREVIOUS)) == version:
        client.delete_registered_model_alias(name, PREVIOUS)


def drop_challenger(client: MlflowClient, name: str, version: str) -> None:
    """Takes `challenger` from a version about which the gate has spoken; a later one keeps it."""
    if str(get_model(client, name).aliases.get(CHALLENGER)) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


def copied(client: MlflowClient, version: ModelVersion, target: str) -> ModelVersion:
    """The version's copy in model `target`, made unless it is there (copy_model_version makes one at every call)."""
    ensure_model(client, target)
    copies = [found for found in all_versions(client, target) if is_copy(found, version)]
    if copies:
        return min(copies, key=lambda found: int(found.version))
    with using_tracking(client.tracking_uri):
        return client.copy_model_version(f"models:/{full_name(version)}", target)


def is_copy(found: ModelVersion | None, version: ModelVersion) -> bool:
    """Whether `found` is the version itself, or its copy in another model."""
    if found is None:
        return False
    if found.name == version.name:
        return str(found.version) == str(version.version)
    return bool(found.source == f"models:/{full_name(version)}")


def find_challenger(client: MlflowClient, model: str) -> ModelVersion:
    """The version that `model` names; a name alone: its challenger, else its newest version."""
    found = re.fullmatch(r"(?:models:/)?([^/@:]+)(?:@([^/@]+)|/([^/@]+))?", model)
    if found is None:
        raise RegistryError(f"{model}: not a model's address, wanted NAME, models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = found.groups()
    if alias is None and version is None:
        aliases = get_model(client, name).aliases
        if CHALLENGER in aliases:
            alias = CHALLENGER
        else:
            versions = all_versions(client, name)
            if not versions:
                raise RegistryError(f"models:/{name}: has no version; register one with vggrow train")
            return max(versions, key=lambda one: int(one.version))
    return get_version(client, name, version=version, alias=alias)


def find_champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """The champion of model `name`; None where there is none, or no such model yet."""
    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if CHAMPION not in aliases:
        return None
    return client.get_model_version(name, str(aliases[CHAMPION]))


def reread(client: MlflowClient, version: ModelVersion) -> ModelVersion:
    """The version as it is now; RegistryError where it was deleted meanwhile."""
    try:
        return client.get_model_version(version.name, str(version.version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise RegistryError(f"models:/{full_name(version)}: was deleted meanwhile; nothing is promoted") from error


def number(version: ModelVersion | None) -> str | None:
    """A version's number as MLflow's API has it elsewhere."""
    return None if version is None else str(version.version)


def full_name(version: ModelVersion | None) -> str | None:
    """NAME/VERSION."""
    return None if version is None else f"{version.name}/{version.version}"


def whoever() -> str:
    """Who decides: the user of the MLflow server where one is named, else of this machine."""
    named = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if named:
        return named
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):
        return f"uid {os.getuid()}@{socket.gethostname()}"


def registry_folder(store: Store, name: str) -> Path:
    """pending.json and history.jsonl of a registered model."""
    return store.root / "registry" / name


def history(store: Store, name: str) -> list[dict[str, Any]]:
    """What was decided about a registered model, in order; each line with its sequence number from 1."""
    try:
        lines = (registry_folder(store, name) / "history.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


@contextmanager
def patient_lock(store: Store, name: str) -> Iterator[None]:
    """The model's lock, waited for longer than for a registration: many promoters may come at once."""
    with ExitStack() as held:
        for left in reversed(range(LOCK_TRIES)):
            try:
                held.enter_context(model_lock(store.root, name))
                break
            except StoreError:
                if not left:
                    raise
                logger.warning("models:/%s: waiting for another command", name)
        yield


def outcome_text(outcome: Outcome) -> str:
    """An outcome in a line, for the terminal."""
    model = f"models:/{outcome.model}/{outcome.version}"
    would = "would be " if outcome.dry_run else ""
    if outcome.action == ALREADY:
        return f"{model}: already champion"
    if outcome.action == ROLLED_BACK:
        return f"{model}: champion again ({outcome.reason}; version {outcome.champion_before} was)"
    return f"{model}: {would}{outcome.action} ({outcome.reason.removeprefix(outcome.action + ': ')})"
