"""The registry's commands as they are typed: what they print, how they end, and each mistake in one line."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.cli import models
from pipelines.manifest import read_manifest
from tests.deploy.gate_store import BARE, LEAKY, SAYER, SKILLED, decide_on, entry_point, fingerprint_of, show, tree, write_model
from tests.deploy.mlflow_server import free_port

# fmt: off
MISTAKES = [
    # the command                                          words of its one line
    (["promote", "sola"],                                  ["models:/sola: no registered model", "did you mean 'solar'?"]),
    (["rollback", "sola"],                                 ["no registered model 'sola'", "did you mean 'solar'?"]),
    (["show", "sola"],                                     ["no registered model 'sola'", "did you mean 'solar'?"]),
    (["promote", "a:b"],                                   ["a:b: not a model's address"]),
    (["rollback", "../solar"],                             ["'../solar': not a registered model's name"]),
    (["promote", "models:/solar@best"],                    ["no alias 'best'", "'champion' (version 1)", "versions: 1, 2"]),
    (["promote", "models:/solar/9"],                       ["solar/9: no version '9'", "versions: 1, 2"]),
    (["promote", "solar", "--to", "a/b"],                  ["'a/b': not a registered model's name"]),
    (["promote", "solar", "--planned-uses", "1000000"],    ["gate: planned_uses is 1000000, wanted at most 2500"]),
    (["rollback", "solar"],                                ["models:/solar@previous: no previous champion to go back to"]),
    (["compare", SKILLED, "{eels}"],                       ["know other classes", "eel"]),
    (["compare", BARE, SAYER],                             ["no gate list for the pictures it learnt from"]),
    (["compare", LEAKY, "models:/solar@best"],             ["no alias 'best'"]),
    (["compare", "models:/solar/2", SAYER, "--out", "/"],  ["--out", "directory"]),
]
# fmt: on


@pytest.mark.parametrize(("words", "told"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_changes_nothing(words, told, shelf, tmp_path, monkeypatch, capsys):
    shelf.register("solar", SAYER, SKILLED)
    manifest = read_manifest(shelf.root / "data" / fingerprint_of(shelf, SKILLED))
    eels = write_model(tmp_path / "eels", manifest, SKILLED, classes=("blue", "eel", "red"))
    before = tree(shelf.root), show(shelf, "solar")

    code = entry_point(
        monkeypatch, "models", *[word.format(eels=eels) for word in words], "--store", shelf.root, "--tracking", shelf.tracking
    )

    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (code, out) == (2, "")
    del lines[: 3 if lines[0].startswith("Usage: ") else 0]
    assert len(lines) == 1 and lines[0].lower().startswith("error: "), err
    for each in told:
        assert each in lines[0], (each, lines[0])
    assert (tree(shelf.root), show(shelf, "solar")) == before


@pytest.mark.parametrize("words", [["promote", "solar"], ["rollback", "solar"], ["compare", SAYER, SKILLED], ["list"]])
def test_a_tracking_server_that_is_down_is_named_within_10_s(words, shelf, monkeypatch, capsys):
    address, before, began = f"http://127.0.0.1:{free_port()}", tree(shelf.root), time.monotonic()

    code = entry_point(monkeypatch, "models", *words, "--store", shelf.root, "--tracking", address)

    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--tracking {address}: no MLflow server answers (connection refused)" in err
    assert time.monotonic() - began < 10
    assert tree(shelf.root) == before


def test_to_promote_what_is_champion_already_is_done(shelf, monkeypatch, capsys):
    shelf.register("solar", SAYER, SKILLED)

    code = entry_point(monkeypatch, "models", "promote", "models:/solar@champion", "--store", shelf.root)

    assert (code, capsys.readouterr().out) == (0, "models:/solar/1: already champion\n")


def test_show_says_what_was_decided_about_each_version(shelf, monkeypatch, capsys):
    shelf.register("solar", SAYER, SKILLED)
    decide_on(shelf)
    where = ["--store", shelf.root]

    assert entry_point(monkeypatch, "models", "show", "solar", *where) == 0
    text = capsys.readouterr().out
    assert entry_point(monkeypatch, "models", "show", "solar", "--json", *where) == 0
    page = json.loads(capsys.readouterr().out)
    assert entry_point(monkeypatch, "models", "list", "--json", *where) == 0
    (listed,) = json.loads(capsys.readouterr().out)

    assert re.search(r"^  decision +promoted$", text, re.MULTILINE) and re.search(r"^  decided_by +ann$", text, re.MULTILINE)
    assert f"p = {page['versions'][0]['decisions'][0]['decision']['p_value']:.3g}" in text
    (decided,) = page["versions"][0]["decisions"]
    assert (decided["action"], decided["by"], decided["decision"]["promote"]) == ("promoted", "ann", True)
    assert page["versions"][1]["decisions"] == []
    assert listed["aliases"] == {"champion": "2", "previous": "1"}


def test_the_command_exits_3_on_a_refusal_and_prints_the_evidence(shelf, tmp_path):
    shelf.register("solar", SKILLED, SAYER)
    shelf.register("wind", SAYER, SKILLED)
    where = ["--store", str(shelf.root), "--tracking", shelf.tracking]

    def run(*words: str):
        return CliRunner().invoke(models, [*words, *where])

    refused, done = run("promote", "solar"), run("promote", "wind", "--json")
    evidence = run("compare", "models:/wind/2", "models:/wind/1", "--out", str(tmp_path / "evidence.png"))
    back = run("rollback", "wind")

    assert refused.exit_code == 3 and "FAILS  better: " in refused.output
    assert done.exit_code == 0 and json.loads(done.stdout)["decision"]["promote"] is True
    assert evidence.exit_code == 0 and "challenger wrong" in evidence.output
    assert (tmp_path / "evidence.png").read_bytes().startswith(b"\x89PNG")
    assert back.exit_code == 0 and "models:/wind/1: champion again" in back.output
    assert run("promote", "solar", "--force").exit_code == 2
    assert run("promote", "solar", "--reason", "because").exit_code == 2


def test_the_commands_answer_help_without_torch_or_mlflow():
    code = (
        "import sys, click, deploy.cli_models as m; g = click.Group('models'); m.register(g);"
        "[c.get_help(click.Context(c)) for c in g.commands.values()];"
        "assert sorted(g.commands) == ['compare', 'promote', 'renew-gate', 'rollback'], g.commands;"
        "sys.exit(bool({'torch', 'mlflow', 'nvidia'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
