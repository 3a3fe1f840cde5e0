"""The webhook: each decision is told once, signed and with a time stamp; what cannot be told now waits in the store.

    POST url
    X-Vggrow-Event: <id>              the same at every attempt: a receiver that knows it may pass over a repeat
    X-Vggrow-Timestamp: <seconds>     Unix time of this attempt: a receiver refuses what is old
    X-Vggrow-Signature: sha256=<hex>  HMAC-SHA256 over "<timestamp>.<body>" with the shared secret

What is told is one file, notifications/<id>.json in STORE/retraining/<pipeline> or STORE/registry/<model>, written before
the first attempt and marked when the receiver has answered 2xx. A command killed between that answer and the mark sends the
same id once more.
"""

import hashlib
import hmac
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from deploy.pipeline_file import Notify
from training.store import read_json
from vggcore.errors import RecipeError
from vggcore.whole_file import write_json

logger = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_WAIT_S = 1.0               # then 2 s, 4 s: a receiver that restarts is met again
CONNECT_S, ANSWER_S = 3.0, 10.0
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Delivery:
    """How sending ended; problem is None when the receiver answered 2xx."""

    attempts: int
    problem: str | None


def read_secret(notify: Notify, *, place: str = "[notify] secret_env") -> bytes:
    """The secret that signs. Raises RecipeError, which begins with `place`, when its environment variable is not set."""
    secret = os.environ.get(notify.secret_env, "")
    if not secret:
        raise RecipeError(
            f"{place}: the environment variable {notify.secret_env} is not set, and nothing is sent unsigned;"
            " set it to the secret that the receiver checks signatures with"
        )
    return secret.encode()


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """The value of X-Vggrow-Signature."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def send(notify: Notify, secret: bytes, event: str, body: bytes, *, first_wait_s: float = FIRST_WAIT_S) -> Delivery:
    """Posts `body` until the receiver answers 2xx, says that it will never take it, or ATTEMPTS are spent; never raises."""
    problem = ""
    for attempt in range(1, ATTEMPTS + 1):
        timestamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "vggrow",
            "X-Vggrow-Event": event,
            "X-Vggrow-Timestamp": timestamp,
            "X-Vggrow-Signature": signature(secret, timestamp, body),
        }
        try:
            answer = requests.post(
                notify.url, data=body, headers=headers, timeout=(CONNECT_S, ANSWER_S), allow_redirects=False
            )
        except requests.RequestException as error:
            problem = f"no answer ({type(error).__name__})"
        else:
            if 200 <= answer.status_code < 300:
                return Delivery(attempt, None)
            problem = f"HTTP {answer.status_code}"
            if answer.status_code not in TRY_AGAIN:
                return Delivery(attempt, problem)
        if attempt < ATTEMPTS:
            time.sleep(first_wait_s * 2 ** (attempt - 1))
    return Delivery(ATTEMPTS, problem)


@dataclass(frozen=True)
class Outbox:
    """What a pipeline, or a registered model, has told or has yet to tell, a file each."""

    folder: Path

    def put(self, event: str, tick: int, body: dict[str, Any]) -> None:
        """Notes what is to be told under its id; an id that is there already stays as it is. tick: its place in the order."""
        if not (self.folder / f"{event}.json").exists():
            self.write(event, {"id": event, "tick": tick, "body": body, "sent": None, "attempts": 0, "problem": None})

    def find(self, event: str) -> dict[str, Any] | None:
        """The record of one id."""
        found: dict[str, Any] | None = read_json(self.folder / f"{event}.json")
        return found

    def waiting(self) -> list[dict[str, Any]]:
        """The records that no receiver has taken yet, the oldest tick first."""
        records = [read_json(path) for path in self.folder.glob("[!.]*.json")]
        return sorted((one for one in records if one["sent"] is None), key=lambda one: (one["tick"], one["id"]))

    def send_waiting(self, notify: Notify, secret: bytes, *, first_wait_s: float = FIRST_WAIT_S) -> list[dict[str, Any]]:
        """Sends what waits, in order, up to the first that fails; gives those that still wait."""
        for record in self.waiting():
            body = json.dumps(record["body"], sort_keys=True, ensure_ascii=False).encode()
            delivery = send(notify, secret, record["id"], body, first_wait_s=first_wait_s)
            attempts = record["attempts"] + delivery.attempts
            sent = None if delivery.problem else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self.write(record["id"], record | {"sent": sent, "attempts": attempts, "problem": delivery.problem})
            if delivery.problem:
                logger.warning("webhook %s: %s; told again the next time", notify.url, delivery.problem)
                break
        return self.waiting()

    def write(self, event: str, record: dict[str, Any]) -> None:
        """Writes a record whole."""
        write_json(self.folder / f"{event}.json", record)
