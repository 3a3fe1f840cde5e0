"""A decision carried out and recorded where people read it, never half done: the plan, its steps, the history.

What is about to happen is written to STORE/registry/<model>/pending.json first. Every step after that may be taken twice, so
that a command that was killed at any line is finished by the next one, whichever it is; history.jsonl gets its line last.
"""

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from deploy.decision_history import history, registry_folder
from deploy.decision_page import decision_of_json
from deploy.gate_chart import decision_figure
from deploy.registry import CHALLENGER, CHAMPION, DECISION_ID_TAG, get_model, model_lock
from deploy.registry_versions import copied, find_champion, find_copy, full_name, number
from deploy.registry_webhook import put_message
from deploy.rights import DENIED, GONE, no_right
from training.store import Store, read_json
from vggcore.errors import RegistryError, StoreError
from vggcore.whole_file import write_json, write_text

logger = logging.getLogger(__name__)

PREVIOUS = "previous"
DECISION_TAG = "vggrow.decision"                  # promoted, refused, rolled back
REASON_TAG = "vggrow.decision_reason"
AT_TAG = "vggrow.decided_at"
BY_TAG = "vggrow.decided_by"
BEFORE_TAG = "vggrow.champion_before"             # MODEL/VERSION that was champion before this one
ROLLED_BACK_TAG = "vggrow.rolled_back"            # when; the gate alone does not promote such a version again
PROMOTED, REFUSED, ROLLED_BACK = "promoted", "refused", "rolled back"

LOCK_TRIES = 10      # of a minute each (deploy.registry.model_lock)
REASON_CHARACTERS = 2000
NOT_KEPT = ("versions", "challenger_is_done", "tell")   # what of a plan the history does not need


def begin(client: MlflowClient, store: Store, plan: dict[str, Any]) -> dict[str, Any]:
    """Writes down what is to be done, does it, and gives the plan with what became known on the way.

    A plan has: action, id, at, by, model (whose champion it is about), candidate (NAME/VERSION, None for a rollback), version
    (of `model`; None: the candidate is to be copied there first; a refused candidate's own), versions ([model, version] that
    are marked), champion_before, reason, decision (Decision.to_json() or None), challenger_is_done, tell (the webhook).
    """
    before = history(store, plan["model"])
    numbered = {"sequence": len(before) + 1, **plan}
    write_json(registry_folder(store, plan["model"]) / "pending.json", numbered)
    return finish(client, store, numbered)


def finish_pending(client: MlflowClient, store: Store, name: str) -> dict[str, Any] | None:
    """Finishes what a killed command began; gives its plan, or None where nothing was pending."""
    plan: dict[str, Any] | None = read_json(registry_folder(store, name) / "pending.json")
    if plan is None:
        return None
    logger.warning("models:/%s: finishing what was broken off on %s: %s", name, plan["at"], plan["action"])
    try:
        return finish(client, store, plan)
    except RegistryError as error:
        logger.warning("models:/%s: that cannot be finished any more (%s)", name, error)
        return None


def finish(client: MlflowClient, store: Store, plan: dict[str, Any]) -> dict[str, Any]:
    """Takes every step of a plan, those taken before included; the aliases after the record, the history at the end.

    Raises RegistryError where it cannot be done any more, or not by us; then nothing is pending.
    """
    name, folder = plan["model"], registry_folder(store, plan["model"])
    try:
        plan = with_copy(client, plan)
        for model, version in plan["versions"]:
            record(client, model, version, plan)
        if plan["action"] == PROMOTED:
            move_champion(client, name, plan["version"], before=plan["champion_before"])
        elif plan["action"] == ROLLED_BACK:
            move_back(client, name, plan["version"])
        if plan["challenger_is_done"]:
            drop_challenger(client, *plan["versions"][0], own=name)
    except RegistryError:
        (folder / "pending.json").unlink(missing_ok=True)
        raise
    except MlflowException as error:
        if error.error_code not in (GONE, DENIED):
            raise
        (folder / "pending.json").unlink(missing_ok=True)
        if error.error_code == DENIED:
            raise no_right(name, "change", "EDIT") from error
        raise RegistryError(f"models:/{name}: a version was deleted meanwhile ({error.message}); start again") from error
    if plan["tell"]:
        put_message(folder, plan)
    lines = history(store, name)
    if len(lines) < plan["sequence"]:
        kept = {key: value for key, value in plan.items() if key not in NOT_KEPT}
        text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in [*lines, kept])
        write_text(folder / "history.jsonl", text)
    (folder / "pending.json").unlink()
    return plan


def with_copy(client: MlflowClient, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with the version that becomes champion, copied from its own model where it must be.

    Raises RegistryError where the champion is by now neither the one before nor the one to come.
    """
    if plan["action"] == REFUSED:
        return plan
    name, version, candidate = plan["model"], plan["version"], None
    if version is None:
        candidate = client.get_model_version(*plan["versions"][0])
        version = number(find_copy(client, candidate, name))
    current = number(find_champion(client, name))
    if current != plan["champion_before"] and (current is None or current != version):
        now = "there is none any more" if current is None else f"it is version {current}"
        raise RegistryError(f"models:/{name}@{CHAMPION}: moved by others meanwhile ({now}); start again")
    if candidate is None:
        return plan
    copy = str(copied(client, candidate, name).version)
    return {**plan, "version": copy, "versions": [*plan["versions"], [name, copy]]}


def record(client: MlflowClient, model: str, version: str, plan: Mapping[str, Any]) -> None:
    """Writes a decision where people read it: the run's artifacts, the version's description and tags.

    On a candidate of another model it may not be ours to write: that is said, and stops nothing.
    """
    found = client.get_model_version(model, version)
    tags = {
        DECISION_TAG: plan["action"],
        REASON_TAG: plan["reason"][:REASON_CHARACTERS],
        AT_TAG: plan["at"],
        BY_TAG: plan["by"],
        DECISION_ID_TAG: plan["id"],
    }
    if plan["action"] == PROMOTED and plan["champion_before"]:
        tags[BEFORE_TAG] = f"{plan['model']}/{plan['champion_before']}"
    if plan["action"] == ROLLED_BACK:
        tags[ROLLED_BACK_TAG] = plan["at"]
    try:
        client.update_model_version(model, version, description=described(found.description, plan))
        for tag, value in tags.items():
            client.set_model_version_tag(model, version, tag, value)
        if plan["action"] == PROMOTED and ROLLED_BACK_TAG in found.tags:
            client.delete_model_version_tag(model, version, ROLLED_BACK_TAG)   # a person's word has lifted it
    except MlflowException as error:
        if error.error_code != DENIED or model == plan["model"]:
            raise
        logger.warning("models:/%s: the decision cannot be written on it (no permission EDIT)", full_name(found))
    if plan["decision"] is not None:
        log_decision(client, found, plan)


def log_decision(client: MlflowClient, version: ModelVersion, plan: Mapping[str, Any]) -> None:
    """decision.json and decision.png on the version's run; a run that takes none, or is gone, is said and stops nothing."""
    if not version.run_id:
        return
    whole = {**plan["decision"], **{name: value for name, value in plan.items() if name != "decision"}}
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / "decision.json", whole)
        (Path(scratch) / "decision.png").write_bytes(decision_figure(decision_of_json(plan["decision"])))
        try:
            for name in ("decision.json", "decision.png"):
                client.log_artifact(version.run_id, str(Path(scratch) / name))
        except MlflowException as error:
            if error.error_code not in (GONE, DENIED, "INVALID_PARAMETER_VALUE", "INVALID_STATE"):
                raise
            logger.warning("models:/%s: its run takes no artifact (%s)", full_name(version), error.message)
        except requests.HTTPError as error:   # MLflow (3.17.2) hands on what an artifact proxy answers
            status = error.response.status_code if error.response is not None else 0
            if status not in (403, 404):
                raise
            logger.warning("models:/%s: its run takes no artifact from us (HTTP %d)", full_name(version), status)


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


def drop_challenger(client: MlflowClient, name: str, version: str, *, own: str) -> None:
    """Takes `challenger` from a version about which the gate has spoken; a later one keeps it.

    own: the model whose champion was asked about. In another model the alias may not be ours to take: that stops nothing.
    """
    try:
        if str(get_model(client, name).aliases.get(CHALLENGER)) == version:
            client.delete_registered_model_alias(name, CHALLENGER)
    except MlflowException as error:
        if error.error_code != DENIED or name == own:
            raise
        logger.warning("models:/%s@%s: stays on version %s (no permission EDIT)", name, CHALLENGER, version)


@contextmanager
def patient_lock(store: Store, name: str, *more: str) -> Iterator[None]:
    """The locks of model `name`, of `more`, and of the model whose version waits in its pending.json.

    Waited for longer than for a registration, as many promoters may come at once; in order of names, so that no two
    commands wait for each other.
    """
    pending = read_json(registry_folder(store, name) / "pending.json")
    marked = {model for model, _ in pending["versions"]} if pending else set()
    with ExitStack() as held:
        for each in sorted({name, *more, *marked}):
            for left in reversed(range(LOCK_TRIES)):
                try:
                    held.enter_context(model_lock(store.root, each))
                    break
                except StoreError:
                    if not left:
                        raise
                    logger.warning("models:/%s: waiting for another command", each)
        yield
