"""What a job takes along: one zip with its files and our packages, or with a folder of the user's; the same bits each time."""

import importlib.metadata
import io
import json
import os
import re
import shutil
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

import deploy
from deploy.pipeline_file import Pipeline
from training.worker_count import workers_text
from vggcore.errors import ClusterError, RecipeError
from vggcore.recipe import Recipe, load_recipe, parse_recipe

if TYPE_CHECKING:
    from ray._private.thirdparty.pathspec import PathSpec

PACKAGES = ("vggcore", "pipelines", "training", "deploy")
LIMIT_BYTES = 512 * 2**20                      # Ray's own, of one gRPC message
NEVER = (".git/", ".venv/", "venv/", "__pycache__/")      # Ray's RAY_RUNTIME_ENV_DEFAULT_EXCLUDES
SAME_DATE = (1980, 1, 1, 0, 0, 0)              # zip's first: equal files give an equal zip, which Ray uploads once
IGNORES = (".gitignore", ".rayignore")


@dataclass(frozen=True)
class JobFiles:
    """The files that a job's command reads, as they travel."""

    main: str                        # the recipe's or the pipeline file's path in the package
    texts: Mapping[str, str]         # path in the package -> content


@dataclass(frozen=True)
class Package:
    """A zip beside nothing else in its folder."""

    path: Path
    files: int

    @property
    def bytes(self) -> int:
        """The size that travels."""
        return self.path.stat().st_size


def recipe_files(recipe: Path, working_dir: Path | None = None) -> JobFiles:
    """A recipe that is to be trained, its [data] root made absolute; by its path in `working_dir` where there is one."""
    text = portable_text(recipe, load_recipe(recipe))
    if working_dir is None:
        return JobFiles(main=recipe.name, texts={recipe.name: text})
    inside = path_inside(recipe, working_dir)
    check_absolute(recipe, text)
    return JobFiles(main=inside, texts={inside: text})


def pipeline_files(path: Path, pipeline: Pipeline, working_dir: Path | None = None) -> JobFiles:
    """A pipeline, from load_pipeline, and its recipe: a file made anew, whose tick runs on the cluster that it is started in.

    Only what differs from the defaults is written, each path absolute but the recipe's, which travels with it.
    """
    text = portable_text(pipeline.recipe, load_recipe(pipeline.recipe))
    main, beside = path.name, f"recipe/{pipeline.recipe.name}"
    recipe = beside
    if working_dir is not None:
        main, recipe = path_inside(path, working_dir), path_inside(pipeline.recipe, working_dir)
        beside = os.path.relpath(recipe, Path(main).parent)
        check_absolute(pipeline.recipe, text)
    run = pipeline.run.model_copy(update={"address": "auto", "env": ()})
    tables = pipeline.model_copy(update={"run": run}).model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    tables["recipe"] = beside
    tables["run"] |= {"workers": run.workers if isinstance(run.workers, int) else workers_text(run.workers)}
    return JobFiles(main=main, texts={main: tomli_w.dumps(tables), recipe: text})


def pack(files: JobFiles, folder: Path, *, working_dir: Path | None = None, installed: bool = False) -> Package:
    """Packs a job's files into `folder`.

    Without `working_dir`: with the four packages as they are here, unless vggrow is `installed` on the cluster. With it:
    in their places in that folder, less what its .gitignore and .rayignore name. Raises RecipeError, or ClusterError above
    Ray's limit.
    """
    target = folder / "job.zip"
    if working_dir is not None:
        return zip_folder(working_dir, target, files.texts)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        stage = Path(made)
        if not installed:
            copy_code(stage)
        for name, text in files.texts.items():
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(text, encoding="utf-8")
        return zip_folder(stage, target, files.texts)


def copy_code(stage: Path) -> None:
    """Our packages, .rayignore and the version that importlib.metadata is asked for."""
    root = Path(deploy.__file__).resolve().parent.parent
    for name in PACKAGES:
        shutil.copytree(root / name, stage / name, ignore=shutil.ignore_patterns("__pycache__"))
    if (root / ".rayignore").exists():
        shutil.copy(root / ".rayignore", stage)
    version = importlib.metadata.version("vggrow")
    about = stage / f"vggrow-{version}.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: vggrow\nVersion: {version}\n")


def path_inside(file: Path, working_dir: Path) -> str:
    """A file's path in the user's folder. RecipeError when it lies elsewhere."""
    found, folder = file.resolve(), working_dir.resolve()
    if not found.is_relative_to(folder):
        raise RecipeError(f"{file}: not in --working-dir {working_dir}; move it there, or leave --working-dir out")
    return str(found.relative_to(folder))


def check_absolute(recipe: Path, text: str) -> None:
    """RecipeError when `text`, the recipe as it travels, had to be changed: the user's folder is to stay as it is."""
    if text != recipe.read_text(encoding="utf-8"):
        raise RecipeError(
            f"{recipe}: [data] root is relative, but --working-dir is unpacked elsewhere on every node; name the pictures'"
            " absolute path on the cluster"
        )


def portable_text(recipe: Path, loaded: Recipe) -> str:
    """The recipe's text with an absolute [data] root, all else as written. Raises RecipeError where that is not possible."""
    text = recipe.read_text(encoding="utf-8")
    root = tomllib.loads(text)["data"].get("root")
    if root is None or Path(root).is_absolute():
        return text
    absolute = f"root = {json.dumps(str(loaded.data.root), ensure_ascii=False)}"
    for found in re.finditer(r"""\broot\s*=\s*("[^"\n]*"|'[^'\n]*')""", text):
        changed = text[: found.start()] + absolute + text[found.end() :]
        try:
            if parse_recipe(changed, place=str(recipe), folder=Path("/")) == loaded:
                return changed
        except RecipeError:
            continue
    raise RecipeError(f"{recipe}: [data] root {root!r} is relative; write its absolute path, as the cluster's nodes see it")


def zip_folder(folder: Path, target: Path, texts: Mapping[str, str]) -> Package:
    """Zips a folder's files, `texts` in place of those that they name. ClusterError as soon as they are more than Ray takes."""
    paths = sorted(kept_files(folder), key=str)
    for name in texts:
        if folder / name not in paths:
            raise RecipeError(f"{name}: .gitignore or .rayignore in the packed folder leaves it out; change that line")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            name = str(path.relative_to(folder))
            entry = zipfile.ZipInfo(name, SAME_DATE)
            entry.external_attr = (path.stat().st_mode & 0xFFFF) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            source = io.BytesIO(texts[name].encode()) if name in texts else path.open("rb")
            with source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink, 2**20)
            if target.stat().st_size >= LIMIT_BYTES:
                raise ClusterError(
                    f"{folder}: packs to more than {LIMIT_BYTES // 2**20} MiB, Ray's limit; name what a job does not need in"
                    f" {folder / '.rayignore'}, and keep pictures and weights on the shared folder"
                )
    return Package(path=target, files=len(paths))


def kept_files(folder: Path, rules: "tuple[tuple[Path, PathSpec], ...] | None" = None) -> list[Path]:
    """The files below a folder that no ignore file in it or in a folder between leaves out, as Ray itself would pack."""
    from ray._private.thirdparty.pathspec import PathSpec  # Ray's own rules; it loads all of Ray

    rules = rules if rules is not None else ((folder, PathSpec.from_lines("gitwildmatch", NEVER)),)
    for name in IGNORES:
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
            rules = (*rules, (folder, PathSpec.from_lines("gitwildmatch", lines)))
    found = []
    for path in folder.iterdir():
        is_folder = path.is_dir()
        if is_folder and path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
            continue                                   # a link to a folder above: there is no end to it
        ending = "/" if is_folder else ""
        if any(spec.match_file(str(path.relative_to(base)) + ending) for base, spec in rules):
            continue
        if is_folder:
            found += kept_files(path, rules)
        elif path.is_file():
            found.append(path)
    return found
