"""Who decides, and whether the MLflow server lets them change a registered model."""

import getpass
import os
import socket

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from vggcore.errors import RegistryError

GONE, DENIED = "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"   # MLflow's error codes
PROBE_TAG = "vggrow.rights"                                     # no model has it: to take it away changes nothing


def whoever() -> str:
    """Who decides: the user of the MLflow server where one is named, else of this machine."""
    named = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if named:
        return named
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):
        return f"uid {os.getuid()}@{socket.gethostname()}"


def check_rights(client: MlflowClient, name: str) -> None:
    """RegistryError unless we may change model `name`, or there is none of that name yet.

    MLflow tells nobody but managers what a user may do (3.17.2). So it is asked to take away a tag that no model has: that
    needs EDIT, as moving an alias does, and changes nothing.
    """
    try:
        client.delete_registered_model_tag(name, PROBE_TAG)
    except MlflowException as error:
        if error.error_code == DENIED:
            raise no_right(name, "change", "EDIT") from error
        if error.error_code != GONE:
            raise


def no_right(name: str, what: str, permission: str) -> RegistryError:
    """What a 403 for a registered model means, and what to do."""
    return RegistryError(
        f"models:/{name}: the MLflow server does not let {whoever()} {what} this model, and nothing was changed; ask for the"
        f" permission {permission} on it, or somebody who has it"
    )
