"""What a job takes along: the recipe and the packages, and nothing else; needs no cluster."""

# ruff: noqa: E501   (a table)

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy import job_package
from deploy.job_container import container, container_command, mounted_folders
from deploy.job_order import command_line, is_pipeline, read_env, tick_order, train_order
from deploy.job_package import PACKAGES, JobFiles, pack, pipeline_files, recipe_files
from deploy.jobs import Heard
from deploy.pipeline_file import load_pipeline
from tests.end_to_end.command import ROOT, vggrow
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
    package = pack(recipe_files(recipe), folder)

    places = {name.partition("/")[0] for name in names(package)}
    (about,) = {place for place in places if place.endswith(".dist-info")}
    assert places == {*PACKAGES, about, "photos.toml", ".rayignore"}
    assert {"deploy/report.html.j2", "deploy/served_model.py", "training/recipes/elpv.toml"} <= names(package)
    assert not [name for name in names(package) if "__pycache__" in name]
    assert package.files == len(names(package)) and package.bytes < 2**20


def test_the_command_runs_from_the_unpacked_package_and_from_nowhere_else(recipe, folder, tmp_path):
    zipfile.ZipFile(pack(recipe_files(recipe), folder).path).extractall(tmp_path / "there")
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

    first, second = pack(recipe_files(recipe), folder), pack(recipe_files(recipe), other)

    assert first.path.read_bytes() == second.path.read_bytes()


def test_a_relative_folder_of_pictures_is_made_absolute_and_all_else_stays(recipe, folder):
    text = recipe.read_text()

    package = pack(recipe_files(recipe), folder, installed=True)

    packed = zipfile.ZipFile(package.path).read("photos.toml").decode()
    assert names(package) == {"photos.toml"}
    assert packed == text.replace('root = "pictures"', f'root = "{recipe.parent}/pictures"')


@pytest.mark.parametrize("written", ['"pictures"', "'pictures'"])
def test_a_root_in_an_inline_table_is_made_absolute_too(written, recipe, folder):
    text = recipe.read_text().replace('[data]\nroot = "pictures"\nstandardise = true\n', f"data = {{root = {written}}}\n")
    recipe.write_text("# root = 'pictures' is ours\n" + text)

    package = pack(recipe_files(recipe), folder, installed=True)

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

    package = pack(recipe_files(recipe, work), folder, working_dir=work)

    assert names(package) == {*kept, "photos.toml", ".gitignore", ".rayignore", "sub/.rayignore"}


def test_the_repositorys_own_rayignore_leaves_out_tests_and_stores(folder, tmp_path):
    work = tmp_path / "work"
    (work / "vggrow-store").mkdir(parents=True)
    (work / "tests").mkdir()
    (work / "vggrow-store" / "mlflow.db").write_text("")
    (work / "tests" / "test_one.py").write_text("")
    (work / "photos.toml").write_text(RECIPE.format(root="/shared", epochs=2, every="5min"))
    (work / ".rayignore").write_text((ROOT / ".rayignore").read_text())

    package = pack(recipe_files(work / "photos.toml", work), folder, working_dir=work)

    assert names(package) == {".rayignore", "photos.toml"}


def test_more_than_ray_takes_is_refused_before_anything_is_sent(recipe, folder, monkeypatch):
    monkeypatch.setattr(job_package, "LIMIT_BYTES", 2**20)
    recipe.write_text(recipe.read_text().replace('"pictures"', '"/shared/pictures"'))
    (recipe.parent / "noise.bin").write_bytes(os.urandom(2**21))

    with pytest.raises(ClusterError, match=r"packs to more than 1 MiB, Ray's limit; .*\.rayignore"):
        pack(recipe_files(recipe, recipe.parent), folder, working_dir=recipe.parent)


def test_a_recipe_that_cannot_be_taken_along_is_named(recipe, folder, tmp_path):
    with pytest.raises(RecipeError, match="root is relative, but --working-dir is unpacked elsewhere"):
        pack(recipe_files(recipe, recipe.parent), folder, working_dir=recipe.parent)
    with pytest.raises(RecipeError, match="not in --working-dir"):
        recipe_files(recipe, folder)
    recipe.write_text(recipe.read_text().replace('"pictures"', '"/shared/pictures"'))
    (recipe.parent / ".rayignore").write_text("*.toml\n")
    with pytest.raises(RecipeError, match="leaves it out"):
        pack(recipe_files(recipe, recipe.parent), folder, working_dir=recipe.parent)


def order(recipe: Path, store: Path | str, **more):
    settings = {"workers": 2, "threads": None, "device": None, "tracking": None, "env": {}} | more
    return train_order(recipe, recipe_files(recipe), store=str(store), **settings)


def test_the_command_of_a_job_names_the_interpreter_and_is_stopped_by_a_signal_that_python_gets(recipe):
    made = order(recipe, "/mnt/my store", device="cuda", threads=3, tracking="http://mlflow:5000", env={"A": "b"})

    assert command_line("/venv/bin/python", made.words) == (
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

    assert first.key == same.key == first.named
    assert len({first.key, changed.key, order(elsewhere, tmp_path / "a").key}) == 3


def test_a_store_that_is_no_absolute_path_is_refused(recipe):
    with pytest.raises(ClusterError, match="--store vggrow-store: wanted an absolute path"):
        order(recipe, "vggrow-store")


PIPELINE = """
name = "weekly"
recipe = "photos.toml"
watch = {folders = ["incoming"]}
timetable = {cron = "30 2 * * 1", time_zone = "Europe/Berlin"}
start = {max_age = "30d"}
gate = {metric = "balanced", min_gain = 0.01}
run = {address = "http://head:8265", workers = "1:3", threads = 2, store = "store", tracking = "sqlite:///runs.db", env = ["A"]}
notify = {url = "https://hooks.example.org/vggrow"}
"""


@pytest.fixture
def pipeline(recipe) -> Path:
    """A pipeline file beside the recipe, with a key in each of its tables."""
    path = recipe.parent / "pipeline.toml"
    path.write_text(PIPELINE)
    return path


def test_a_file_is_a_pipeline_when_it_names_a_recipe(recipe, pipeline):
    assert is_pipeline(pipeline) and not is_pipeline(recipe)
    pipeline.write_text("name = ")
    with pytest.raises(RecipeError, match=r"pipeline\.toml: not TOML"):
        is_pipeline(pipeline)


def test_a_packed_pipeline_says_the_same_in_another_folder_and_runs_on_the_cluster_that_starts_it(pipeline, folder, tmp_path):
    loaded = load_pipeline(pipeline)

    package = pack(pipeline_files(pipeline, loaded), folder, installed=True)

    zipfile.ZipFile(package.path).extractall(tmp_path / "there")
    found = load_pipeline(tmp_path / "there" / "pipeline.toml")
    assert names(package) == {"pipeline.toml", "recipe/photos.toml"}
    assert load_recipe(found.recipe) == load_recipe(loaded.recipe)
    run = loaded.run.model_copy(update={"address": "auto", "env": ()})
    assert found == loaded.model_copy(update={"recipe": found.recipe, "run": run})
    assert found.watch.folders == (pipeline.parent / "incoming",) and found.run.store == pipeline.parent / "store"


def test_a_pipeline_in_a_folder_of_the_users_keeps_its_place_and_its_recipes(recipe, pipeline, folder, tmp_path):
    recipe.write_text(recipe.read_text().replace('"pictures"', '"/shared/pictures"'))
    (recipe.parent / "week").mkdir()
    moved = pipeline.rename(recipe.parent / "week" / "pipeline.toml")
    moved.write_text(PIPELINE.replace('"photos.toml"', '"../photos.toml"'))
    files = pipeline_files(moved, load_pipeline(moved), recipe.parent)

    package = pack(files, folder, working_dir=recipe.parent)

    zipfile.ZipFile(package.path).extractall(tmp_path / "there")
    found = load_pipeline(tmp_path / "there" / "week" / "pipeline.toml")
    assert files.main == "week/pipeline.toml"
    assert found.recipe == tmp_path / "there" / "photos.toml" and found.run.address == "auto"
    assert 'address = "http' in moved.read_text()                  # the user's own file stays as it is


def test_a_tick_is_known_by_its_pipelines_name_and_store_whatever_else_changes(pipeline):
    def ordered(text: str, *, dry_run: bool = False, accept: str | None = None):
        pipeline.write_text(text)
        loaded = load_pipeline(pipeline)
        return tick_order(loaded, pipeline_files(pipeline, loaded), dry_run=dry_run, accept=accept, env={})

    first = ordered(PIPELINE)

    assert first.words == ("-m", "deploy", "retrain", "pipeline.toml")
    assert (first.pipeline, first.recipe, first.workers) == ("weekly", "photos", (1, 3))
    same = ordered(PIPELINE.replace("0.01", "0.02"), accept="it's so")
    assert (same.key, same.words[-2:]) == (first.key, ("--accept", "it's so"))
    others = {
        ordered(PIPELINE.replace('"weekly"', '"daily"')).key,
        ordered(PIPELINE.replace('"store"', '"other"')).key,
        ordered(PIPELINE, dry_run=True).key,
    }
    assert len(others | {first.key}) == 4


def test_a_command_in_a_container_brings_its_files_and_ends_with_the_same_words(tmp_path):
    text = 'name = "it\'s"\n# 100 % $HOME `true`\n'
    files = JobFiles(main="p.toml", texts={"p.toml": text, "recipe/r s.toml": text * 2})
    show = ["-c", "import sys; sys.stdout.write(repr([open(name, newline='').read() for name in sys.argv[1:]]))"]

    done = subprocess.run(
        container_command(files, [*show, *files.texts], python=sys.executable), shell=True, capture_output=True, text=True
    )

    assert done.stdout == repr([text, text * 2]), done.stderr
    with pytest.raises(ClusterError, match="too long for a job in a container"):
        container_command(JobFiles("p.toml", {"p.toml": "#" * 2**17}), show)


def test_a_container_sees_the_store_and_the_pictures(recipe, pipeline):
    store, here = "/mnt/my store", recipe.parent

    made = container("registry/vggrow:1", mounted_folders(recipe, store, load_pipeline(pipeline)), {"A": "b"})

    assert made == {
        "container": {
            "image": "registry/vggrow:1",
            "run_options": [
                "-v", "'/mnt/my store:/mnt/my store'", "-v", f"{here}/incoming:{here}/incoming:ro",
                "-v", f"{here}/pictures:{here}/pictures:ro",
            ],
        }
    }  # fmt: skip
    with pytest.raises(ClusterError, match="--env A: its value holds a '"):
        container("image", [], {"A": "it's"})
    with pytest.raises(ClusterError, match="a colon in its path"):
        container("image", ["/a:b:/a:b"], {})


def test_variables_are_given_by_value_or_by_name(monkeypatch):
    monkeypatch.setenv("PASSED", "on=1")

    assert read_env(["A=b=c", "PASSED", "EMPTY="]) == {"A": "b=c", "PASSED": "on=1", "EMPTY": ""}
    refusals = {"ABSENT_HERE": "no such variable", "1X=2": "NAME=VALUE", "RAY_JOB_STOP_SIGNAL=SIGTERM": "leave it out"}
    for wrong, words in refusals.items():
        with pytest.raises(ClusterError, match=words):
            read_env([wrong])


# fmt: off
MISUSES = [
    # words after `submit`                                              words of the message
    (["photos.toml"],                                                   "--store (or VGGROW_STORE) is needed"),
    (["pipeline.toml", "--store", "/mnt/store"],                        "--store is for a recipe; pipeline.toml is a pipeline: set [run] store in it"),
    (["pipeline.toml", "--tracking", "http://mlflow:5000"],             "--tracking is for a recipe"),
    (["pipeline.toml", "--workers", "3:1"],                             "found 3:1, wanted a number of at least 1, or MIN:MAX"),
    (["photos.toml", "--installed", "--image", "vggrow:1"],             "--image has no effect with --installed"),
    (["photos.toml", "--working-dir", ".", "--image", "vggrow:1"],      "--image has no effect with --working-dir"),
    (["pipeline.toml"],                                                 "pipeline.toml: [run] env A: no such variable in this shell"),
]
# fmt: on


@pytest.mark.parametrize(("words", "message"), MISUSES, ids=[" ".join(words) for words, _ in MISUSES])
def test_what_submit_cannot_do_is_named_before_the_cluster_is_asked(words, message, pipeline, monkeypatch):
    monkeypatch.delenv("A", raising=False)

    done = vggrow("submit", *words, "--address", "http://127.0.0.1:9", cwd=pipeline.parent)

    assert done.returncode == 2 and done.stdout == ""
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and "no Ray head answers" not in done.stderr


def test_a_store_and_a_tracking_server_of_the_shell_are_not_a_pipelines(pipeline):
    pipeline.write_text(PIPELINE.replace(', env = ["A"]', ""))
    shell = {"VGGROW_STORE": "/mnt/store", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}

    done = vggrow("submit", "pipeline.toml", "--address", "http://127.0.0.1:9", cwd=pipeline.parent, **shell)

    assert done.returncode == 2
    assert "no Ray head answers" in done.stderr            # it has come as far as the cluster


def test_a_log_that_is_read_again_from_its_start_is_heard_once():
    heard: list[str] = []
    first = Heard(0, heard.append)
    first("one\ntw")
    second = Heard(first.heard, heard.append)
    for chunk in ("one\n", "two\n", "three\n"):
        second(chunk)

    assert "".join(heard) == "one\ntwo\nthree\n"
