"""The Kubernetes manifests and the Dockerfile, by what the repository itself holds: there is no cluster to ask here."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from deploy.pipeline_file import load_pipeline
from tests.deploy.typed_commands import parse
from training.worker_count import most
from vggcore.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
USER = 10001


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file/kind, object) of every manifest."""
    for path in sorted(FOLDER.glob("*.yaml")):
        for found in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield f"{path.stem}/{found['kind']}", found


def below(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside a value, with its place."""
    yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from below(one, f"{place}.{key}")


OBJECTS = dict(objects())
PODS = {
    f"{name}{place}": value
    for name, found in OBJECTS.items()
    for place, value in below(found)
    if isinstance(value, dict) and "containers" in value
}
CONTAINERS = {f"{name}.{one['name']}": one for name, pod in PODS.items() for one in pod["containers"]}
RAY_SPECS = {
    name: value
    for name, found in OBJECTS.items()
    for _, value in below(found)
    if isinstance(value, dict) and "headGroupSpec" in value
}


def test_all_the_kinds_that_are_promised_are_there():
    kinds = {found["kind"] for found in OBJECTS.values()}

    assert kinds == {
        "RayCluster", "RayJob", "RayCronJob", "CronJob", "Deployment", "Service", "PersistentVolumeClaim", "ConfigMap",
    }  # fmt: skip
    assert len(PODS) == 2 + 3 + 3 + 1 + 1 and len(RAY_SPECS) == 3


@pytest.mark.parametrize("name", OBJECTS)
def test_each_object_has_its_version_and_a_name(name):
    versions = {"Deployment": "apps/v1", "CronJob": "batch/v1"}
    found = OBJECTS[name]
    wanted = "ray.io/v1" if found["kind"].startswith("Ray") else versions.get(found["kind"], "v1")

    assert found["apiVersion"] == wanted
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", found["metadata"]["name"])
    assert set(found) <= {"apiVersion", "kind", "metadata", "spec", "data"}


@pytest.mark.parametrize("name", PODS)
def test_no_pod_runs_as_root(name):
    security = PODS[name]["securityContext"]

    assert security["runAsNonRoot"] is True
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (USER, USER, USER)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(PODS[name])


@pytest.mark.parametrize("name", PODS)
def test_only_the_head_whose_autoscaler_asks_for_pods_has_a_token_of_kubernetes(name):
    assert PODS[name].get("automountServiceAccountToken") is (None if "headGroupSpec" in name else False)


@pytest.mark.parametrize("name", CONTAINERS)
def test_each_container_is_held_in_and_writes_to_its_volumes_alone(name):
    container = CONTAINERS[name]
    pod = next(pod for pod in PODS.values() if any(one is container for one in pod["containers"]))
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}

    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"/tmp", "/home/vggrow"} <= set(mounts)
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", CONTAINERS)
def test_each_container_says_what_it_needs_and_what_it_may_take(name):
    resources = CONTAINERS[name]["resources"]

    for kind in ("requests", "limits"):
        assert {"cpu", "memory"} <= set(resources[kind])


LASTING = [name for name in CONTAINERS if not name.endswith((".submit", ".ray-job-submitter"))]


@pytest.mark.parametrize("name", LASTING)
def test_each_container_that_stays_is_probed_on_a_port_that_it_names(name):
    ports = {port["name"] for port in CONTAINERS[name]["ports"]}

    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINERS[name][probe]["httpGet"]["port"] in ports


def test_rays_probes_are_addresses_that_ray_answers_without_the_token():
    import ray.dashboard.http_server_agent as agent
    import ray.dashboard.http_server_head as head

    answered = Path(agent.__file__).read_text(encoding="utf-8"), Path(head.__file__).read_text(encoding="utf-8")

    for name in LASTING:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = CONTAINERS[name][probe]["httpGet"]
            if asked["port"] in ("agent", "dashboard"):
                assert f'"{asked["path"]}",' in answered[asked["port"] == "dashboard"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_no_secret_stands_in_a_manifest(name):
    for variable in CONTAINERS[name].get("env", ()):
        if re.search(r"TOKEN$|PASSWORD|SECRET|USERNAME", variable["name"]):
            assert "value" not in variable
            assert set(variable["valueFrom"]["secretKeyRef"]) == {"name", "key"}


def test_there_is_no_secret_object_and_the_how_to_makes_each_key_that_is_asked_for():
    how_to = (ROOT / "docs/how-to/kubernetes.md").read_text(encoding="utf-8")
    references = {
        (value["secretKeyRef"]["name"], value["secretKeyRef"]["key"])
        for found in OBJECTS.values()
        for _, value in below(found)
        if isinstance(value, dict) and "secretKeyRef" in value
    }
    made = {
        (name, key)
        for name, rest in re.findall(r"kubectl create secret generic (\S+)((?:.*\\\n)*.*)", how_to)
        for key in re.findall(r"--from-(?:literal|file)=([\w-]+)=", rest)
    }

    assert references == made == {
        ("vggrow-ray", "auth_token"), ("vggrow-mlflow", "username"), ("vggrow-mlflow", "password"),
        ("vggrow-mlflow", "flask-secret-key"),
    }  # fmt: skip


@pytest.mark.parametrize("name", RAY_SPECS)
def test_no_ray_cluster_stands_open(name):
    spec = RAY_SPECS[name]
    by_operator = spec.get("authOptions") == {"mode": "token", "secretName": "vggrow-ray"}
    containers = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    environments = [group["template"]["spec"]["containers"][0]["env"] for group in containers]
    if "autoscalerOptions" in spec:
        environments.append(spec["autoscalerOptions"]["env"])

    for environment in environments:
        names = {variable["name"] for variable in environment}
        assert by_operator != ({"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= names)


@pytest.mark.parametrize("name", RAY_SPECS)
def test_head_and_workers_see_one_store_at_one_path_and_the_head_trains_nothing(name):
    spec = RAY_SPECS[name]
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    stores = set()
    for pod in pods:
        (claim,) = (volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume)
        (mount,) = (one["mountPath"] for one in pod["containers"][0]["volumeMounts"] if one["name"] == claim)
        environment = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
        stores.add((mount, environment["VGGROW_STORE"]))

    assert len(stores) == 1
    assert all(Path(store).is_relative_to(mount) for mount, store in stores)
    assert OBJECTS["store/PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def vggrow_lines() -> dict[str, list[str]]:
    """Every `vggrow ...` command in the manifests, as words."""
    found = {}
    for name, one in OBJECTS.items():
        for place, value in below(one):
            if place.endswith(".entrypoint"):
                found[name] = shlex.split(value)
            if place.endswith(".command") and "vggrow" in value:
                found[name] = value[value.index("vggrow") :]
    return found


def test_every_vggrow_command_is_one_that_vggrow_takes():
    lines = vggrow_lines()

    assert set(lines) == {"ray-job/RayJob", "ray-cron-job/RayCronJob", "cron-job/CronJob"}
    for words in lines.values():
        parse(words)
    assert lines["ray-cron-job/RayCronJob"] == lines["cron-job/CronJob"] == ["vggrow", "retrain", "/etc/vggrow/pipeline.toml"]


def test_an_option_that_train_does_not_have_is_refused_by_that_check():
    with pytest.raises(click.UsageError, match="--wrokers"):
        parse(["vggrow", "train", "/etc/vggrow/pets.toml", "--wrokers", "4"])
    with pytest.raises(click.UsageError, match="no such command"):
        parse(["vggrow", "trian", "/etc/vggrow/pets.toml"])


def test_the_training_job_asks_for_no_more_than_its_cluster_has():
    words = vggrow_lines()["ray-job/RayJob"]
    workers, threads = (int(words[words.index(option) + 1]) for option in ("--workers", "--threads"))
    (group,) = RAY_SPECS["ray-job/RayJob"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]

    assert workers <= group["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert threads <= int(limits["cpu"])
    assert words[words.index("--device") + 1] == "cuda"


@pytest.mark.parametrize("name", ["ray-job/RayJob", "ray-cron-job/RayCronJob", "cron-job/CronJob"])
def test_a_job_that_is_stopped_has_the_time_for_its_checkpoint(name):
    settings = next(
        yaml.safe_load(value.removeprefix("--runtime-env-json="))
        for _, value in below(OBJECTS[name])
        if isinstance(value, str) and "RAY_JOB_STOP_SIGNAL" in value
    )["env_vars"]

    assert settings == {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}


def test_files_that_commands_name_are_in_the_config_and_are_what_they_should_be(tmp_path):
    data = OBJECTS["config/ConfigMap"]["data"]
    named = {Path(word).name for words in vggrow_lines().values() for word in words if word.startswith("/etc/vggrow/")}
    pipeline = tomllib.loads(data["pipeline.toml"])

    assert named <= set(data)
    recipe = parse_recipe(data["pets.toml"], place="pets.toml", folder=tmp_path)
    assert pipeline["recipe"] == "pets.toml" and str(recipe.data.root) in pipeline["watch"]["folders"]
    head = RAY_SPECS["ray-cron-job/RayCronJob"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    environment = {one["name"]: one.get("value") for one in head["env"]}
    assert (pipeline["run"]["store"], pipeline["run"]["tracking"]) == (
        environment["VGGROW_STORE"],
        environment["MLFLOW_TRACKING_URI"],
    )


def test_a_tick_of_the_pipeline_in_the_config_finds_room_on_each_cluster_that_runs_it(tmp_path):
    for name, text in OBJECTS["config/ConfigMap"]["data"].items():
        (tmp_path / name).write_text(text)

    run = load_pipeline(tmp_path / "pipeline.toml").run

    assert run.address == "auto" and run.threads is not None
    for name in ("ray-cron-job/RayCronJob", "ray-cluster/RayCluster"):
        (group,) = RAY_SPECS[name]["workerGroupSpecs"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert most(run.workers) <= group["maxReplicas"]
        assert run.threads <= int(limits["cpu"])


def test_names_meet_secrets_services_and_claims():
    claims = {one["metadata"]["name"] for one in OBJECTS.values() if one["kind"] == "PersistentVolumeClaim"}
    configs = {one["metadata"]["name"] for one in OBJECTS.values() if one["kind"] == "ConfigMap"}
    service, server = OBJECTS["mlflow/Service"], OBJECTS["mlflow/Deployment"]

    for pod in PODS.values():
        for volume in pod["volumes"]:
            assert volume.get("persistentVolumeClaim", {"claimName": "vggrow-store"})["claimName"] in claims
            assert volume.get("configMap", {"name": "vggrow-config"})["name"] in configs
    assert service["spec"]["selector"].items() <= server["spec"]["template"]["metadata"]["labels"].items()
    assert server["spec"]["selector"]["matchLabels"] == server["spec"]["template"]["metadata"]["labels"]
    addresses = {value for one in OBJECTS.values() for _, value in below(one) if value == "http://vggrow-mlflow:5000"}
    assert addresses == {f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"}
    submits = OBJECTS["cron-job/CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert f"--address=http://{OBJECTS['ray-cluster/RayCluster']['metadata']['name']}-head-svc:8265" in submits


def test_mlflows_command_has_options_that_mlflow_has():
    from mlflow.cli import server

    command = CONTAINERS["mlflow/Deployment.spec.template.spec.mlflow"]["command"]

    assert command[:2] == ["mlflow", "server"]
    server.make_context("server", command[2:])


def test_image_user_and_versions_are_those_of_the_dockerfile():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (ray,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert {one["image"] for one in CONTAINERS.values()} == {f"vggrow:{project['version']}"}
    assert f"docker build --tag vggrow:{project['version']} ." in DOCKERFILE
    assert {spec["rayVersion"] for spec in RAY_SPECS.values()} == {ray}
    assert f"USER {USER}:{USER}" in DOCKERFILE and f"useradd --uid {USER} --gid {USER}" in DOCKERFILE
    assert set(re.findall(r"^WORKDIR (/home/\S+)", DOCKERFILE, flags=re.MULTILINE)) == {"/home/vggrow"}


def test_the_dockerfile_installs_all_that_the_project_needs_and_copies_what_is_there(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (script,) = re.findall(r'^RUN \["python", "-c", ("import tomllib.*")\]$', DOCKERFILE, flags=re.MULTILINE)
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())

    subprocess.run([sys.executable, "-c", json.loads(script)], cwd=tmp_path, check=True)

    needed = (tmp_path / "needed.txt").read_text(encoding="utf-8").splitlines()
    assert needed == [*project["dependencies"], *project["optional-dependencies"]["server"]]
    assert any(line.startswith("mlflow[auth]") for line in needed)      # the Deployment's --app-name=basic-auth
    allowed = re.findall(r"^!([\w.]+?)/?$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE)
    copied = [word for line in re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, flags=re.MULTILINE) for word in line.split()]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)
    assert (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()[1] == "*"


def test_check_finds_a_typing_error_and_passes_what_is_right(tmp_path):
    command = [sys.executable, FOLDER / "check.py"]
    closed = {"type": "object", "additionalProperties": False}
    schema = {**closed, "properties": {key: {} for key in ("apiVersion", "kind", "metadata", "spec")}}

    (tmp_path / "RayJob.v1.schema.json").write_text(json.dumps(schema))
    accepted = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    del schema["properties"]["spec"]
    (tmp_path / "RayJob.v1.schema.json").write_text(json.dumps(schema))
    refused = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    nowhere = subprocess.run([*command, tmp_path / "none"], capture_output=True, text=True)

    assert accepted.returncode == 0 and "ray-job.yaml: RayJob: accepted" in accepted.stdout
    assert refused.returncode == 2 and "'spec' was unexpected" in refused.stderr
    assert nowhere.returncode == 2 and nowhere.stderr.startswith("error: wanted one argument")
