"""The webhook: signed, tried again, told once; what a receiver did not take waits and is told later."""

import hashlib
import hmac
import json
import time

import pytest

from deploy.notify import ATTEMPTS, Outbox, read_secret, send
from deploy.pipeline_file import Notify
from tests.deploy.webhook_receiver import Receiver
from vggcore.errors import RecipeError

SECRET = b"a secret of the test"


@pytest.fixture
def receiver():
    with Receiver() as running:
        yield running


def test_a_message_carries_its_id_the_time_and_a_signature_over_both_time_and_body(receiver):
    before = int(time.time())

    delivery = send(Notify(url=receiver.url), SECRET, "e1", b'{"outcome": "promoted"}')

    assert (delivery.attempts, delivery.problem) == (1, None)
    (taken,) = receiver.taken
    assert taken.headers["X-Vggrow-Event"] == "e1"
    stamp = taken.headers["X-Vggrow-Timestamp"]
    assert before <= int(stamp) <= time.time()
    wanted = hmac.new(SECRET, f"{stamp}.".encode() + taken.body, hashlib.sha256).hexdigest()
    assert taken.headers["X-Vggrow-Signature"] == f"sha256={wanted}"


def test_a_receiver_that_fails_first_is_tried_again_with_the_same_id(receiver):
    receiver.answers = [503, 500]

    delivery = send(Notify(url=receiver.url), SECRET, "e1", b"{}", first_wait_s=0.01)

    assert (delivery.attempts, delivery.problem) == (3, None)
    assert [one.headers["X-Vggrow-Event"] for one in receiver.seen] == ["e1"] * 3
    assert len(receiver.taken) == 1


def test_a_receiver_that_says_no_is_not_pressed_nor_a_redirect_followed(receiver):
    for status in (401, 302):
        receiver.answers = [status]

        delivery = send(Notify(url=receiver.url), SECRET, "e1", b"{}", first_wait_s=0.01)

        assert (delivery.attempts, delivery.problem) == (1, f"HTTP {status}")
    assert receiver.taken == []


def test_a_receiver_that_is_down_is_given_up_without_an_error():
    with Receiver() as gone:
        url = gone.url

    delivery = send(Notify(url=url), SECRET, "e1", b"{}", first_wait_s=0.01)

    assert (delivery.attempts, delivery.problem) == (ATTEMPTS, "no answer (ConnectionError)")


def test_what_could_not_be_told_waits_is_told_in_order_and_never_again(receiver, tmp_path):
    outbox, notify = Outbox(tmp_path), Notify(url=receiver.url)
    outbox.put("e2", 2, {"outcome": "refused"})
    outbox.put("e1", 1, {"outcome": "promoted"})
    receiver.answers = [503] * ATTEMPTS
    assert [one["id"] for one in outbox.send_waiting(notify, SECRET, first_wait_s=0.01)] == ["e1", "e2"]

    left = outbox.send_waiting(notify, SECRET, first_wait_s=0.01)

    assert left == []
    assert [json.loads(one.body)["outcome"] for one in receiver.taken] == ["promoted", "refused"]
    assert outbox.send_waiting(notify, SECRET) == [] and len(receiver.taken) == 2
    outbox.put("e1", 1, {"outcome": "promoted"})      # a tick taken up again notes it once more
    assert outbox.waiting() == []
    found = outbox.find("e1")
    assert found is not None and found["attempts"] == ATTEMPTS + 1 and found["sent"] and found["problem"] is None


def test_the_secret_comes_from_the_environment_alone(monkeypatch):
    notify = Notify(url="https://example.org/hook", secret_env="HOOK_SECRET")
    monkeypatch.delenv("HOOK_SECRET", raising=False)

    with pytest.raises(RecipeError, match="environment variable HOOK_SECRET is not set"):
        read_secret(notify)

    monkeypatch.setenv("HOOK_SECRET", "word")
    assert read_secret(notify) == b"word"
