"""Versions in the registry: the one that a name means, the champion, and a version's copy in another model."""

import difflib
import re

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from deploy.registry import (
    CHALLENGER,
    CHAMPION,
    MODEL_ID_TAG,
    all_models,
    all_versions,
    check_name,
    ensure_model,
    get_model,
    get_version,
)
from deploy.rights import DENIED, GONE, no_right
from deploy.tracking_address import using_tracking
from vggcore.errors import RegistryError

ALIKE = 0.75   # of 1 (difflib): a production model that is not there, and is named so nearly like another, is a typing error


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
    """The champion of model `name`; None where there is none, or no such model yet.

    With a version MLflow deletes its aliases (3.17.2): a champion that was deleted, also between the two questions asked
    here, is no champion.
    """
    check_name(name)
    try:
        aliases = client.get_registered_model(name).aliases
        return client.get_model_version(name, str(aliases[CHAMPION])) if CHAMPION in aliases else None
    except MlflowException as error:
        if error.error_code == DENIED:
            raise no_right(name, "see", "READ") from error
        if error.error_code != GONE:
            raise
        return None


def reread(client: MlflowClient, version: ModelVersion) -> ModelVersion:
    """The version as it is now; RegistryError where it was deleted meanwhile."""
    try:
        return client.get_model_version(version.name, str(version.version))
    except MlflowException as error:
        if error.error_code != GONE:
            raise
        raise RegistryError(f"models:/{full_name(version)}: was deleted meanwhile; nothing is promoted") from error


def check_target(client: MlflowClient, name: str) -> None:
    """RegistryError for a production model that is not there while one of nearly that name is.

    A version that comes into a new model is its first and needs no gate: a typing error must not open that door.
    """
    check_name(name)
    known = [model.name for model in all_models(client)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=ALIKE)
    if near and name not in known:
        raise RegistryError(
            f"--to {name}: no registered model {name!r}; did you mean {near[0]!r}? A new model with so like a name must be made"
            " on MLflow's Models page first"
        )


def is_copy(found: ModelVersion | None, version: ModelVersion) -> bool:
    """Whether `found` is the version itself, or its copy in another model.

    The logged model counts as well as the name: numbers begin again in a model that was deleted and made anew.
    """
    if found is None:
        return False
    if found.name == version.name:
        return str(found.version) == str(version.version)
    same = found.tags.get(MODEL_ID_TAG) == version.tags.get(MODEL_ID_TAG)
    return bool(same and found.source == f"models:/{full_name(version)}")


def find_copy(client: MlflowClient, version: ModelVersion, target: str) -> ModelVersion | None:
    """The version's copy in model `target` (the version itself where that is its own), the oldest of several, or None."""
    if target == version.name:
        return version
    copies = [found for found in all_versions(client, target) if is_copy(found, version)]
    return min(copies, key=lambda found: int(found.version), default=None)


def copied(client: MlflowClient, version: ModelVersion, target: str) -> ModelVersion:
    """The version's copy in model `target`, made unless it is there (copy_model_version makes one at every call)."""
    found = find_copy(client, version, target)
    if found is not None:
        return found
    ensure_model(client, target)
    with using_tracking(client.tracking_uri):
        return client.copy_model_version(f"models:/{full_name(version)}", target)


def number(version: ModelVersion | None) -> str | None:
    """A version's number as MLflow's API has it elsewhere."""
    return None if version is None else str(version.version)


def full_name(version: ModelVersion | None) -> str | None:
    """NAME/VERSION."""
    return None if version is None else f"{version.name}/{version.version}"
