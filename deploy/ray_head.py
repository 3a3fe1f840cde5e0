"""The head of a Ray cluster as seen from outside: its address, whether it answers, and the token that it asks for."""

import contextlib
import logging
import os
import shlex
import stat
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from deploy.tracking_address import short_reason, shown
from vggcore.errors import ClusterError
from vggcore.home_path import at_home

logger = logging.getLogger(__name__)

WORKER_COMMAND = "--python_worker_command="
REPORT_S = 15.0                      # a head that has just started reports its processes some seconds later
CONNECT_S, ANSWER_S = 3.0, 5.0       # together below the 10 s within which a silent head must be named


def checked_address(address: str) -> str:
    """The address without a slash at its end. ClusterError unless it is http(s)://HOST[:PORT]."""
    parts = urllib.parse.urlsplit(address)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if not good:
        raise ClusterError(f"--address {address}: wanted http://HOST:8265, the address of the head's dashboard")
    return address.rstrip("/")


def check_head(address: str, headers: dict[str, str]) -> None:
    """ClusterError unless a Ray head answers at `address` and takes our token."""
    try:
        answer = requests.get(f"{address}/api/version", headers=headers, timeout=(CONNECT_S, ANSWER_S))
    except requests.RequestException as error:
        raise silent_head(address, short_reason(error)) from error
    if answer.status_code in (401, 403):
        if answer.status_code == 401 and headers:
            raise ClusterError(f"--address {shown(address)}: asks for another kind of login; is it a Ray dashboard, port 8265?")
        raise refusal(address, answer.status_code)
    try:
        version = answer.json()["ray_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"--address {shown(address)}: answers HTTP {answer.status_code}, but is no Ray dashboard, whose port is mostly 8265"
        ) from error
    logger.info("%s: Ray %s", shown(address), version)


def head_python(address: str, headers: dict[str, str]) -> str:
    """The interpreter that the head starts its workers with, by its absolute path, from its raylet's command line.

    Ray 2.60's dashboard gives it for each node; ClusterError when it does not, or gives no absolute path.
    """
    deadline = time.monotonic() + REPORT_S
    while (command := worker_command(ask_nodes(address, headers))) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    if command and command[0].startswith("/"):
        return command[0]
    raise ClusterError(
        f"--address {shown(address)}: the head's dashboard does not say which interpreter it runs; name it by --python"
    )


def ask_nodes(address: str, headers: dict[str, str]) -> Any:
    """What the dashboard says of the nodes; None when that is no JSON. ClusterError from a head that does not answer."""
    try:
        return requests.get(f"{address}/nodes?view=summary", headers=headers, timeout=(CONNECT_S, ANSWER_S)).json()
    except requests.exceptions.JSONDecodeError:
        return None
    except requests.RequestException as error:
        raise silent_head(address, short_reason(error)) from error


def worker_command(nodes: Any) -> list[str] | None:
    """How the living head starts a worker; empty when that is not as in Ray 2.60, None when it has not reported it yet."""
    try:
        for node in nodes["data"]["summary"]:
            if node["raylet"].get("isHeadNode") and node["raylet"].get("state") == "ALIVE":
                if not node.get("cmdline"):
                    return None
                (word,) = [word for word in node["cmdline"] if word.startswith(WORKER_COMMAND)]
                return shlex.split(word.removeprefix(WORKER_COMMAND))
    except (KeyError, TypeError, AttributeError, ValueError):
        logger.debug("the dashboard's list of nodes has another shape than that of Ray 2.60")
    return []


def silent_head(address: str, reason: str) -> ClusterError:
    """Nobody is there, or no more."""
    return ClusterError(
        f"--address {shown(address)}: no Ray head answers ({reason}); is the cluster up, and its dashboard reachable from here?"
        " What was trained is in the store: submit again when it is"
    )


def refusal(address: str, status: int) -> ClusterError:
    """What a 401 or a 403 of the head means, and what to do."""
    if status == 401:
        what = "the cluster asks for a token; set RAY_AUTH_TOKEN, or name its file by RAY_AUTH_TOKEN_PATH"
    else:
        names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
        where = next((name for name in names if os.environ.get(name)), "~/.ray/auth_token")
        what = f"the cluster refuses the token of {where}; ask for the one that it was started with"
    return ClusterError(f"--address {shown(address)}: {what}")


def auth_headers() -> dict[str, str]:
    """The token as an HTTP header, whatever RAY_AUTH_MODE is here; none: no header."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    if not token:
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        path = at_home(named, ClusterError, place="RAY_AUTH_TOKEN_PATH=") if named else Path.home() / ".ray" / "auth_token"
        try:
            token = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            if named:
                raise ClusterError(f"RAY_AUTH_TOKEN_PATH={named}: no such file; name the file that holds the token") from None
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise ClusterError(f"{path}: cannot be read as a token ({error})") from error
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning("%s: others may read this token; chmod 600 it", path)
    token = token.strip()
    if not token.isascii() or not token.isprintable():
        raise ClusterError("RAY_AUTH_TOKEN: holds characters that no token has; copy it again")
    return {"Authorization": f"Bearer {token}"} if token else {}


@contextlib.contextmanager
def only_address(address: str) -> Iterator[None]:
    """While the block runs, the environment does not lead Ray's client to another head than `address` (2.60 lets it)."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        yield
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        os.environ.update(before)
