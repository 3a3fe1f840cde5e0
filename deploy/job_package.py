"""What a job takes along: one zip with the recipe and our packages, or with a folder of the user's; the same bits each time."""

import importlib.metadata
import json
import re
import shutil
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ray._private.thirdparty.pathspec import PathSpec  # Ray's own rules: what we pack is what Ray would pack

import deploy
from vggcore.errors import ClusterError, RecipeError
from vggcore.recipe import Recipe, load_recipe, parse_recipe

PACKAGES = ("vggcore", "pipelines", "training", "deploy")
LIMIT_BYTES = 512 * 2**20                      # Ray's own, of one gRPC message
NEVER = (".git/", ".venv/", "venv/", "__pycache__/")      # Ray's RAY_RUNTIME_ENV_DEFAULT_EXCLUDES
SAME_DATE = (1980, 1, 1, 0, 0, 0)              # zip's first: equal files give an equal zip, which Ray uploads once
IGNORES = (".gitignore", ".rayignore")


@dataclass(frozen=True)
class Package:
    """A zip beside nothing else in its folder, and the recipe's path inside it."""

    path: Path
    recipe: str
    files: int

    @property
    def bytes(self) -> int:
        """The size that travels."""
        return self.path.stat().st_size


def pack(recipe: Path, folder: Path, *, working_dir: Path | None = None, installed: bool = False) -> Package:
    """Packs a job's files into `folder`.

    Without `working_dir`: the recipe, its [data] root made absolute, and, unless vggrow is `installed` on the cluster,
    the four packages as they are here. With it: that folder less what its .gitignore and .rayignore name; the recipe must
    lie in it. Raises RecipeError, or ClusterError above Ray's limit.
    """
    loaded = load_recipe(recipe)
    target = folder / "job.zip"
    if working_dir is not None:
        inside = recipe_inside(recipe, loaded, working_dir)
        return zip_folder(working_dir, target, inside)
    text = portable_text(recipe, loaded)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        stage = Path(made)
        if not installed:
            copy_code(stage)
        (stage / recipe.name).write_text(text, encoding="utf-8")
        return zip_folder(stage, target, recipe.name)


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


def recipe_inside(recipe: Path, loaded: Recipe, working_dir: Path) -> str:
    """The recipe's path in the user's folder, from which nothing may be left to the place where it is unpacked."""
    found, folder = recipe.resolve(), working_dir.resolve()
    if not found.is_relative_to(folder):
        raise RecipeError(f"{recipe}: not in --working-dir {working_dir}; move it there, or leave --working-dir out")
    if portable_text(recipe, loaded) != recipe.read_text(encoding="utf-8"):
        raise RecipeError(
            f"{recipe}: [data] root is relative, but --working-dir is unpacked elsewhere on every node; name the pictures'"
            " absolute path on the cluster"
        )
    return str(found.relative_to(folder))


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


def zip_folder(folder: Path, target: Path, recipe: str) -> Package:
    """Zips a folder's files. ClusterError as soon as they are more than Ray takes."""
    paths = sorted(kept_files(folder), key=str)
    if folder / recipe not in paths:
        raise RecipeError(f"{recipe}: .gitignore or .rayignore in the packed folder leaves the recipe out; change that line")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            entry = zipfile.ZipInfo(str(path.relative_to(folder)), SAME_DATE)
            entry.external_attr = (path.stat().st_mode & 0xFFFF) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            with path.open("rb") as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink, 2**20)
            if target.stat().st_size >= LIMIT_BYTES:
                raise ClusterError(
                    f"{folder}: packs to more than {LIMIT_BYTES // 2**20} MiB, Ray's limit; name what a job does not need in"
                    f" {folder / '.rayignore'}, and keep pictures and weights on the shared folder"
                )
    return Package(path=target, recipe=recipe, files=len(paths))


def kept_files(folder: Path, rules: tuple[tuple[Path, PathSpec], ...] | None = None) -> list[Path]:
    """The files below a folder that no ignore file in it or in a folder between leaves out, as Ray itself would pack."""
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
