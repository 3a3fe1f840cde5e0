"""deploy/local/up and down on real servers: what they start, what they refuse, and that `down` ends this and only this."""

import json
import os
import random
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from deploy.ticks import Ticks
from tests.deploy.mlflow_server import free_port
from tests.end_to_end.command import wait_until
from tests.end_to_end.conftest import RECIPE
from tests.pipelines.photo_folders import make_photo_folder
from training.store import Store

pytest.importorskip("flask_wtf", reason="the extra server is not installed: no MLflow server with users")

ROOT = Path(__file__).resolve().parents[2]
UP, DOWN = ROOT / "deploy/local/up", ROOT / "deploy/local/down"
BIN = Path(sys.executable).parent
PIPELINE = """
name = "weekly"
recipe = "photos.toml"
[timetable]
cron = "* * * * *"
[run]
address = "127.0.0.1:{ray}"
threads = 1
device = "cpu"
store = "store"
tracking = "http://127.0.0.1:{mlflow}"
"""


class Local:
    """One state folder with ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.ray, self.dashboard, self.mlflow = free_port(), free_port(), free_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "VGGROW_LOCAL": str(self.state),
            "VGGROW_RAY_PORT": str(self.ray),
            "VGGROW_DASHBOARD_PORT": str(self.dashboard),
            "VGGROW_MLFLOW_PORT": str(self.mlflow),
            "VGGROW_RAY_CPUS": "1",
        }

    def run(self, *command: str | Path, timeout_s: int = 280) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def in_env(self, command: str) -> subprocess.CompletedProcess[str]:
        """Runs `command` in a shell that has sourced the state's env file."""
        return self.run("bash", "-c", f". '{self.state}/env' && {command}")

    def ticks(self, pipeline: Path) -> list[str]:
        """What became of each tick of a pipeline that has ended, as its history says."""
        answer = self.in_env(f"vggrow history --json '{pipeline}'")
        assert answer.returncode == 0, answer.stderr
        return [tick["outcome"] for tick in json.loads(answer.stdout) if tick["finished"]]

    def processes(self) -> dict[int, str]:
        """Every live process whose environment names this state folder's marks, with its command line."""
        marks = {f"VGGROW_LOCAL_MARK={path.read_text()}".encode() for path in self.state.glob("*.mark")}
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if marks & set((folder / "environ").read_bytes().split(b"\0")):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:      # it has ended meanwhile
                continue
        return found

    def leader(self, name: str) -> int:
        return int((self.state / f"{name}.pid").read_text().split()[0])


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    made = Local(tmp_path)
    yield made
    made.run(DOWN)


def alive(process: psutil.Process) -> bool:
    """Whether it runs, and is not one that has died and that its parent has not reaped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_that_died_and_was_not_reaped_is_no_leader():
    began = f"VGGROW_LOCAL=/nowhere; . '{ROOT}/deploy/local/common.bash'; began "
    child = subprocess.Popen(["sleep", "60"])
    living = subprocess.run(["bash", "-c", f"{began}{child.pid}"], capture_output=True, text=True)
    child.kill()
    wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, timeout_s=60)

    dead = subprocess.run(["bash", "-c", f"{began}{child.pid}"], capture_output=True, text=True)

    child.wait()
    assert living.stdout.strip().isdigit() and not dead.stdout, (living, dead)


def listening(processes: set[int]) -> list[str]:
    """The addresses on which these processes listen, from /proc."""
    inodes = set()
    for pid in processes:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
            except OSError:
                continue
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:      # 0A: LISTEN
                found.append(fields[1].partition(":")[0])
    return found


def down_leaves_nothing(local: Local) -> None:
    before = local.processes()
    answer = local.run(DOWN)

    assert answer.returncode == 0, answer.stderr
    alive = [pid for pid in before if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert alive == []
    assert not list(local.state.glob("*.pid"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--fast"], "--fast: no such option"), (["nowhere.toml"], "nowhere.toml: no such file; wanted pipelines")],
)
def test_words_that_up_does_not_know_are_refused_before_anything_starts(local, arguments, words):
    answer = local.run(UP, *arguments)

    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ") and words in answer.stderr
    assert not local.state.exists()


def test_down_where_nothing_was_started_is_done_at_once(local):
    answer = local.run(DOWN)

    assert answer.returncode == 0
    assert "nothing runs" in answer.stderr


def test_a_port_that_another_process_holds_is_named(local, mlflow_server):
    local.environment["VGGROW_MLFLOW_PORT"] = mlflow_server.rpartition(":")[2]

    answer = local.run(UP)

    assert answer.returncode == 2
    assert "in use by another process; end it, or set VGGROW_MLFLOW_PORT" in answer.stderr
    assert local.processes() == {}
    assert requests.get(f"{mlflow_server}/health", timeout=5).status_code == 200


def test_a_recorded_pid_that_is_another_process_by_now_is_left_alone(local):
    bystander = subprocess.Popen(["sleep", "100"])
    local.state.mkdir()
    for name in ("ray", "mlflow", "timetable"):
        (local.state / f"{name}.pid").write_text(f"{bystander.pid} 1\n")
        (local.state / f"{name}.mark").write_text("a mark that no process has")

    answer = local.run(DOWN)

    assert answer.returncode == 0
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_up_lets_in_who_has_the_secrets_and_down_ends_all_of_it(local, tmp_path):
    first = local.run(UP)
    assert first.returncode == 0, first.stderr
    started = local.processes()
    ray, mlflow = local.leader("ray"), local.leader("mlflow")

    secrets = [path for path in local.state.iterdir() if path.is_file()]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)
    assert stat.S_IMODE(local.state.stat().st_mode) == 0o700
    words = [path.read_text() for path in secrets if path.name in ("ray_auth_token", "mlflow_password", "flask_secret")]
    assert not [line for line in started.values() if any(word in line for word in words)]      # seen by `ps`

    tracking = f"http://127.0.0.1:{local.mlflow}"
    assert requests.get(f"{tracking}/health", timeout=5).status_code == 200
    listed = local.in_env(f"vggrow models list --json --store '{tmp_path}/store' --tracking {tracking}")
    assert (listed.returncode, json.loads(listed.stdout)) == (0, [])
    stranger = local.run("vggrow", "models", "list", "--store", tmp_path / "store", "--tracking", tracking)
    assert stranger.returncode == 2 and "HTTP 401" in stranger.stderr

    jobs = f"http://127.0.0.1:{local.dashboard}/api/jobs/"
    token = {"Authorization": f"Bearer {(local.state / 'ray_auth_token').read_text()}"}
    assert requests.get(jobs, timeout=20).status_code == 401
    assert requests.get(jobs, headers=token, timeout=20).status_code == 200
    submitted = local.in_env("ray job submit --submission-id trial -- python -c 'print(6 * 7)'")
    assert submitted.returncode == 0 and "\n42\n" in submitted.stdout, submitted.stdout + submitted.stderr
    addresses = listening(set(local.processes()))
    assert len(addresses) >= 4 and set(addresses) <= {"0100007F", "0000000000000000FFFF00000100007F"}

    again = local.run(UP)
    assert again.returncode == 0, again.stderr
    assert (local.leader("ray"), local.leader("mlflow")) == (ray, mlflow)
    assert again.stdout == first.stdout

    server = psutil.Process(mlflow)
    server.kill()
    wait_until(lambda: not alive(server), timeout_s=60)     # not at once
    mended = local.run(UP)      # what died is started again, with the same users; what lives is left alone
    assert mended.returncode == 0, mended.stderr
    assert local.leader("ray") == ray and local.leader("mlflow") != mlflow

    down_leaves_nothing(local)
    assert local.run(DOWN).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pipeline_gets_its_champion_on_the_servers_of_up_and_its_ticks_from_the_timetable(local, tmp_path):
    make_photo_folder(tmp_path / "photos", per_class=20, split=True, size=(48, 72))
    (tmp_path / "photos.toml").write_text(RECIPE.format(root=tmp_path / "photos", epochs=1, every="5min"))
    pipeline = tmp_path / "pipeline.toml"
    pipeline.write_text(PIPELINE.format(ray=local.ray, mlflow=local.mlflow))
    started = local.run(UP)
    assert started.returncode == 0, started.stderr

    stranger = local.run("vggrow", "retrain", pipeline)
    assert stranger.returncode == 2 and "HTTP 401" in stranger.stderr
    trained = local.in_env(f"vggrow retrain '{pipeline}'")
    assert trained.returncode == 0, trained.stderr

    listed = local.in_env(f"vggrow models list --json --store '{tmp_path}/store' --tracking http://127.0.0.1:{local.mlflow}")
    assert [(model["name"], model["aliases"]) for model in json.loads(listed.stdout)] == [("photos", {"champion": "1"})]
    assert local.ticks(pipeline) == ["promoted"]
    assert list(Path((local.state / "ray_folder").read_text().strip()).glob("session_latest/logs/train/*-worker-*"))

    scheduled = local.run(UP, pipeline)      # the servers run already: the timetable alone is started
    assert scheduled.returncode == 0, scheduled.stderr
    recorded = Ticks.of(Store(tmp_path / "store"), "weekly")
    wait_until(lambda: len([tick for tick in recorded.all() if tick.finished]) >= 2, timeout_s=150)
    assert local.ticks(pipeline)[:2] == ["promoted", "nothing new"]

    down_leaves_nothing(local)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_up_killed_at_random_moments_leaves_nothing_that_down_does_not_end(local):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draws = random.Random(seed)

    for _ in range(6):
        up = subprocess.Popen([UP], env=local.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draws.uniform(0.0, 9.0))
        up.kill()
        up.wait()
        down_leaves_nothing(local)

    whole = local.run(UP)
    assert whole.returncode == 0, whole.stderr
    down_leaves_nothing(local)
