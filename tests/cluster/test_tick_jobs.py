"""Ticks of a retraining pipeline as jobs on a real cluster: followed, found again, never doubled, told of once."""

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.deploy.mlflow_server import free_port
from tests.deploy.webhook_receiver import Receiver
from tests.end_to_end.command import SIGINT, SIGKILL, SIGTERM, VGGROW, environment, vggrow, wait_until
from tests.end_to_end.test_resume import iterations

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

JOB_S = 600.0
LONG = 20_000
SECRETS = ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "WEEKLY_SECRET"]


@dataclass(frozen=True)
class Owner:
    """Somebody who owns a pipeline whose ticks run on the cluster, at a machine outside it."""

    cluster: Cluster
    pipeline: Path
    store: Path

    @property
    def secrets(self) -> dict[str, str]:
        """What is in the shell."""
        return self.cluster.secrets | {"WEEKLY_SECRET": "s3cret"}

    def retrain(self, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        """A tick, to its end."""
        return vggrow("retrain", self.pipeline, *words, timeout_s=JOB_S, **(self.secrets | more))

    def starting(self, log: Path, *words: object) -> subprocess.Popen[bytes]:
        """A command on the pipeline that goes on; its words go to the log."""
        with log.open("w") as file:
            return subprocess.Popen(
                [*VGGROW, *map(str, words or ("retrain", self.pipeline))],
                stdout=file, stderr=file, env=environment(**self.secrets), start_new_session=True,
            )  # fmt: skip

    def jobs(self) -> list[dict[str, object]]:
        """The jobs of this pipeline, oldest first."""
        done = vggrow("jobs", "list", "--json", "--address", self.cluster.address, **self.secrets)
        return [job for job in json.loads(done.stdout) if job["store"] == str(self.store)]

    def stop_all(self) -> None:
        """Ends what runs, in order."""
        for job in self.jobs():
            if job["status"] in ("PENDING", "RUNNING"):
                vggrow("jobs", "stop", job["id"], "--address", self.cluster.address, **self.secrets)


@pytest.fixture(scope="module")
def receiver(cluster) -> Iterator[Receiver]:
    """A webhook on this machine's address on the cluster's bridge, where the head reaches it."""
    with Receiver() as made:
        server = ThreadingHTTPServer((f"{cluster.network}.1", 0), made.server.RequestHandlerClass)
        made.url = f"http://{cluster.network}.1:{server.server_address[1]}/hook"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield made
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def make_owner(cluster, write_recipe, receiver, tmp_path_factory):
    """Owners of pipelines of their own."""

    def make(name: str, *, epochs: int) -> Owner:
        folder, store = tmp_path_factory.mktemp(name), cluster.shared / f"{name}-{time.time_ns()}"
        write_recipe(folder, epochs=epochs, seed=time.time_ns() // 10**6 % 10**9)
        pipeline = folder / "pipeline.toml"
        pipeline.write_text(
            f'name = "{name}"\nrecipe = "photos.toml"\n[run]\naddress = "{cluster.address}"\nstore = "{store}"\n'
            f'tracking = "{cluster.tracking}"\nworkers = 2\nthreads = 1\nenv = {json.dumps(SECRETS)}\n'
            f'[notify]\nurl = "{receiver.url}"\nsecret_env = "WEEKLY_SECRET"\n'
            '[timetable]\ncron = "0 0 1 1 *"\n'
        )
        return Owner(cluster, pipeline, store)

    return make


def test_a_tick_on_the_cluster_trains_and_tells_and_the_next_one_has_nothing_to_do(make_owner, receiver):
    owner = make_owner("weekly", epochs=2)

    first = owner.retrain()
    told = len(receiver.taken)
    second = owner.retrain("--json")

    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"submitted [0-9a-f]{16}-1\n", first.stdout)
    assert "A-36: epoch 2/2" in first.stderr and "tick 1: " in first.stderr
    assert second.returncode == 0, second.stderr
    tick = json.loads(second.stdout)
    assert (tick["tick"], tick["outcome"]) == (2, "nothing new")
    assert [job["pipeline"] for job in owner.jobs()] == ["weekly", "weekly"]
    assert "WEEKLY_SECRET" in owner.jobs()[0]["env"] and "s3cret" not in json.dumps(owner.jobs())
    assert told == len(receiver.taken)
    bodies = [json.loads(post.body) for post in receiver.taken if json.loads(post.body)["pipeline"] == "weekly"]
    assert [body["tick"] for body in bodies] == [1]


def test_a_dry_run_on_the_cluster_says_what_it_would_do_and_records_nothing(make_owner):
    owner = make_owner("dry", epochs=2)

    done = owner.retrain("--dry-run")

    assert done.returncode == 0, done.stderr
    assert "tick 1: would train" in done.stderr
    assert not (owner.store / "retraining" / "dry" / "ticks").exists()
    (job,) = owner.jobs()
    assert "--dry-run" in job["command"] and job["key"] != ""


@pytest.fixture(scope="class")
def long_owner(make_owner) -> Owner:
    return make_owner("long-tick", epochs=LONG)


@pytest.fixture(scope="class")
def followers(long_owner, tmp_path_factory) -> Iterator[list[tuple[subprocess.Popen[bytes], Path]]]:
    """Two `vggrow retrain` that were started at the same moment, once the tick trains; stopped in the end."""
    logs = [tmp_path_factory.mktemp("followers") / "log" for _ in range(2)]
    started = [(long_owner.starting(log), log) for log in logs]
    try:
        wait_until(lambda: iterations(long_owner.store) >= 5, timeout_s=JOB_S)
        wait_until(lambda: all("A-36: epoch" in log.read_text() for log in logs), timeout_s=60)
        yield started
    finally:
        long_owner.stop_all()
        for process, _ in started:
            process.wait(60)


class TestWhileATickRuns:
    """One long tick."""

    def test_two_calls_at_once_make_one_job_that_both_follow(self, followers, long_owner):
        said = "".join(log.read_text() for _, log in followers)

        (job,) = long_owner.jobs()
        assert sorted(re.findall(r"^(submitted|running) (\S+)$", said, re.MULTILINE)) == [
            ("running", job["id"]), ("submitted", job["id"]),
        ]  # fmt: skip

    @pytest.mark.parametrize(("number", "code"), [(SIGINT, 130), (SIGTERM, 130), (SIGKILL, -SIGKILL)])
    def test_a_call_that_is_stopped_leaves_the_job_and_the_next_call_finds_it(
        self, followers, long_owner, tmp_path, number, code
    ):
        process = long_owner.starting(tmp_path / "log")
        wait_until(lambda: "A-36: epoch" in (tmp_path / "log").read_text(), timeout_s=60)

        process.send_signal(number)

        assert process.wait(30) == code
        said = (tmp_path / "log").read_text()
        (job,) = long_owner.jobs()
        assert job["status"] == "RUNNING" and f"running {job['id']}" in said
        assert ("goes on without us" in said and "Traceback" not in said) == (number != SIGKILL)

    def test_submitting_the_pipeline_finds_it_too(self, followers, long_owner):
        done = vggrow(
            "submit", long_owner.pipeline, "--json", "--address", long_owner.cluster.address, **long_owner.secrets
        )

        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        (job,) = long_owner.jobs()
        assert (found["id"], found["fresh"], found["package_bytes"]) == (job["id"], False, None)

    def test_a_timetable_that_is_stopped_leaves_the_job_and_knows_that_the_tick_is_due(self, followers, long_owner, tmp_path):
        process = long_owner.starting(tmp_path / "log", "timetable", "run", long_owner.pipeline)
        wait_until(lambda: "A-36: epoch" in (tmp_path / "log").read_text(), timeout_s=60)

        process.send_signal(SIGTERM)

        assert process.wait(60) == 0, (tmp_path / "log").read_text()
        assert "goes on without us" in (tmp_path / "log").read_text()
        assert [job["status"] for job in long_owner.jobs()] == ["RUNNING"]
        assert (long_owner.store / "retraining" / "long-tick" / "due.json").exists()


def test_data_that_got_worse_ends_the_call_with_the_jobs_own_code_and_line(make_owner):
    owner = make_owner("worse", epochs=2)
    recipe = owner.pipeline.with_name("photos.toml")
    recipe.write_text(re.sub(r'root = ".*"', 'root = "/nowhere/pictures"', recipe.read_text()))

    done = owner.retrain()

    assert done.returncode == 2, done.stderr
    assert "/nowhere/pictures: no such folder" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("failed (exit 2)")


def test_a_variable_that_this_shell_has_not_got_is_named_before_anything_is_sent(make_owner):
    owner = make_owner("absent", epochs=2)
    secrets = {name: value for name, value in owner.secrets.items() if name != "WEEKLY_SECRET"}
    assert "WEEKLY_SECRET" not in os.environ

    done = vggrow("retrain", owner.pipeline, **secrets)

    assert done.returncode == 2 and done.stdout == ""
    assert "[run] env WEEKLY_SECRET: no such variable in this shell" in done.stderr
    assert owner.jobs() == []


def test_a_secret_that_the_job_does_not_get_is_missed_where_the_tick_runs(make_owner):
    owner = make_owner("secretless", epochs=2)
    owner.pipeline.write_text(owner.pipeline.read_text().replace(', "WEEKLY_SECRET"', ""))

    done = owner.retrain()

    assert done.returncode == 2
    assert "error: [notify] secret_env: the environment variable WEEKLY_SECRET is not set" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("failed (exit 2)")


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}", "127.0.0.1:{port}"])
def test_a_cluster_that_does_not_answer_is_named_within_10_s(address, make_owner):
    owner, named = make_owner("down", epochs=2), address.format(port=free_port())
    owner.pipeline.write_text(owner.pipeline.read_text().replace(owner.cluster.address, named))
    began = time.monotonic()

    done = owner.retrain()

    assert time.monotonic() - began < 10
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --address {named}: no Ray head answers")
