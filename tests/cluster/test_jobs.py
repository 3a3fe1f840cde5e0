"""Jobs on a real cluster of three nodes: submitted, followed, stopped, killed, and finished by submitting again."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cluster.cluster import Cluster, command_lines, processes
from tests.deploy.mlflow_server import free_port
from tests.end_to_end.command import SIGINT, SIGKILL, VGGROW, environment, vggrow, wait_until
from tests.end_to_end.test_resume import iterations, stage_folder

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

SIGSTOP, SIGCONT = signal.SIGSTOP, signal.SIGCONT
JOB_S = 600.0        # a job takes 40 s on two idle cores
LONG = 20_000        # epochs that no test waits for


@dataclass(frozen=True)
class Client:
    """A person at a machine outside the cluster, with a recipe and a store of their own."""

    cluster: Cluster
    recipe: Path
    store: Path

    @property
    def submit_words(self) -> list[object]:
        """submit and all that it needs."""
        return [
            "submit", self.recipe, "--address", self.cluster.address, "--store", self.store,
            "--tracking", self.cluster.tracking,
            "--env", "MLFLOW_TRACKING_USERNAME", "--env", "MLFLOW_TRACKING_PASSWORD", "--threads", 1,
        ]  # fmt: skip

    def submit(self, *more: object) -> subprocess.CompletedProcess[str]:
        """Runs it to its end."""
        return vggrow(*self.submit_words, *more, timeout_s=JOB_S, **self.cluster.secrets)

    def submitting(self, *more: object, log: Path) -> subprocess.Popen[bytes]:
        """Starts it; stdout and stderr go to the log."""
        words = [*VGGROW, *map(str, (*self.submit_words, *more))]
        with log.open("w") as file:
            return subprocess.Popen(words, stdout=file, stderr=file, env=environment(**self.cluster.secrets))

    def following(self, job_id: str, *, log: Path) -> subprocess.Popen[bytes]:
        """`vggrow jobs logs -f`; its words go to the log."""
        words = [*VGGROW, "jobs", "logs", job_id, "-f", "--address", self.cluster.address]
        with log.open("w") as file:
            return subprocess.Popen(words, stdout=file, stderr=file, env=environment(**self.cluster.secrets))

    def jobs(self, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        """`vggrow jobs ...` on the cluster."""
        return vggrow("jobs", *words, "--address", self.cluster.address, **{**self.cluster.secrets, **more})

    def job(self, job_id: str) -> dict[str, object]:
        """A job as `show --json` has it."""
        done = self.jobs("show", job_id, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def checkpoints(self) -> list[int]:
        """The iterations of the stage's checkpoints."""
        return [int(path.name.split("-")[1]) for path in (stage_folder(self.store) / "checkpoints").glob("iteration-*")]

    def epochs(self) -> list[int]:
        """The epochs in the stage's journal, in its order."""
        rows = map(json.loads, (stage_folder(self.store) / "history.jsonl").read_text().splitlines())
        return [row["epoch"] for row in rows if "epoch" in row]

    def run_statuses(self) -> dict[str, str]:
        """The status of this store's runs on the MLflow server, by name."""
        (record,) = (self.store / "schedules").glob("*/stages.json")
        parent = json.loads(record.read_text())["parent_run_id"]
        client = MlflowClient(self.cluster.tracking)
        runs = client.search_runs([client.get_run(parent).info.experiment_id])
        ours = [run for run in runs if parent in (run.info.run_id, run.data.tags.get("mlflow.parentRunId"))]
        return {run.info.run_name: run.info.status for run in ours}


@pytest.fixture(autouse=True, scope="module")
def mlflow_user(cluster) -> Iterator[None]:
    """This process's own MLflow client may log in."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.secrets.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def make_client(cluster, write_recipe, tmp_path_factory):
    """Clients whose schedules are all different, by their seeds, so that no test meets another one's jobs."""
    base = time.time_ns() // 10**6 % 10**9

    def make(name: str, *, epochs: int) -> Client:
        folder = tmp_path_factory.mktemp(name)
        seed = base + sum(map(ord, name)) * 10**9
        return Client(cluster, write_recipe(folder, epochs=epochs, seed=seed), cluster.shared / f"{name}-{base}")

    return make


def submitted_id(done: subprocess.CompletedProcess[str]) -> str:
    """The id of the job that `submit` names on stdout."""
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    word, job_id = line.split()
    assert word in ("submitted", "running")
    return job_id


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 2 and one line on stderr with all the words."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, (word, line)


def test_a_job_ends_with_a_result_in_the_store_and_the_same_again_is_done(make_client):
    client = make_client("twice", epochs=2)

    first = client.submit("--workers", 2, "--follow")
    result = stage_folder(client.store) / "result.json"
    made = result.stat().st_mtime_ns
    second = client.submit("--workers", 2, "--follow")

    assert first.returncode == 0, first.stderr
    assert re.search(r"packed \d+ files, \d+ KiB", first.stderr)
    assert "A-36: epoch 2/2" in first.stderr and "models:/photos" in first.stderr
    assert second.returncode == 0, second.stderr
    assert "A-36: done before" in second.stderr
    assert result.stat().st_mtime_ns == made
    (schedule,) = (client.store / "schedules").iterdir()
    assert second.stdout == f"submitted {schedule.name}-2\n"           # the schedule's key, now that its pictures are known
    assert client.run_statuses() == {"A-36": "FINISHED", "photos": "FINISHED"}


@pytest.fixture(scope="class")
def long_client(make_client) -> Client:
    return make_client("long", epochs=LONG)


@pytest.fixture(scope="class")
def both(long_client, tmp_path_factory) -> Iterator[list[str]]:
    """What the two were told; the job trains when a test begins, and is stopped at the end."""
    logs = [tmp_path_factory.mktemp("both") / "log" for _ in range(2)]
    clients = [long_client.submitting("--workers", 2, log=log) for log in logs]
    try:
        codes = [one.wait(120) for one in clients]
        told = [log.read_text() for log in logs]
        assert codes == [0, 0], told
        wait_until(lambda: long_client.store.exists() and iterations_of(long_client) >= 5, timeout_s=JOB_S)
        yield told
    finally:
        for job in json.loads(long_client.jobs("list", "--json").stdout):
            if job["store"] == str(long_client.store) and job["status"] in ("PENDING", "RUNNING"):
                long_client.jobs("stop", job["id"])


class TestWhileAJobRuns:
    """One long job, made by two people who submit at the same moment."""

    def test_two_submissions_at_once_make_one_job(self, both, long_client):
        jobs = [job for job in json.loads(long_client.jobs("list", "--json").stdout) if job["store"] == str(long_client.store)]

        assert [job["status"] for job in jobs] == ["RUNNING"]
        assert sorted(re.findall(r"^(submitted|running) (\S+)$", "".join(both), re.MULTILINE)) == [
            ("running", jobs[0]["id"]), ("submitted", jobs[0]["id"]),
        ]  # fmt: skip

    def test_its_two_workers_are_on_two_nodes(self, both, cluster):
        counts = [sum("RayTrainWorker" in line for line in command_lines(node.namespace)) for node in cluster.nodes]

        assert counts == [1, 1]

    def test_submitting_while_it_runs_says_so_and_starts_nothing(self, both, long_client):
        done = long_client.submit("--workers", 2)

        assert re.search(r"is running already, since .*: nothing was submitted", done.stderr)
        assert f"jobs logs {submitted_id(done)} -f" in done.stderr
        assert done.stdout.startswith("running ") and submitted_id(done) in "".join(both)

    def test_its_variables_are_named_and_their_values_are_not_shown(self, both, long_client, cluster):
        shown = long_client.jobs("show", submitted_id(long_client.submit()), "--json")

        assert "MLFLOW_TRACKING_PASSWORD" in json.loads(shown.stdout)["env"]
        assert cluster.mlflow_password not in shown.stdout and cluster.token not in shown.stdout

    @pytest.mark.parametrize(("number", "code"), [(SIGINT, 130), (SIGKILL, -SIGKILL)])
    def test_it_goes_on_when_the_client_that_follows_it_is_gone(self, both, long_client, tmp_path, number, code):
        follower = long_client.submitting("--follow", log=tmp_path / "log")
        wait_until(lambda: "A-36: epoch" in (tmp_path / "log").read_text(), timeout_s=60)

        follower.send_signal(number)

        assert follower.wait(20) == code
        said = (tmp_path / "log").read_text()
        assert ("goes on without us" in said and "jobs logs" in said and "Traceback" not in said) == (number == SIGINT)
        seen = iterations_of(long_client)
        wait_until(lambda: iterations_of(long_client) > seen + 5, timeout_s=60)


def iterations_of(client: Client) -> int:
    """How far training has come; 0 before there is a stage."""
    return iterations(client.store) if (client.store / "stages").exists() and any((client.store / "stages").iterdir()) else 0


def world_sizes(client: Client) -> list[int]:
    """How many workers each start of training had."""
    rows = (stage_folder(client.store) / "starts.jsonl").read_text().splitlines()
    return [json.loads(row)["world_size"] for row in rows]


def test_a_range_of_workers_goes_on_without_a_node_that_died_and_with_it_when_it_is_back(make_client, cluster, tmp_path):
    client = make_client("elastic", epochs=LONG)
    lost = cluster.nodes[1]
    submitted = client.submit("--workers", "1:2")
    job_id = submitted_id(submitted)
    wait_until(lambda: iterations_of(client) >= 10, timeout_s=JOB_S)
    began = time.monotonic()

    cluster.kill(lost)
    try:
        wait_until(lambda: world_sizes(client)[-1] == 1, timeout_s=120)
        alone_after_s = time.monotonic() - began
        seen = iterations_of(client)
        wait_until(lambda: iterations_of(client) > seen + 10, timeout_s=60)
    finally:
        cluster.join(lost)
    wait_until(lambda: world_sizes(client)[-1] == 2, timeout_s=120)
    seen = iterations_of(client)
    wait_until(lambda: iterations_of(client) > seen + 10, timeout_s=60)
    stopped = client.jobs("stop", job_id)

    assert world_sizes(client) == [2, 1, 2]
    assert alone_after_s < 60, alone_after_s
    assert stopped.stdout == f"{job_id}: stopped\n", stopped.stderr
    rows = map(json.loads, (stage_folder(client.store) / "history.jsonl").read_text().splitlines())
    walked = [row["iteration"] for row in rows if "epoch" not in row]
    assert walked == list(range(1, len(walked) + 1))           # each iteration once, none left out
    assert client.epochs() == list(range(1, len(client.epochs()) + 1))


def test_a_stopped_job_leaves_a_checkpoint_and_a_killed_run_and_submitting_again_finishes_it(make_client):
    client = make_client("stopped", epochs=60)
    job_id = submitted_id(client.submit("--workers", 2))
    wait_until(lambda: iterations_of(client) >= 10, timeout_s=JOB_S)

    stopped = client.jobs("stop", job_id)
    at, checkpoints, statuses = iterations_of(client), client.checkpoints(), client.run_statuses()
    again = client.submit("--workers", 2, "--follow")

    assert (stopped.returncode, stopped.stdout) == (0, f"{job_id}: stopped\n"), stopped.stderr
    assert max(checkpoints) == at                       # nothing that was trained is lost
    assert statuses == {"A-36": "KILLED", "photos": "KILLED"}
    assert again.returncode == 0, again.stderr
    assert f"goes on from {job_id} (stopped)" in again.stderr
    assert client.epochs() == list(range(1, 61))       # none lost, none twice
    assert client.run_statuses() == {"A-36": "FINISHED", "photos": "FINISHED"}


def test_when_the_head_comes_back_after_a_power_cut_submitting_again_finishes(make_client, cluster, tmp_path):
    client = make_client("restart", epochs=60)
    follower = client.submitting("--workers", 2, "--follow", log=tmp_path / "log")
    wait_until(lambda: iterations_of(client) >= 10, timeout_s=JOB_S)

    cluster.restart_ray()
    code = follower.wait(120)
    began = iterations_of(client)
    again = client.submit("--workers", 2, "--follow")

    assert code == 2 and (tmp_path / "log").read_text().splitlines()[-1].startswith("error: "), (tmp_path / "log").read_text()
    assert 10 <= began < 60 * 7
    assert again.returncode == 0, again.stderr
    assert client.epochs() == list(range(1, 61))
    assert client.run_statuses() == {"A-36": "FINISHED", "photos": "FINISHED"}


def test_a_head_that_falls_silent_is_named_and_the_job_is_met_again_when_it_speaks(make_client, cluster, tmp_path):
    client = make_client("silent", epochs=LONG)
    follower = client.submitting("--follow", log=tmp_path / "log")
    wait_until(lambda: "A-36: epoch" in (tmp_path / "log").read_text(), timeout_s=JOB_S)
    job_id = (tmp_path / "log").read_text().split("submitted ")[1].split()[0]
    began = time.monotonic()

    cluster.pause(cluster.head, SIGSTOP)
    try:
        code = follower.wait(60)
        took_s = time.monotonic() - began
    finally:
        cluster.pause(cluster.head, SIGCONT)
    back = client.following(job_id, log=tmp_path / "back")
    wait_until(lambda: "A-36: epoch" in (tmp_path / "back").read_text(), timeout_s=60)
    seen = iterations_of(client)
    wait_until(lambda: iterations_of(client) > seen + 5, timeout_s=60)
    stopped = client.jobs("stop", job_id)

    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert code == 2 and took_s < 40, took_s
    assert last.startswith(f"error: --address {cluster.address}: no Ray head answers (no answer within")
    assert stopped.stdout == f"{job_id}: stopped\n", stopped.stderr
    assert back.wait(30) == 130


def test_submit_for_programs_is_json_and_nothing_else_on_stdout(make_client):
    client = make_client("program", epochs=1)

    done = client.submit("--json")
    attached = client.submit("--json", "--follow")

    assert done.returncode == 0, done.stderr
    job, again = json.loads(done.stdout), json.loads(attached.stdout)
    assert job["fresh"] is True and 10_000 < job["package_bytes"] < 2**20
    assert (job["recipe"], job["pipeline"], job["workers"], job["attempt"]) == ("photos", "", 1, 1)
    assert job["store"] == str(client.store)
    assert job["command"].endswith(f"--tracking {client.cluster.tracking} --stall-limit=600")
    assert (again["id"], again["fresh"], again["status"], again["exit_code"]) == (job["id"], False, "SUCCEEDED", 0)


def test_a_job_that_fails_ends_with_its_own_code_and_its_own_line(make_client):
    client = make_client("failed", epochs=2)
    text = client.recipe.read_text()
    client.recipe.write_text(re.sub(r'root = ".*"', 'root = "/nowhere/pictures"', text))

    done = client.submit("--follow")

    assert done.returncode == 2, done.stderr
    assert "error: /nowhere/pictures: no such folder" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("failed (exit 2)")
    assert client.job(submitted_id_of(done))["exit_code"] == 2


def test_a_job_that_is_killed_is_named_with_its_signal(make_client, cluster, tmp_path):
    client = make_client("killed", epochs=LONG)
    follower = client.submitting("--follow", log=tmp_path / "log")
    wait_until(lambda: iterations_of(client) >= 5, timeout_s=JOB_S)

    os.kill(driver(cluster), SIGKILL)

    assert follower.wait(60) == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert re.fullmatch(r"error: job \S+: was killed by SIGKILL; submit again to go on", last)


def driver(cluster: Cluster) -> int:
    """The process of the one job's command on the head."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes(cluster.head.namespace)}
    (found,) = [pid for pid, line in lines.items() if b"\0deploy\0train\0" in line]
    return found


def test_an_interpreter_that_the_head_has_not_got_is_named(make_client):
    client = make_client("python", epochs=2)

    done = client.submit("--follow", "--python", "/nowhere/python")

    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith("the head has no /nowhere/python; name its interpreter by --python")


def submitted_id_of(done: subprocess.CompletedProcess[str]) -> str:
    """The id on stdout, however the job ended."""
    return done.stdout.split()[1]


def test_an_image_that_the_head_cannot_start_is_named_in_one_line(make_client):
    if shutil.which("podman"):
        pytest.skip("this machine has podman")
    client = make_client("image", epochs=2)

    done = client.submit("--follow", "--image", "registry/vggrow:1")

    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: job \S+: the head cannot start image 'registry/vggrow:1' .*podman must be on every node", last)
    shown = client.job(submitted_id_of(done))
    assert shown["image"] == "registry/vggrow:1" and str(shown["command"]).startswith("python -m deploy train photos.toml")


# fmt: off
WRONG_TOKENS = [
    # environment                                          words of the message
    ({"RAY_AUTH_TOKEN": "wrong"},                          ["refuses the token of RAY_AUTH_TOKEN"]),
    ({"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"},       ["asks for a token", "RAY_AUTH_TOKEN_PATH"]),
    ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, ["RAY_AUTH_TOKEN_PATH=/nowhere/token", "no such file"]),
]
# fmt: on


@pytest.mark.parametrize(("more", "words"), WRONG_TOKENS, ids=["wrong", "none", "no file"])
def test_without_the_right_token_nothing_is_submitted(more, words, make_client, cluster):
    client = make_client("token", epochs=2)

    done = vggrow(*client.submit_words, **{**cluster.secrets, **more})

    refused(done, *words)


def test_a_token_that_others_may_read_is_used_and_warned_of(cluster, tmp_path):
    path = tmp_path / "token"
    path.write_text(cluster.token + "\n")
    path.chmod(0o644)

    done = vggrow("jobs", "list", "--address", cluster.address, RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=str(path))

    assert done.returncode == 0, done.stderr
    assert f"{path}: others may read this token; chmod 600 it" in done.stderr


def test_an_unknown_job_is_named_with_the_nearest_one(make_client):
    client = make_client("nearest", epochs=2)
    known = submitted_id(client.submit("--python", "/nowhere/python"))

    for command in (["show"], ["logs"], ["logs", "-f"], ["stop"]):
        refused(client.jobs(*command, known + "9"), f"no job '{known}9'", f"did you mean '{known}'?")


def test_a_head_that_is_down_or_silent_is_named_within_10_s(make_client, cluster):
    client = make_client("down", epochs=2)
    words = client.submit_words
    at = words.index("--address") + 1
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        for address in (f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{silent.getsockname()[1]}", f"http://{cluster.network}.99:8265"):
            began = time.monotonic()

            done = vggrow(*words[:at], address, *words[at + 1 :], **cluster.secrets)

            refused(done, f"--address {address}", "no Ray head answers", "is the cluster up")
            assert time.monotonic() - began < 10


def test_a_cluster_that_is_up_is_left_alone_by_up(cluster: Cluster):
    before = [command_lines(node.namespace)[:1] for node in cluster.all_nodes]
    said: list[str] = []

    cluster.up(said.append)

    assert said == [f"{cluster.prefix}: is up"]
    assert [command_lines(node.namespace)[:1] for node in cluster.all_nodes] == before


def test_down_clears_what_a_killed_up_has_left():
    script = "from tests.cluster.cluster import Cluster; Cluster('vgx', '10.213.78').up()"
    half = subprocess.Popen([VGGROW[0], "-c", script], env=environment(), start_new_session=True)
    other = Cluster("vgx", "10.213.78")
    try:
        wait_until(lambda: (other.folder / "logs" / f"{other.head.namespace}.log").exists(), timeout_s=60)
        half.send_signal(SIGKILL)
        half.wait()
        assert not other.is_gone()
    finally:
        other.down()

    assert other.is_gone()
