"""A real Ray cluster on one machine: nodes are network namespaces on a bridge, with an MLflow server and a shared folder.

Every process of it lives in one of its namespaces, so that `down` finds them all, also after an `up` that was killed.
Needs root and iproute2. Nothing outside the names that begin with its prefix is touched.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests
from filelock import FileLock

BIN = Path(sys.executable).parent
OBJECT_STORE_BYTES = 100 * 10**6
START_S = 240.0
START_TRIES = 3
MLFLOW_USER = "admin"


@dataclass(frozen=True)
class Node:
    """A namespace with one address on the cluster's bridge."""

    namespace: str
    ip: str
    cpus: int


class Cluster:
    """The cluster that a prefix stands for; making the object starts nothing."""

    def __init__(self, prefix: str = "vgc", network: str = "10.213.77", head_cpus: int = 0) -> None:
        """prefix: up to 8 letters and digits, for namespaces, interfaces and the folder; network: three bytes of addresses.

        head_cpus: 1 lets a worker run on the head too, so that three workers are on three nodes.
        """
        assert re.fullmatch(r"[a-z][a-z0-9]{1,7}", prefix), f"{prefix!r}: wanted 2 to 8 letters and digits"
        self.prefix, self.network = prefix, network
        self.folder = Path("/tmp") / prefix               # short: Ray's sockets lie below it, 107 characters at most
        self.bridge = f"{prefix}-br"
        # The head has no CPU for workers unless asked for, each node one: two workers are on two nodes.
        self.head = Node(f"{prefix}-head", f"{network}.10", cpus=head_cpus)
        self.nodes = (Node(f"{prefix}-one", f"{network}.11", cpus=1), Node(f"{prefix}-two", f"{network}.12", cpus=1))
        self.mlflow = Node(f"{prefix}-mlflow", f"{network}.20", cpus=0)

    @property
    def all_nodes(self) -> tuple[Node, ...]:
        """Head, nodes, and the namespace of the MLflow server."""
        return (self.head, *self.nodes, self.mlflow)

    @property
    def address(self) -> str:
        """The head's Jobs API."""
        return f"http://{self.head.ip}:8265"

    @property
    def tracking(self) -> str:
        """The MLflow server."""
        return f"http://{self.mlflow.ip}:5000"

    @property
    def shared(self) -> Path:
        """The folder that all nodes see at the same path."""
        return self.folder / "shared"

    @property
    def token(self) -> str:
        """The token without which no request is answered."""
        return (self.folder / "token").read_text()

    @property
    def mlflow_password(self) -> str:
        """The password of MLflow's admin."""
        return (self.folder / "mlflow_password").read_text()

    @property
    def secrets(self) -> dict[str, str]:
        """What a client has in its environment: the token and MLflow's user."""
        return {
            "RAY_AUTH_TOKEN": self.token,
            "MLFLOW_TRACKING_USERNAME": MLFLOW_USER,
            "MLFLOW_TRACKING_PASSWORD": self.mlflow_password,
        }

    def up(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Starts what is not up; a cluster that is up as a whole is left alone, a part of one is cleared first."""
        with self.lock():
            if self.problems() == []:
                say(f"{self.prefix}: is up")
                return
            self.clear()
            self.make_folder()
            self.make_network()
            self.start_mlflow()               # 13 s, while Ray starts
            self.start_ray()
            wait_for(lambda: not self.problems(), START_S, lambda: f"{self.prefix}: {'; '.join(self.problems())}")
            say(f"{self.prefix}: is up")

    def down(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Ends all processes of the cluster and removes what `up` made; again is harmless."""
        with self.lock():
            self.clear()
        say(f"{self.prefix}: is down")

    def lock(self) -> FileLock:
        """One up or down at a time; the kernel frees it when its holder dies."""
        return FileLock(self.folder.with_suffix(".lock"), timeout=300)

    def problems(self) -> list[str]:
        """What is not as it should be: empty when the cluster is whole."""
        found = []
        if not (self.folder / "token").exists():
            return ["not up"]
        headers = {"Authorization": f"Bearer {self.token}"}
        try:
            answer = requests.get(f"{self.address}/nodes?view=summary", headers=headers, timeout=10)
            states = [node["raylet"].get("state") for node in answer.json()["data"]["summary"]]
            alive = states.count("ALIVE")
            if alive != 1 + len(self.nodes):
                found.append(f"{alive} of {1 + len(self.nodes)} Ray nodes are alive")
        except (requests.RequestException, ValueError, KeyError):
            found.append("the Ray head does not answer")
        try:
            if requests.get(f"{self.tracking}/health", timeout=10).status_code != 200:
                found.append("the MLflow server is ailing")
        except requests.RequestException:
            found.append("the MLflow server does not answer")
        return found

    def make_folder(self) -> None:
        """The folder with secrets readable by root alone."""
        for name in ("shared", "logs", "ray", "mlflow"):
            (self.folder / name).mkdir(parents=True)
        for name in ("mlflow_password", "token"):       # the token last: it says that there is something
            path = self.folder / name
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(16))

    def make_network(self) -> None:
        """A bridge on this machine, which is the client's own address there, and a cable to each namespace."""
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.network}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for number, node in enumerate(self.all_nodes):
            cable = f"{self.prefix}-v{number}"
            ip("netns", "add", node.namespace)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", node.namespace)
            ip("link", "set", cable, "master", self.bridge, "up")
            ip("-n", node.namespace, "addr", "add", f"{node.ip}/24", "dev", "eth0")
            ip("-n", node.namespace, "link", "set", "eth0", "up")
            ip("-n", node.namespace, "link", "set", "lo", "up")

    def start_ray(self) -> None:
        """The head, then the nodes."""
        self.start_node(self.head, "--head", "--port=6379", "--dashboard-host=0.0.0.0", "--dashboard-port=8265")
        for node in self.nodes:
            self.start_node(node, f"--address={self.head.ip}:6379")

    def start_node(self, node: Node, *words: str) -> None:
        """`ray start` on a node, as a supervisor would call it: its temporary folder is the node's own.

        Again where it fails: Ray 2.60's raylet dies when its agents have not told their ports within 15 s, which on a machine
        that is full their imports alone take.
        """
        command = [
            str(BIN / "ray"), "start", *words, f"--node-ip-address={node.ip}", f"--num-cpus={node.cpus}", "--num-gpus=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={self.folder / 'ray' / node.namespace}",
            "--disable-usage-stats",
        ]  # fmt: skip
        for left in reversed(range(START_TRIES)):
            started = self.start(node, command, node.namespace)
            if started.process.wait(START_S) == 0:
                return
            assert left, started.log.read_text()[-3000:]
            self.kill(node)

    def start_mlflow(self) -> None:
        """An MLflow server that asks for a password and hands artifacts through."""
        folder = self.folder / "mlflow"
        settings = folder / "basic_auth.ini"
        settings.write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{folder}/users.db\nadmin_username = {MLFLOW_USER}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        command = [
            str(BIN / "mlflow"), "server", "--app-name", "basic-auth", "--workers", "1",
            "--host", self.mlflow.ip, "--port", "5000",
            "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
        ]  # fmt: skip
        self.start(
            self.mlflow,
            command,
            "mlflow",
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            MLFLOW_DISABLE_TELEMETRY="true",
            MLFLOW_AUTH_CONFIG_PATH=str(settings),
            MLFLOW_AUTH_ADMIN_PASSWORD=self.mlflow_password,
            MLFLOW_FLASK_SERVER_SECRET_KEY=secrets.token_hex(16),
        )

    def start(self, node: Node, command: list[str], log: str, **more: str) -> "Started":
        """A command on a node, with a bare environment: no path of this project, so what a job needs must be packed."""
        path = self.folder / "logs" / f"{log}.log"
        environment = {
            "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": os.environ.get("HOME", "/root"),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        } | more
        with path.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", node.namespace, *command],
                cwd=self.folder, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        return Started(process, path)

    def kill(self, node: Node) -> None:
        """SIGKILL to every process of a node, as when its power fails."""
        while found := processes(node.namespace):
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def pause(self, node: Node, number: signal.Signals) -> None:
        """SIGSTOP: the node answers nothing, as when its cable is pulled; SIGCONT: it is there again."""
        for pid in processes(node.namespace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def announce_loss(self, node: Node, in_s: int) -> None:
        """Ray's preemption notice: this node will be taken away in so many seconds. The taking is left to `kill`."""
        command = [
            str(BIN / "ray"), "drain-node", f"--address={self.head.ip}:6379", f"--node-id={self.node_id(node)}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={in_s}",
        ]  # fmt: skip
        self.start(self.head, command, "drain").wait_well()

    def node_id(self, node: Node) -> str:
        """Ray's hexadecimal id of the node that is alive at its address."""
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = requests.get(f"{self.address}/nodes?view=summary", headers=headers, timeout=60)
        raylets = [one["raylet"] for one in answer.json()["data"]["summary"] if one["ip"] == node.ip]
        (found,) = [raylet["nodeId"] for raylet in raylets if raylet.get("state") == "ALIVE"]
        return str(found)

    def join(self, node: Node) -> None:
        """Starts Ray on a node whose power had failed, and waits until the head counts it."""
        self.start_node(node, f"--address={self.head.ip}:6379")
        wait_for(lambda: not self.problems(), START_S, lambda: f"{self.prefix}: {'; '.join(self.problems())}")

    def restart_ray(self) -> None:
        """The head's power fails and comes back; without a fault-tolerant GCS the nodes start anew too."""
        for node in (self.head, *self.nodes):
            self.kill(node)
        self.start_ray()
        wait_for(lambda: not self.problems(), START_S, lambda: f"{self.prefix}: {'; '.join(self.problems())}")

    def clear(self) -> None:
        """Ends and removes all that goes by the prefix, however far `up` had come."""
        existing = set(namespaces())
        for node in self.all_nodes:
            if node.namespace in existing:
                self.kill(node)
                ip("netns", "del", node.namespace)       # its end of the cable goes, and with it the other one
        if (Path("/sys/class/net") / self.bridge).exists():
            ip("link", "del", self.bridge)
        for number, _ in enumerate(self.all_nodes):
            if (Path("/sys/class/net") / f"{self.prefix}-v{number}").exists():
                ip("link", "del", f"{self.prefix}-v{number}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_gone(self) -> bool:
        """Whether nothing of it is left: no namespace, and so no process; no bridge, no folder."""
        spaces = {node.namespace for node in self.all_nodes} & set(namespaces())
        return not spaces and not (Path("/sys/class/net") / self.bridge).exists() and not self.folder.exists()

    def status(self) -> str:
        """The state in words, with what a client needs to know."""
        problems = self.problems()
        if problems:
            return f"{self.prefix}: {'; '.join(problems)}"
        lines = [
            f"{self.prefix}: is up",
            f"Jobs API  {self.address}        RAY_AUTH_TOKEN_PATH={self.folder / 'token'}",
            f"MLflow    {self.tracking}        user {MLFLOW_USER}, password in {self.folder / 'mlflow_password'}",
            f"shared    {self.shared}",
            *(f"{node.namespace:<12} {node.ip:<14} {len(processes(node.namespace))} processes" for node in self.all_nodes),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Started:
    """A command that was started on a node, and where its words go."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_well(self) -> None:
        """Waits until it has ended; AssertionError with its words unless it ended well."""
        code = self.process.wait(START_S)
        assert code == 0, self.log.read_text()[-3000:]


def ip(*words: str) -> str:
    """iproute2's command; its stdout."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


def namespaces() -> list[str]:
    """The names of all network namespaces of this machine."""
    return [one["name"] for one in json.loads(ip("-j", "netns", "list") or "[]")]


def processes(namespace: str) -> list[int]:
    """The ids of the processes in a namespace."""
    return [int(word) for word in ip("netns", "pids", namespace).split()]


def command_lines(namespace: str) -> list[str]:
    """What the processes in a namespace are called."""
    found = []
    for pid in processes(namespace):
        with contextlib.suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float, words: Callable[[], str]) -> None:
    """Waits until the condition holds; AssertionError with the words when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s: {words()}"
        time.sleep(0.2)


def main() -> None:
    """up, down or status of the cluster whose prefix is VGGROW_CLUSTER."""
    if sys.argv[1:] not in (["up"], ["down"], ["status"]):
        sys.exit("usage: python -m tests.cluster up|down|status")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("network namespaces need root and iproute2 (apt-get install iproute2)")
    cluster = Cluster(os.environ.get("VGGROW_CLUSTER", "vgc"))

    def say(words: str) -> None:
        sys.stdout.write(words + "\n")

    if sys.argv[1] == "up":
        cluster.up(say)
        say(cluster.status())
    elif sys.argv[1] == "down":
        cluster.down(say)
    else:
        say(cluster.status())
