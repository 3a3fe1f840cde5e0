"""Where runs and models are recorded: the store's own sqlite file or an MLflow server, asked first if it answers."""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests

from training.store import lock_file_held
from vggcore.errors import TrackingError

CONNECT_S, ANSWER_S = 3.0, 5.0   # together below the 10 s within which a silent server must be named

# MLflow's own patience with a server that is down is 246 s (measured, MLflow 3.17.2), with these under 5 s a call.
# An hour's outage is bridged by the journal (history.jsonl), not by waiting.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}

SQLITE = "sqlite:///"
WANTED = "wanted sqlite:///FILE or http(s)://HOST:PORT"


def resolve_tracking(uri: str | None, store: Path) -> str:
    """The tracking URI to use: `uri`, a sqlite path made absolute, or the store's own mlflow.db where none is given.

    Raises TrackingError for a plain folder, file:, or any other kind of address.
    """
    if uri is None:
        return f"{SQLITE}{store.absolute() / 'mlflow.db'}"
    scheme = urlsplit(uri).scheme.lower()
    if scheme in ("http", "https"):
        if not urlsplit(uri).hostname:
            raise TrackingError(f"--tracking {shown(uri)!r}: no host in it; {WANTED}")
        return uri.rstrip("/")
    if scheme == "sqlite":
        path = uri.removeprefix(SQLITE)
        if not uri.startswith(SQLITE) or path in ("", "/", ":memory:"):
            raise TrackingError(f"--tracking {shown(uri)!r}: no file in it; {WANTED}")
        return f"{SQLITE}{Path(path).absolute()}"
    if scheme in ("", "file"):
        raise TrackingError(f"--tracking {shown(uri)!r} is a folder, which MLflow no longer maintains as a store; {WANTED}")
    raise TrackingError(f"--tracking {shown(uri)!r}: unknown kind of address {scheme!r}; {WANTED}")


def artifact_location(tracking: str, store: Path) -> str | None:
    """The absolute artifact location of a new experiment: STORE/artifacts beside a sqlite file; None: the server's own.

    Without it MLflow writes to ./mlruns of whatever the working folder is.
    """
    return (store.absolute() / "artifacts").as_uri() if tracking.startswith(SQLITE) else None


def check_tracking(tracking: str, *, before_store: bool = False) -> None:
    """Asks `tracking` (from resolve_tracking) whether it answers and lets us in, within 10 s; sets MLflow's patience.

    Call it before any other use of MLflow. before_store: a sqlite file in a folder that is yet to be made is not asked for.
    Raises TrackingError that says what to do.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")      # stdout is for results: --json
    # A line for each table of a new database; one a version that is being made.
    for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if tracking.startswith(SQLITE):
        if not before_store:
            check_sqlite(Path(tracking.removeprefix(SQLITE)))
    else:
        check_health(tracking)
        check_access(tracking)


def make_database(tracking: str) -> None:
    """Makes MLflow's sqlite file, where `tracking` names one that is absent, whole or not at all and by one process alone.

    MLflow (3.17.2) makes it by dozens of migrations, outside any transaction: two commands that begin at once, or a kill in
    the middle, leave a file that no command can open any more ("duplicate column name").
    """
    if not tracking.startswith(SQLITE):
        return
    path = Path(tracking.removeprefix(SQLITE))
    if path.exists():
        return
    from mlflow import MlflowClient

    with lock_file_held(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        MlflowClient(f"{SQLITE}{part}").search_experiments(max_results=1)
        part.replace(path)


def check_sqlite(path: Path) -> None:
    """TrackingError where MLflow could not open its database at `path`; a file that is absent is MLflow's to make."""
    if not path.parent.is_dir():
        raise TrackingError(f"--tracking {SQLITE}{path}: no folder {str(path.parent)!r}; make it, or name another file")
    if not path.exists():
        return
    try:        # not mode=ro: a writer that was killed has left a journal, which the next one must roll back
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise TrackingError(f"--tracking {SQLITE}{path}: not a database ({error}); name another file") from error


def check_health(tracking: str) -> None:
    """TrackingError where no MLflow server answers at `tracking`: a plain GET of /health with a short timeout."""
    try:
        answer = requests.get(f"{tracking}/health", timeout=(CONNECT_S, ANSWER_S))
    except requests.RequestException as error:
        raise TrackingError(
            f"--tracking {shown(tracking)}: no MLflow server answers ({short_reason(error)});"
            " start it (mlflow server --port ...), mend the address, or leave --tracking out to use the store's file"
        ) from error
    if answer.status_code in (401, 403):
        raise refusal(tracking, answer.status_code)
    if answer.status_code != 200:
        raise TrackingError(
            f"--tracking {shown(tracking)}: /health answers HTTP {answer.status_code}: no MLflow server, or an ailing one;"
            " mend the address, or look at the server's log"
        )


def check_access(tracking: str) -> None:
    """TrackingError where the server is up but refuses us, or is no MLflow server."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException, RestException

    try:
        MlflowClient(tracking).search_experiments(max_results=1)
    except RestException as error:
        raise TrackingError(f"--tracking {shown(tracking)}: the server answers {one_line(error)}") from error
    except MlflowException as error:
        status = next((code for code in (401, 403) if f"error code {code}" in str(error)), None)
        if status is not None:
            raise refusal(tracking, status) from error
        raise TrackingError(f"--tracking {shown(tracking)}: not an MLflow server that answers: {one_line(error)}") from error


def refusal(tracking: str, status: int) -> TrackingError:
    """What a 401 or a 403 means, and what to do."""
    if status == 401:
        what = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
    else:
        what = "ask for the permission, or start the server with --allowed-hosts naming this host"
    return TrackingError(f"--tracking {shown(tracking)}: the server refuses us (HTTP {status}); {what}")


def shown(tracking: str) -> str:
    """The address as it may stand in a message or a log: without the user and password in it."""
    return re.sub(r"//[^/@]*@", "//", tracking)


def short_reason(error: requests.RequestException) -> str:
    """A few words for why a request failed; requests' own text is three nested exceptions long."""
    if isinstance(error, requests.Timeout):
        return f"no answer within {CONNECT_S:.0f} to {ANSWER_S:.0f} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "its TLS certificate is not accepted"
    text = str(error)
    if "NameResolutionError" in text or "getaddrinfo" in text:
        return "its host name is unknown"
    if "refused" in text:
        return "connection refused"
    return type(error).__name__


def one_line(error: Exception) -> str:
    """An exception's text in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


@contextmanager
def using_tracking(tracking: str) -> Iterator[None]:
    """Points MLflow's process-wide tracking URI at `tracking` for the calls that take none, and back again."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.tracking.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(tracking)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)   # None: not set, as it was
