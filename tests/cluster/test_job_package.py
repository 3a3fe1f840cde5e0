"""What a job takes along: the recipe and the packages, and nothing else; needs no cluster."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy import job_package
from deploy.job_package import PACKAGES, pack
from deploy.jobs import Heard, make_order, read_env
from tests.end_to_end.command import ROOT
from tests.end_to_end.conftest import RECIPE
from vggcore.errors import ClusterError, RecipeError
from vggcore.recipe import load_recipe


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe whose pictures are named by a relative path."""
    path = tmp_path / "mine" / "photos.toml"
    path.parent.mkdir()
    path.write_text(RECIPE.format(root="pictures", epochs=2, every="5min"))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where packages are made."""
    made = tmp_path / "made"
    made.mkdir()
    return made


def names(package) -> set[str]:
    return set(zipfile.ZipFile(package.path).namelist())


def test_a_package_holds_the_recipe_and_the_four_packages_and_nothing_else(recipe, folder):
    package = pack(recipe, folder)

    places = {name.partition("/")[0] for name in names(package)}
    (about,) = {place for place in places if place.endswith(".dist-info")}
    assert places == {*PACKAGES, about, "photos.toml", ".rayignore"}
    assert {"deploy/report.html.j2", "deploy/served_model.py", "training/recipes/elpv.toml"} <= names(package)
    assert not [name for name in names(package) if "__pycache__" in name]
    assert package.files == len(names(package)) and package.bytes < 2**20


def test_the_command_runs_from_the_unpacked_package_and_from_nowhere_else(recipe, folder, tmp_path):
    zipfile.ZipFile(pack(recipe, folder).path).extractall(tmp_path / "there")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = (
        "import importlib.metadata, deploy.cli, training, pipelines, vggcore\n"
        "for one in (deploy, training, pipelines, vggcore): print(one.__file__)\n"
        "print(importlib.metadata.distribution('vggrow').locate_file('x'))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "there", env=environment, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    places = [tmp_path / "there" / line for line in done.stdout.split()]         # an absolute line stays what it is
    assert len(places) == 5
    assert all(place.is_relative_to(tmp_path / "there") for place in places), places


def test_the_same_files_make_the_same_package_so_that_it_is_uploaded_once(recipe, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()

    first, second = pack(recipe, folder), pack(recipe, other)

    assert first.path.read_bytes() == second.path.read_bytes()


def test_a_relative_folder_of_pictures_is_made_absolute_and_all_else_stays(recipe, folder):
    text = recipe.read_text()

    package = pack(recipe, folder, installed=True)

    packed = zipfile.ZipFile(package.path).read("photos.toml").decode()
    assert names(package) == {"photos.toml"}
    assert packed == text.replace('root = "pictures"', f'root = "{recipe.parent}/pictures"')


@pytest.mark.parametrize("written", ['"pictures"', "'pictures'"])
def test_a_root_in_an_inline_table_is_made_absolute_too(written, recipe, folder):
    text = recipe.read_text().replace('[data]\nroot = "pictures"\nstandardise = true\n', f"data = {{root = {written}}}\n")
    recipe.write_text("# root = 'pictures' is ours\n" + text)

    package = pack(recipe, folder, installed=True)

    (folder / "photos.toml").write_bytes(zipfile.ZipFile(package.path).read("photos.toml"))
    assert load_recipe(folder / "photos.toml") == load_recipe(recipe)
    assert str(load_recipe(folder / "photos.toml").data.root) == str(recipe.parent / "pictures")


def test_a_folder_of_the_users_is_packed_less_what_its_ignore_files_name(recipe, folder):
    work = recipe.parent
    recipe.write_text(recipe.read_text().replace('"pictures"', '"/shared/pictures"'))
    kept, ignored = ("keep.py", "sub/keep.txt"), ("secret.env", "big.bin", "sub/big.bin", "sub/deep/no.txt", "store/weights")
    for name in (*kept, *ignored, ".git/config", "venv/x"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    (work / ".rayignore").write_text("*.bin\n/store/\n")
    (work / ".gitignore").write_text("secret.env\n")
    (work / "sub" / ".rayignore").write_text("deep/\n")
    (work / "sub" / "loop").symlink_to(work)

    package = pack(recipe, folder, working_dir=work)

    assert names(package) == {*kept, "photos.toml", ".gitignore", ".rayignore", "sub/.rayignore"}
    assert package.recipe == "photos.toml"


def test_the_repositorys_own_rayignore_leaves_out_tests_and_stores(folder, tmp_path):
    work = tmp_path / "work"
    (work / "vggrow-store").mkdir(parents=True)
    (work / "tests").mkdir()
    (work / "vggrow-store" / "mlflow.db").write_text("")
    (work / "tests" / "test_one.py").write_text("")
    (work / "photos.toml").write_text(RECIPE.format(root="/shared", epochs=2, every="5min"))
    (work / ".rayignore").write_text((ROOT / ".rayignore").read_text())

    package = pack(work / "photos.toml", folder, working_dir=work)

    assert names(package) == {".rayignore", "photos.toml"}


def test_more_than_ray_takes_is_refused_before_anything_is_sent(recipe, folder, monkeypatch):
    monkeypatch.setattr(job_package, "LIMIT_BYTES", 2**20)
    recipe.write_text(recipe.read_text().replace('"pictures"', '"/shared/pictures"'))
    (recipe.parent / "noise.bin").write_bytes(os.urandom(2**21))

    with pytest.raises(ClusterError, match=r"packs to more than 1 MiB, Ray's limit; .*\.rayignore"):
        pack(recipe, folder, working_dir=recipe.parent)


def test_a_recipe_that_cannot_be_taken_along_is_named(recipe, folder, tmp_path):
    with pytest.raises(RecipeError, match="root is relative, but --working-dir is unpacked elsewhere"):
        pack(recipe, folder, working_dir=recipe.parent)
    with pytest.raises(RecipeError, match="not in --working-dir"):
        pack(recipe, folder, working_dir=folder)
    recipe.write_text(recipe.read_text().replace('"pictures"', '"/shared/pictures"'))
    (recipe.parent / ".rayignore").write_text("*.toml\n")
    with pytest.raises(RecipeError, match="leaves the recipe out"):
        pack(recipe, folder, working_dir=recipe.parent)


def order(recipe: Path, store: Path | str, **more):
    settings = {"threads": None, "device": None, "tracking": None, "python": "/venv/bin/python", "env": {}} | more
    return make_order(recipe, packed_recipe=recipe.name, package=None, store=str(store), workers=2, **settings)


def test_the_command_of_a_job_names_the_interpreter_and_is_stopped_by_a_signal_that_python_gets(recipe):
    made = order(recipe, "/mnt/my store", device="cuda", threads=3, tracking="http://mlflow:5000", env={"A": "b"})

    assert made.entrypoint == (
        "exec /venv/bin/python -m deploy train photos.toml --address auto --workers 2 --threads 3 --device cuda"
        " --store '/mnt/my store' --tracking http://mlflow:5000"
    )
    assert made.env == {"A": "b", "RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}


def test_the_key_follows_the_recipes_text_where_no_scan_is_known(recipe, tmp_path):
    first, same = order(recipe, tmp_path / "a"), order(recipe, tmp_path / "b")
    elsewhere = tmp_path / recipe.name
    elsewhere.write_text(recipe.read_text())                      # the same text, but other pictures
    recipe.write_text(recipe.read_text().replace("max_epochs = 2", "max_epochs = 3"))
    changed = order(recipe, tmp_path / "a")

    assert first.key == same.key == first.recipe_digest
    assert len({first.key, changed.key, order(elsewhere, tmp_path / "a").key}) == 3


def test_a_store_that_is_no_absolute_path_is_refused(recipe):
    with pytest.raises(ClusterError, match="--store vggrow-store: wanted an absolute path"):
        order(recipe, "vggrow-store")


def test_variables_are_given_by_value_or_by_name(monkeypatch):
    monkeypatch.setenv("PASSED", "on=1")

    assert read_env(["A=b=c", "PASSED", "EMPTY="]) == {"A": "b=c", "PASSED": "on=1", "EMPTY": ""}
    refusals = {"ABSENT_HERE": "no such variable", "1X=2": "NAME=VALUE", "RAY_JOB_STOP_SIGNAL=SIGTERM": "leave it out"}
    for wrong, words in refusals.items():
        with pytest.raises(ClusterError, match=words):
            read_env([wrong])


def test_a_log_that_is_read_again_from_its_start_is_heard_once():
    heard: list[str] = []
    first = Heard(0, heard.append)
    first("one\ntw")
    second = Heard(first.heard, heard.append)
    for chunk in ("one\n", "two\n", "three\n"):
        second(chunk)

    assert "".join(heard) == "one\ntwo\nthree\n"
