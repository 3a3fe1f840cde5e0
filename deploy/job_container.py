"""A job in a container: what Ray is asked for, and a command that brings its few files along; Ray mounts no package there.

Ray 2.60 takes neither a working_dir beside an image nor, with `image_uri`, any folder of the nodes but its own. Its older
field `container` takes podman's options, and so the store and the pictures can be mounted.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.job_order import command_line
from deploy.job_package import JobFiles
from deploy.pipeline_file import Pipeline
from vggcore.errors import ClusterError
from vggcore.recipe import load_recipe

PYTHON = "python"                    # in the image: what Ray itself calls there
LONGEST_COMMAND = 100 * 2**10        # characters; Linux takes 128 KiB as one word of a command


def mounted_folders(recipe: Path, store: str, pipeline: Pipeline | None) -> list[str]:
    """What podman mounts: the store, and the pictures and watched folders read-only. RecipeError for the recipe."""
    root = load_recipe(recipe).data.root
    watched = pipeline.watch.folders if pipeline is not None else ()
    readable = sorted({str(folder) for folder in (root, *watched) if folder is not None} - {store})
    return [f"{store}:{store}", *(f"{folder}:{folder}:ro" for folder in readable)]


def container(image: str, mounts: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Ray's runtime_env for an image. ClusterError for what Ray's unquoted command lines would break."""
    for mount in mounts:
        if mount.removesuffix(":ro").count(":") != 1:
            raise ClusterError(f"--image: {mount}: podman mounts no folder that has a colon in its path; rename it")
    for name, value in env.items():
        if "'" in value:
            raise ClusterError(f"--env {name}: its value holds a ', which Ray does not bring into a container; choose another")
    options = [word for mount in mounts for word in ("-v", shlex.quote(mount))]
    return {"container": {"image": image, "run_options": options}}


def container_command(files: JobFiles, words: Sequence[str], *, python: str | None = None) -> str:
    """A command that first writes its files, in an empty folder of the container. ClusterError when they are too long."""
    lines = ['cd "$(mktemp -d)" &&']
    for name, text in files.texts.items():
        if "/" in name:
            lines.append(f"mkdir -p {shlex.quote(str(Path(name).parent))} &&")
        lines.append(f"printf %s {shlex.quote(text)} > {shlex.quote(name)} &&")
    whole = "\n".join([*lines, command_line(python or PYTHON, words)])
    if len(whole.encode()) > LONGEST_COMMAND:
        raise ClusterError(
            f"{files.main}: too long for a job in a container ({len(whole.encode()) // 2**10} KiB, at most"
            f" {LONGEST_COMMAND // 2**10}); put it into the image or on the shared folder, and leave comments out"
        )
    return whole
