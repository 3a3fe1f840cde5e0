"""Checks the manifests beside this file against KubeRay's own schemas: python deploy/kubernetes/check.py SCHEMA_FOLDER.

SCHEMA_FOLDER holds RayCluster.v1.schema.json, RayJob.v1.schema.json and RayCronJob.v1.schema.json: the openAPIV3Schema of
KubeRay's custom resource definitions, closed for unknown fields. Of Deployment and CronJob the pod is checked, against the
schema of pods inside RayCluster's. Other kinds are named and passed over.
Exit: 0 all accepted, 2 something was not (one line each on stderr).
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

HERE = Path(__file__).resolve().parent


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, object) of every object beside this file, in order."""
    for path in sorted(HERE.glob("*.yaml")):
        for found in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield path.name, found


def schema_for(found: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Any]] | None:
    """(what is checked, its schema): the object itself, or its pod; None where there is no schema."""
    path = folder / f"{found['kind']}.{found['apiVersion'].rpartition('/')[2]}.schema.json"
    if path.is_file():
        return found, json.loads(path.read_text(encoding="utf-8"))
    pods = {"Deployment": ("spec",), "CronJob": ("spec", "jobTemplate", "spec")}
    cluster = folder / "RayCluster.v1.schema.json"
    if found["kind"] not in pods or not cluster.is_file():
        return None
    for key in pods[found["kind"]]:
        found = found[key]
    head = json.loads(cluster.read_text(encoding="utf-8"))["properties"]["spec"]["properties"]["headGroupSpec"]
    return found["template"], head["properties"]["template"]


def complaints(found: Any, schema: dict[str, Any]) -> list[str]:
    """What the schema has against an object, each with its place."""
    errors = sorted(Draft202012Validator(schema).iter_errors(found), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message[:200]}" for error in errors]


def main(arguments: list[str]) -> int:
    """Checks them all; the exit code."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write("error: wanted one argument, the folder with KubeRay's *.v1.schema.json\n")
        return 2
    wrong = checked = 0
    for name, found in manifests():
        pair = schema_for(found, Path(arguments[0]))
        if pair is None:
            sys.stdout.write(f"{name}: {found['kind']}: no schema there; passed over\n")
            continue
        checked += 1
        said = complaints(*pair)
        wrong += len(said)
        for line in said:
            sys.stderr.write(f"{name}: {found['kind']}: {line}\n")
        if not said:
            sys.stdout.write(f"{name}: {found['kind']}: accepted\n")
    if not checked:
        sys.stderr.write(f"error: {arguments[0]}: no schema for any of the kinds here\n")
    return 2 if wrong or not checked else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
