"""What `vggrow doctor` finds: one real examination of this machine, and every kind of trouble it should name."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy import doctor
from deploy.doctor import Finding

PLAIN_CPU = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f\n\nmodel name\t: Other\n"


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Finding]]:
    """A store that does not exist yet, and what an examination for it finds."""
    store = tmp_path_factory.mktemp("doctor") / "a" / "store"
    return store, doctor.examine(store, f"sqlite:///{store}/mlflow.db")


def named(findings: list[Finding], subject: str) -> Finding:
    """The finding about a subject."""
    return next(finding for finding in findings if finding.subject == subject)


def test_this_machine_decodes_by_dali_and_adds_over_gloo(examined: tuple[Path, list[Finding]]) -> None:
    _, findings = examined

    assert named(findings, "DALI decodes").status == "ok"
    assert named(findings, "processes talk").status == "ok"
    assert named(findings, "torch").found.startswith(doctor.importlib.metadata.version("torch"))


def test_an_examination_leaves_nothing_behind(examined: tuple[Path, list[Finding]]) -> None:
    store, findings = examined

    assert not store.parent.exists() and list(store.parent.parent.iterdir()) == []
    assert "can be made" in named(findings, "store").found


def test_the_findings_read_the_same_as_text_and_as_json(examined: tuple[Path, list[Finding]]) -> None:
    _, findings = examined

    lines = doctor.as_text(findings).splitlines()
    saved = json.loads(json.dumps(doctor.as_json(findings)))

    problems = doctor.counted(saved["problems"], "problem")
    assert len(saved["findings"]) == len(findings)
    assert [line.split()[0] for line in lines if line[:2] in ("ok", "no", "pr")] == [one.status for one in findings]
    assert lines[-1].startswith(f"{len(findings)} looked at: {problems}, ")


def test_the_exit_code_is_two_with_a_problem_and_a_note_is_none() -> None:
    note, problem = Finding("note", "GPU", "none"), Finding("problem", "disk", "full", "free some space")

    assert doctor.exit_code([note]) == 0
    assert doctor.exit_code([note, problem]) == 2
    assert "-> free some space" in doctor.as_text([problem]) and "1 problem, 0 notes" in doctor.as_text([problem])


def test_a_library_that_is_absent_is_a_problem_with_its_install_line() -> None:
    found = doctor.library("no-such-distribution-of-ours")

    assert (found.status, found.found) == ("problem", "not installed")
    assert found.advice == "pip install 'no-such-distribution-of-ours'"


@pytest.mark.parametrize(
    ("flags", "status"),
    [("fpu avx2", "note"), ("avx512f avx512_bf16", "ok"), ("amx_bf16 amx_tile", "ok"), ("asimd bf16", "ok"), ("xbf16", "note")],
)
def test_bf16_is_recommended_only_where_the_processor_has_it(flags: str, status: str) -> None:
    found = doctor.bf16(flags)

    assert found.status == status
    assert ("keep precision" in found.advice) == (status == "note")


def test_the_processor_is_read_from_the_first_entry() -> None:
    assert doctor.cpu_facts(PLAIN_CPU) == {"model": "Some CPU @ 2 GHz", "flags": "fpu avx2 avx512f"}


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None)])
def test_a_container_with_a_limit_has_fewer_cores(text: str, cores: float | None) -> None:
    assert doctor.cpu_quota(text) == cores


@pytest.mark.parametrize("path", ["/proc/vggrow-store", "/dev/null", "/dev/null/store"])
def test_a_store_that_cannot_be_written_is_a_problem(path: str) -> None:
    found = doctor.writable(Path(path))

    assert found.status == "problem" and "--store" in found.advice


def test_a_tracking_server_that_is_down_is_said_at_once_without_the_password() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))     # bound and not listening: refuses
        began = time.monotonic()

        found = doctor.reachable(f"http://me:hunter2@127.0.0.1:{held.getsockname()[1]}")

    assert found.status == "problem" and "no MLflow server answers" in found.found and "mlflow server" in found.advice
    assert "hunter2" not in found.found + found.advice
    assert time.monotonic() - began < 10


def test_a_tracking_file_that_is_no_database_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to look like one" * 40)

    found = doctor.reachable(f"sqlite:///{tmp_path}/mlflow.db")

    assert found.status == "problem" and "not a database" in found.found


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:pass@host:5000/x", "https://***@host:5000/x"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
    ],
)
def test_an_address_is_shown_without_who_and_password(uri: str, shown: str) -> None:
    assert doctor.without_secrets(uri) == shown


def test_a_library_that_aborts_is_a_finding_with_its_last_words() -> None:
    program = "import os, sys; sys.stderr.write('warning\\nillegal instruction\\n'); sys.stderr.flush(); os.abort()"
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)

    error = doctor.last_words(child)

    assert error == "illegal instruction"
    assert doctor.torch_findings({}, error)[0].status == "problem"
    assert doctor.decode_finding({}, error).found == "illegal instruction"
    assert "illegal instruction" in doctor.gloo_finding([{"gloo": 3.0}, {}], ["", error]).found


def test_a_picture_decoded_to_wrong_colours_is_a_problem() -> None:
    assert doctor.decode_finding({"decode": [230.4, 119.2, 40.9]}, "").status == "ok"
    assert doctor.decode_finding({"decode": [40.0, 120.0, 230.0]}, "").status == "problem"   # blue and red changed places


def test_gloo_that_fails_says_why_and_what_to_set() -> None:
    found = doctor.gloo_finding([{"gloo": "connect failed"}, {"gloo": 3.0}], ["", ""])

    assert found.status == "problem" and "connect failed" in found.found and "GLOO_SOCKET_IFNAME" in found.advice


def test_little_shared_memory_is_a_note(tmp_path: Path) -> None:
    found = doctor.shared_memory(tmp_path / "absent")

    assert found.status == "note" and "object store" in found.advice
