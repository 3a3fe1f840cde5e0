"""The webhook of promotions by hand: told once, whatever is killed, and a receiver that is down undoes nothing."""

import json

import pytest

from deploy.pipeline_file import Notify
from deploy.promote import promote, rollback
from deploy.registry_webhook import outbox, tell_waiting
from tests.deploy.gate_store import SAYER, SKILLED, decide_on, entry_point, killed_at, killed_or_counted, show
from tests.deploy.webhook_receiver import Receiver

SECRET = b"a secret of the test"


@pytest.fixture
def receiver():
    with Receiver() as running:
        yield running


def send(shelf, receiver, name="solar"):
    """As the command does after its decision."""
    return tell_waiting(shelf.store, name, Notify(url=receiver.url), SECRET, first_wait_s=0.01)


def heard(receiver):
    return [(told["outcome"], told["version"]) for told in (json.loads(one.body) for one in receiver.taken)]


def test_a_promotion_a_refusal_and_a_rollback_are_told_once_each(shelf, receiver):
    shelf.register("solar", SAYER, SKILLED)
    decide_on(shelf, tell=True)
    send(shelf, receiver)
    decide_on(shelf, "models:/solar/1", tell=True)
    rollback(shelf.client, store=shelf.store, name="solar", reason="complaints", tell=True)
    send(shelf, receiver)

    decide_on(shelf, "models:/solar/1", tell=True)      # champion already
    decide_on(shelf, "models:/solar/2", tell=True)      # was rolled back: refused
    decide_on(shelf, "models:/solar/2", tell=True)      # the same question again
    send(shelf, receiver)

    assert heard(receiver) == [("promoted", "2"), ("refused", "1"), ("rolled back", "1"), ("refused", "2")]
    first = json.loads(receiver.taken[0].body)
    assert first["reason"] == shelf.history("solar")[0]["reason"] and first["by"] == "ann" and first["p_value"] < 0.001
    assert len({one.headers["X-Vggrow-Event"] for one in receiver.taken}) == 4
    assert SECRET.decode() not in "".join(path.read_text() for path in (shelf.root / "registry").rglob("*.json*"))


def test_a_receiver_that_is_down_undoes_nothing_and_is_told_by_the_next_command(shelf, receiver):
    shelf.register("solar", SAYER, SKILLED)
    receiver.answers = [503] * 4

    decide_on(shelf, force="now", tell=True)
    left = send(shelf, receiver)

    assert len(left) == 1 and shelf.aliases("solar")["champion"] == "2" and receiver.taken == []
    decide_on(shelf, tell=True)                         # champion already
    assert send(shelf, receiver) == [] and heard(receiver) == [("promoted", "2")]


def test_killed_anywhere_it_is_told_once_by_the_next_command(shelf, receiver):
    shelf.register("solar", SAYER, SKILLED)
    _, lines = killed_or_counted(10**9, lambda: decide_on(shelf, force="try"))

    for line in (lines // 2, lines - 6, lines - 3, lines):      # the message is put down a few lines before the end
        name = f"solar-{line}"
        shelf.register(name, SAYER, SKILLED)
        receiver.taken.clear()

        assert killed_at(line, lambda name=name: decide_on(shelf, name, force="try", tell=True)), line
        decide_on(shelf, name, force="try", tell=True)
        send(shelf, receiver, name)
        decide_on(shelf, name, force="try", tell=True)
        send(shelf, receiver, name)

        assert heard(receiver) == [("promoted", "2")], line


def test_what_retrain_promotes_and_a_dry_run_leave_no_message(shelf):
    shelf.register("solar", SAYER, SKILLED)

    promote(shelf.client, store=shelf.store, model="solar", dry_run=True, tell=True)
    promote(shelf.client, store=shelf.store, model="solar", by="vggrow retrain weekly")

    assert shelf.aliases("solar")["champion"] == "2"
    assert outbox(shelf.root / "registry" / "solar").waiting() == []


def test_the_command_tells_and_its_secret_comes_from_the_environment_alone(shelf, receiver, monkeypatch, capsys):
    shelf.register("solar", SAYER, SKILLED)
    words = ["models", "promote", "solar", "--force", "--reason", "now", "--store", shelf.root, "--tracking", shelf.tracking]
    monkeypatch.delenv("VGGROW_WEBHOOK_SECRET", raising=False)
    before = show(shelf, "solar")

    unsigned = entry_point(monkeypatch, *words, "--notify", receiver.url)
    told = capsys.readouterr().err
    wrong = entry_point(monkeypatch, *words, "--notify", "ftp://host/x")
    told_wrong = capsys.readouterr().err

    assert (unsigned, wrong) == (2, 2) and show(shelf, "solar") == before
    assert told.startswith("error: --notify: the environment variable VGGROW_WEBHOOK_SECRET is not set")
    assert told_wrong.startswith("error: --notify: found 'ftp://host/x'")
    assert told.count("\n") == told_wrong.count("\n") == 1

    monkeypatch.setenv("VGGROW_WEBHOOK_SECRET", "word")
    monkeypatch.setenv("VGGROW_WEBHOOK_URL", receiver.url)
    assert entry_point(monkeypatch, *words, "--dry-run") == 0 and receiver.seen == []
    capsys.readouterr()
    assert entry_point(monkeypatch, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["webhook"] == "told"
    assert heard(receiver) == [("promoted", "2")]
