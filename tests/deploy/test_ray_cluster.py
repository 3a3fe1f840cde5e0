"""The two cluster files are what Ray's own validator accepts, and the files and limits they name are there."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.typed_commands import parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    """The file as read anew."""
    loaded = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def rename(table: dict[str, Any], name: str, wrong: str) -> None:
    table[wrong] = table.pop(name)


def test_rays_validator_accepts_the_cluster(cluster):
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize(
    ("place", "name", "wrong"),
    [
        ((), "idle_timeout_minutes", "idle_timeout_minute"),
        ((), "setup_commands", "setup_command"),
        ((), "file_mounts", "file_mount"),
        (("available_node_types", "gpu_worker"), "min_workers", "min_worker"),
        (("auth",), "ssh_user", "ssh_usr"),
    ],
)
def test_a_typing_error_in_a_key_is_refused(cluster, place, name, wrong):
    table = cluster
    for part in place:
        table = table[part]
    rename(table, name, wrong)

    with pytest.raises(ValidationError, match=f"'{wrong}' was unexpected"):
        validate_config(prepare_config(cluster))


def test_a_value_of_the_wrong_type_is_refused(cluster):
    cluster["available_node_types"]["gpu_worker"]["resources"]["GPU"] = "one"

    with pytest.raises(ValidationError, match="'one' is not of type 'integer'"):
        validate_config(prepare_config(cluster))


def test_more_workers_at_least_than_at_most_are_refused(cluster):
    cluster["available_node_types"]["gpu_worker"]["min_workers"] = cluster["max_workers"] + 1

    with pytest.raises(ValueError, match="smaller than the sum of `min_workers`"):
        validate_config(prepare_config(cluster))


def test_a_head_of_no_known_type_is_refused(cluster):
    cluster["head_node_type"] = "haed"

    with pytest.raises(ValueError, match="`head_node_type` must be one of"):
        validate_config(prepare_config(cluster))


def test_the_head_trains_nothing_and_each_worker_has_a_gpu(cluster):
    head, worker = (cluster["available_node_types"][name] for name in ("head", "gpu_worker"))

    assert head["resources"] == {"CPU": 0}
    assert worker["resources"]["GPU"] == 1
    assert 0 <= worker["min_workers"] <= worker["max_workers"] <= cluster["max_workers"]


def test_the_nodes_install_this_project_with_the_tried_versions(cluster):
    (project,) = (remote for remote, local in cluster["file_mounts"].items() if local == ".")
    (install,) = (line for line in cluster["setup_commands"] if "pip install" in line)
    (constraints,) = re.findall(r"-c ~/(\S+)", install)

    assert project == "/home/ubuntu/vggrow"
    assert "-e ~/vggrow " in install
    assert (ROOT / Path(constraints).relative_to("vggrow")).is_file()


def test_the_store_lies_on_the_file_system_that_every_node_mounts(cluster):
    commands = "\n".join(cluster["setup_commands"])
    (store,) = re.findall(r"VGGROW_STORE=(\S+?)'", commands)
    (mounted,) = re.findall(r"amazonaws\.com:/ (\S+)", commands)

    assert Path(store).is_relative_to(mounted)


@pytest.fixture
def on_premises() -> dict[str, Any]:
    """The variant for machines that are there already, as read anew."""
    loaded = yaml.safe_load((ROOT / "deploy/clusters/on-premises.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def test_rays_validator_accepts_the_cluster_on_premises(on_premises):
    prepared = prepare_config(on_premises)

    validate_config(prepared)
    (workers,) = prepared["available_node_types"].values()
    assert workers["min_workers"] == workers["max_workers"] == len(on_premises["provider"]["worker_ips"])


def test_a_typing_error_in_a_key_on_premises_is_refused(on_premises):
    rename(on_premises["provider"], "worker_ips", "worker_ip")

    with pytest.raises(click.ClickException, match="`head_ip` and list of `worker_ips`"):
        prepare_config(on_premises)


def test_an_unknown_key_on_premises_is_refused(on_premises):
    rename(on_premises, "setup_commands", "setup_command")

    with pytest.raises(ValidationError, match="'setup_command' was unexpected"):
        validate_config(prepare_config(on_premises))


def every(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "deploy/clusters/on-premises.yaml"])
def test_every_start_of_ray_asks_for_the_token_at_normal_priority(name):
    cluster = every(name)
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]

    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command and "RAY_worker_niceness=0" in command
    assert any(remote.endswith("/.ray/auth_token") for remote in cluster["file_mounts"])
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "deploy/clusters/on-premises.yaml"])
def test_commands_are_words_that_bash_understands(name):
    cluster = every(name)
    kinds = ("setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands")
    commands = [command for kind in (*kinds, "worker_start_ray_commands") for command in cluster[kind]]

    for command in commands:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}: {checked.stderr}"


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "deploy/clusters/on-premises.yaml"])
def test_the_commands_in_the_comments_are_ones_that_vggrow_takes(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    trained = re.findall(r"'(vggrow train [^']+)'", text)
    submitted = re.findall(r"^#   (vggrow submit .*(?:\n#       .*)*)", text, flags=re.MULTILINE)

    assert trained and submitted
    for line in (*trained, *(words.replace("\n#", " ") for words in submitted)):
        parse(shlex.split(line))


def test_the_store_on_premises_lies_in_the_folder_that_must_be_mounted(on_premises):
    commands = "\n".join(on_premises["setup_commands"])
    (store,) = re.findall(r"VGGROW_STORE=(\S+?)'", commands)
    (mounted,) = re.findall(r"mountpoint -q (\S+)", commands)

    assert Path(store).is_relative_to(mounted)


@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")
def test_a_machine_on_premises_gives_ray_the_address_by_which_ssh_came_and_torch_the_card_that_has_it(on_premises, tmp_path):
    ray = tmp_path / "venv/bin/ray"
    ray.parent.mkdir(parents=True)
    ray.write_text('#!/bin/sh\necho "$@" GLOO=$GLOO_SOCKET_IFNAME V2=$RAY_enable_autoscaler_v2 MODE=$RAY_AUTH_MODE\n')
    ray.chmod(0o755)
    # What is there when `ray up` and the head's autoscaler run the commands: 192.0.2.9 has come to 127.0.0.1.
    place = {"HOME": str(tmp_path), "SSH_CONNECTION": "192.0.2.9 51234 127.0.0.1 22", "RAY_HEAD_IP": "192.0.2.1"}
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "RAY_enable_autoscaler_v2": "1", **place}

    head, worker = (
        subprocess.run(["bash", "-c", on_premises[name][-1]], env=environment, capture_output=True, text=True).stdout
        for name in ("head_start_ray_commands", "worker_start_ray_commands")
    )

    assert "--head" in head and "--node-ip-address=127.0.0.1 --port=6379" in head and " V2=0 MODE=token" in head
    assert "--address=192.0.2.1:6379 --node-ip-address=127.0.0.1 " in worker and " GLOO=lo " in worker
    assert "MODE=token" in worker
