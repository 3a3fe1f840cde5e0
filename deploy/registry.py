"""The registry: candidates come in once and get their alias, and what is there can be listed and shown."""

import datetime
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from deploy.decision_history import last_decisions
from deploy.rights import DENIED, GONE, no_right
from deploy.tracking_address import using_tracking
from training.store import Store, take
from vggcore.errors import RegistryError, StoreError
from vggcore.recipe import nearest

CHAMPION, CHALLENGER = "champion", "challenger"
STAGE_KEY_TAG = "vggrow.stage_key"
DECISION_ID_TAG = "vggrow.decision_id"
MODEL_ID_TAG = "vggrow.model_id"         # the logged model: the same weights under another test protocol are another one
WEIGHTS_TAG, WEIGHTS_DIGEST_TAG = "vggrow.weights", "vggrow.weights_digest"      # of weights that are not the last ones
TOP1_TAG = "vggrow.test_top1_accuracy"
DECIDED_TAG = "vggrow.alias_decided"     # champion or challenger: once given, an alias is not given again to a version
REASON_TAG = "vggrow.alias_reason"
LONGEST_NAME = 200                       # bytes: locks and folders of the store are named after models
LOCK_S = 60.0                            # alias changes take under a second; a lock held longer is another command's


@dataclass(frozen=True)
class Registered:
    """A candidate's place in the registry; alias is None for one below the floor while there is no champion."""

    name: str
    version: str
    alias: str | None
    uri: str        # models:/name@alias, or models:/name/version
    reason: str     # why this alias, in a sentence


@dataclass(frozen=True)
class VersionLine:
    """One version of a registered model."""

    version: str
    aliases: tuple[str, ...]
    created: str                 # ISO 8601, UTC
    run_id: str | None
    source: str
    tags: dict[str, str]
    decisions: tuple[dict[str, Any], ...] = ()   # the last about it, in each model that it was to lead


@dataclass(frozen=True)
class ModelLine:
    """A registered model as `vggrow models list` shows it."""

    name: str
    aliases: dict[str, str]      # alias: version
    updated: str                 # ISO 8601, UTC


@dataclass(frozen=True)
class ModelPage:
    """A registered model with its versions, the newest first."""

    name: str
    aliases: dict[str, str]
    versions: tuple[VersionLine, ...]


def register_candidate(
    client: MlflowClient,
    *,
    store: Path,
    name: str,
    model_uri: str,
    run_id: str,
    stage_key: str,
    tags: Mapping[str, str],
    test_top1: float,
    floor: float,
) -> Registered:
    """Makes `model_uri` (models:/<model id>, from log_package) a version of model `name`, and gives it its alias.

    Called again for a logged model that has a version, it gives that version. The first version whose test top-1 accuracy
    (0..1) reaches the floor becomes champion, if there is none; versions that come while there is one are challengers.
    tags: net, recipe, fingerprint and the like. StoreError while another command holds the lock.
    """
    with model_lock(store, name):
        ensure_model(client, name)
        model_id = model_uri.removeprefix("models:/")
        version = find_version(client, name, stage_key, model_id)
        if version is None:
            every = {**tags, STAGE_KEY_TAG: stage_key, MODEL_ID_TAG: model_id, TOP1_TAG: f"{test_top1:.6f}"}
            # MLflow's sqlite registry looks a models:/ source up at the process-wide URI, whoever asks (3.17.2).
            with using_tracking(client.tracking_uri):
                version = client.create_model_version(
                    name, source=model_uri, run_id=run_id, tags=every, model_id=model_id
                )
        return give_alias(client, version, test_top1=test_top1, floor=floor)


def give_alias(client: MlflowClient, version: ModelVersion, *, test_top1: float, floor: float) -> Registered:
    """The alias that a version is due, given once; repeated after a break it finishes what was begun."""
    name, number = version.name, str(version.version)
    aliases = get_model(client, name).aliases
    own = sorted(alias for alias, holder in aliases.items() if str(holder) == number)
    if version.tags.get(DECIDED_TAG) in (CHAMPION, CHALLENGER):
        alias = next((alias for alias in (CHAMPION, CHALLENGER) if alias in own), None)
        return registered(name, number, alias, version.tags.get(REASON_TAG, ""))
    alias, reason = due_alias(number, aliases, test_top1=test_top1, floor=floor)
    client.set_model_version_tag(name, number, REASON_TAG, reason)
    if alias is not None:
        client.set_registered_model_alias(name, alias, number)
        client.set_model_version_tag(name, number, DECIDED_TAG, alias)
    return registered(name, number, alias, reason)


def due_alias(
    version: str, aliases: Mapping[str, str], *, test_top1: float, floor: float
) -> tuple[str | None, str]:
    """The alias that a new version gets, and why; aliases: the model's own, each with its version. Pure."""
    champion = aliases.get(CHAMPION)
    if champion is None and test_top1 < floor:
        return None, f"no alias: test top-1 {test_top1:.4f} is below the floor {floor:.4f}, and there is no champion"
    if champion is None or str(champion) == version:
        return CHAMPION, f"first version with test top-1 {test_top1:.4f} at or above the floor {floor:.4f}"
    newer = aliases.get(CHALLENGER)
    if newer is not None and int(newer) > int(version):
        return None, f"no alias: version {newer} came later and is the challenger"
    return CHALLENGER, f"version {champion} is the champion; this one waits for the gate"


def registered(name: str, version: str, alias: str | None, reason: str) -> Registered:
    """A Registered with the URI by which the version is best known."""
    uri = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    return Registered(name=name, version=version, alias=alias, uri=uri, reason=reason)


@contextmanager
def model_lock(store: Path, name: str) -> Iterator[None]:
    """Holds STORE/locks/registry-<name>.lock: in MLflow the last writer of an alias wins. StoreError after a minute."""
    path = store / "locks" / f"registry-{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        take(lock, LOCK_S)
    except Timeout as error:
        raise StoreError(f"{path}: another command changes model {name!r}; try again when it is done") from error
    try:
        yield
    finally:
        lock.release()


def ensure_model(client: MlflowClient, name: str) -> None:
    """Makes the registered model unless it is there."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def find_version(client: MlflowClient, name: str, stage_key: str, model_id: str) -> ModelVersion | None:
    """The version of `name` that a stage's logged model became, the oldest of several; None: not registered yet.

    create_model_version makes a new version at every call; these tags make a repeat harmless.
    """
    found = client.search_model_versions(f"name = '{name}' AND tags.`{STAGE_KEY_TAG}` = '{stage_key}'")
    same = [version for version in found if version.tags.get(MODEL_ID_TAG) == model_id]
    return min(same, key=lambda version: int(version.version), default=None)


def check_name(name: str) -> None:
    """RegistryError for what can be no registered model's name, or none that a folder of the store can bear."""
    if name in (".", "..") or not re.fullmatch(r"[^/:'\"\x00-\x1f\x7f]+", name) or len(name.encode()) > LONGEST_NAME:
        raise RegistryError(
            f"{name!r}: not a registered model's name, wanted up to {LONGEST_NAME} letters, digits, '-', '_', '.', or spaces"
        )


def get_model(client: MlflowClient, name: str) -> RegisteredModel:
    """The registered model, or RegistryError that names the nearest of those there are."""
    check_name(name)
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == DENIED:
            raise no_right(name, "see", "READ") from error
        if error.error_code != GONE:
            raise
        known = [model.name for model in all_models(client)]
        if not known:
            raise RegistryError(f"models:/{name}: no model is registered yet; train one with vggrow train") from error
        raise RegistryError(f"models:/{name}: no registered model {name!r}{nearest(name, known)}") from error


def get_version(client: MlflowClient, name: str, *, version: str | None, alias: str | None) -> ModelVersion:
    """A model's version by its number or by an alias; RegistryError that lists the aliases and versions there are."""
    model = get_model(client, name)
    wanted = str(model.aliases[alias]) if alias in model.aliases else version
    versions = {str(found.version): found for found in all_versions(client, name)}
    if wanted in versions:
        return versions[wanted]
    asked = f"{name}@{alias}: no alias {alias!r}" if alias else f"{name}/{version}: no version {version!r}"
    if alias in model.aliases:
        asked = f"{name}@{alias}: names version {wanted}, which was deleted"
    aliases = ", ".join(f"{held!r} (version {holder})" for held, holder in sorted(model.aliases.items())) or "none"
    numbers = ", ".join(sorted(versions, key=int)) or "none"
    raise RegistryError(f"models:/{asked}; aliases: {aliases}; versions: {numbers}")


def list_models(client: MlflowClient) -> list[ModelLine]:
    """All registered models by name."""
    models = sorted(all_models(client), key=lambda model: model.name)
    return [
        ModelLine(name=model.name, aliases=string_values(model.aliases), updated=iso(model.last_updated_timestamp))
        for model in models
    ]


def show_model(client: MlflowClient, name: str, store: Store | None = None) -> ModelPage:
    """One registered model, with what the store knows of decisions; RegistryError when there is none of that name."""
    aliases = string_values(get_model(client, name).aliases)
    versions = sorted(all_versions(client, name), key=lambda version: -int(version.version))
    lines = tuple(
        VersionLine(
            version=str(version.version),
            aliases=tuple(sorted(alias for alias, holder in aliases.items() if holder == str(version.version))),
            created=iso(version.creation_timestamp),
            run_id=version.run_id or None,
            source=version.source,
            tags=dict(version.tags),
            decisions=decisions_of(store, version) if store is not None else (),
        )
        for version in versions
    )
    return ModelPage(name=name, aliases=aliases, versions=lines)


def decisions_of(store: Store, version: ModelVersion) -> tuple[dict[str, Any], ...]:
    """What the store knows of a version's decisions; those of a model of the same name on another server are not its own."""
    if DECISION_ID_TAG not in version.tags:
        return ()
    return tuple(last_decisions(store, version.name, str(version.version)))


def all_models(client: MlflowClient) -> list[RegisteredModel]:
    """Every registered model, page by page."""
    found, token = [], None
    while True:
        page = client.search_registered_models(page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def all_versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Every version of a model, page by page."""
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def string_values(aliases: Mapping[str, str | int]) -> dict[str, str]:
    """Aliases with their versions as strings, as MLflow's API has them elsewhere."""
    return {alias: str(version) for alias, version in aliases.items()}


def iso(milliseconds: int) -> str:
    """A time of MLflow's as ISO 8601, UTC, to the second."""
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).isoformat(timespec="seconds")


def models_text(models: list[ModelLine]) -> str:
    """The models for a terminal, one a line with its aliases; what to do where there is none."""
    if not models:
        return "no model is registered yet; train one with vggrow train"
    width = max(len(model.name) for model in models)
    return "\n".join(
        f"{model.name:<{width}}  "
        + (", ".join(f"{alias} is version {version}" for alias, version in sorted(model.aliases.items())) or "no alias")
        + f"  (changed {model.updated})"
        for model in models
    )


def model_text(model: ModelPage) -> str:
    """A model for a terminal: a block a version, the newest first, with its URI, run, tags and aliases."""
    blocks = [f"{model.name}: {len(model.versions)} version{'' if len(model.versions) == 1 else 's'}"]
    for line in model.versions:
        title = " ".join(["version", line.version, *([f"({', '.join(line.aliases)})"] if line.aliases else [])])
        facts = {"uri": f"models:/{model.name}/{line.version}", "created": line.created, "run": line.run_id or "none"}
        facts |= {name.removeprefix("vggrow."): value for name, value in sorted(line.tags.items())}
        width = max(map(len, facts))
        blocks.append("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in facts.items())]))
    return "\n\n".join(blocks)
