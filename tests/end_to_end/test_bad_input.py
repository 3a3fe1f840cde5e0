"""What a user can get wrong, on the real command: exit 2, one line that says what to do, nothing half-written."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.mlflow_server import free_port
from tests.end_to_end.command import VGGROW, Running, environment, vggrow, wait_until
from tests.end_to_end.test_resume import iterations, run_statuses
from tests.end_to_end.trained import CHILD, Trained, train_once

CHAMPION = "models:/photos@champion"


@pytest.fixture(scope="module")
def trained(photos) -> Trained:
    """A finished schedule of two stages with a champion."""
    return train_once(photos)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are taken and never answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield listener.getsockname()[1]


def files(folder: Path) -> set[str]:
    """Every file below a folder, but for locks."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith("locks/")}


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 2, nothing on stdout, and one line on stderr with all the words; after click's own usage block, its one line."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    if lines[0].startswith("Usage: "):
        assert [line[:5] for line in lines[1:3]] == ["Try '", ""]
        del lines[:3]
    assert len(lines) == 1, done.stderr
    assert lines[0].lower().startswith("error: ")
    for word in words:
        assert word in lines[0], (word, lines[0])


# fmt: off
WRONG_RECIPES = [
    # what is replaced      by                              words of the message
    ("patience = 100",      "patiense = 100",               ["[train]", "unknown key 'patiense'", "did you mean 'patience'?"]),
    ("max_epochs = 2",      'max_epochs = "two"',           ["[train] max_epochs", "expected a whole number, got 'two'"]),
    ('init_from = "A-36"',  'init_from = "A-63"',           ["stage 'B-36'", "'A-63'", "did you mean 'A-36'?"]),
    ('net = "A"',           'net = "A"\ninit_from = "B-36"', ["A-36 from B-36 from A-36", "must start without init_from"]),
    ('net = "B"',           'net = "F"',                    ["stage 'B-36' net", "got 'F'", "'A-LRN'"]),
    ('"A"\nscale = 36',     '"A"\nscale = 16',              ["stage 'A-36'", "scale is [16, 16]", "needs 32 <= low"]),
    ("seed = 3",            "seed = 3\nevaluate.scales = [16]", ["[evaluate] scales: 16", "below the crop, 32"]),
]
# fmt: on


@pytest.mark.parametrize(("right", "wrong", "words"), WRONG_RECIPES, ids=[words[0] for *_, words in WRONG_RECIPES])
def test_a_mistake_in_a_recipe_is_named_at_once_and_no_store_is_made(right, wrong, words, make_recipe, tmp_path):
    recipe = make_recipe(more=CHILD)
    assert right in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(right, wrong, 1))

    done = vggrow("train", recipe, "--store", tmp_path / "store")

    refused(done, f"{recipe}: ", *words)
    assert not (tmp_path / "store").exists()


def test_a_mistake_in_a_recipe_is_named_without_loading_torch(make_recipe, tmp_path):
    recipe = make_recipe()
    recipe.write_text(recipe.read_text().replace("patience", "patiense"))

    done = subprocess.run(
        [sys.executable, "-X", "importtime", *VGGROW[1:], "train", recipe, "--store", tmp_path / "store"],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip

    assert done.returncode == 2 and "did you mean 'patience'?" in done.stderr
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "vggcore" in loaded                # the table of imports was read
    assert not loaded & {"torch", "ray", "mlflow", "nvidia", "matplotlib", "pandas", "pyarrow", "sklearn", "numpy"}


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    done = vggrow("train", tmp_path / "nothing.toml", "--store", tmp_path / "store")

    refused(done, str(tmp_path / "nothing.toml"), "does not exist")
    assert not (tmp_path / "store").exists()


def make_empty(folder: Path, _photos: Path) -> None:
    folder.mkdir()


def make_one_class(folder: Path, photos: Path) -> None:
    shutil.copytree(photos / "train" / "cat", folder / "cat")


def make_file(folder: Path, photos: Path) -> None:
    shutil.copy(photos / "train" / "cat" / "cat-000.jpg", folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda *_: None, ["no such folder", "class folders"]),
        (make_empty, ["is empty", "class folders"]),
        (make_one_class, ["one class only, 'cat'", "two class folders"]),
        (make_file, ["is a file", "class folders"]),
    ],
    ids=["absent", "empty", "one class", "a file"],
)
def test_a_folder_that_cannot_be_trained_on_is_named_and_nothing_is_written(make, words, photos, make_recipe, tmp_path):
    pictures = tmp_path / "pictures"
    make(pictures, photos)
    recipe = make_recipe()
    recipe.write_text(recipe.read_text().replace(f'root = "{photos}"', 'root = "pictures"'))

    # `train` scans by the same function, after 8 s of loading; one of the four is tried on it below.
    done = vggrow("data", "scan", recipe, "--store", tmp_path / "store")

    refused(done, f"{pictures}: ", *words)
    assert files(tmp_path / "store") == set()


def test_a_parent_that_the_store_has_not_got_starts_nothing(make_recipe, tmp_path):
    recipe = make_recipe(more='init_from = "stage:0123456789abcdef"\n')

    done = vggrow("train", recipe, "--store", tmp_path / "store")

    refused(done, "stage 'A-36': init_from 'stage:0123456789abcdef': that stage is not in store", "`vggrow plan` prints keys")
    assert not (tmp_path / "store" / "schedules").exists() and not (tmp_path / "store" / "mlflow.db").exists()


def test_training_on_a_folder_that_is_not_there_starts_nothing(photos, make_recipe, tmp_path):
    recipe = make_recipe()
    recipe.write_text(recipe.read_text().replace(f'root = "{photos}"', 'root = "absent"'))

    done = vggrow("train", recipe, "--store", tmp_path / "store")

    refused(done, f"{tmp_path / 'absent'}: no such folder")
    assert files(tmp_path / "store") == set()


# fmt: off
WRONG_FLAGS = [
    (["--workers", 10],               ["--workers 10", "more than global_batch 9", "at most 9 workers"]),
    (["--device", "cuda"],            ["--device cuda", "no GPU", "--device cpu"]),
    (["--address", "127.0.0.1:{closed}"], ["--address 127.0.0.1:{closed}", "no Ray head answers", "is the cluster up?"]),
]
# fmt: on


@pytest.mark.parametrize(("flags", "words"), WRONG_FLAGS, ids=[str(flags[0]) for flags, _ in WRONG_FLAGS])
def test_what_cannot_be_had_here_is_said_before_pictures_are_read(flags, words, make_recipe, tmp_path):
    closed = str(free_port())
    flags = [str(flag).replace("{closed}", closed) for flag in flags]

    done = vggrow("train", make_recipe(), *flags, "--store", tmp_path / "store", CUDA_VISIBLE_DEVICES="")

    refused(done, *[word.replace("{closed}", closed) for word in words])
    assert files(tmp_path / "store") == set()


def test_tf32_needs_a_gpu(make_recipe, tmp_path):
    recipe = make_recipe()
    recipe.write_text(recipe.read_text().replace("[train]", '[train]\nprecision = "tf32"'))

    done = vggrow("train", recipe, "--device", "cpu", "--store", tmp_path / "store")

    refused(done, "[train] precision", '"tf32" needs a GPU', '"fp32"')
    assert files(tmp_path / "store") == set()


@pytest.mark.parametrize("store", ["s3://bucket/store", "{tmp_path}/photos.toml/store", "{tmp_path}/photos.toml"])
def test_a_store_that_cannot_be_is_named_at_once(store, make_recipe, tmp_path):
    recipe, store = make_recipe(), store.format(tmp_path=tmp_path)

    done = vggrow("train", recipe, "--store", store, cwd=tmp_path)

    refused(done, f"--store {store}", "folder")
    assert files(tmp_path) == {"photos.toml"}


def test_a_store_where_nothing_may_be_written_is_named(make_recipe, tmp_path):
    recipe, closed = make_recipe(), tmp_path / "closed"
    closed.mkdir(mode=0o555)
    # Root passes over modes by a capability, which it does without here.
    plain = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

    done = subprocess.run(
        [*plain, *VGGROW, "train", recipe, "--store", closed / "store"],
        capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip

    refused(done, f"--store {closed / 'store'}: cannot be written (Permission denied)", "that you may write to")
    assert files(closed) == set() and not (closed / "store").exists()


# train, models, promote, predict: each asks the server by itself
COMMANDS = [
    ["train", "{recipe}"],
    ["models", "list"],
    ["models", "promote", "photos"],
    ["predict", CHAMPION, "{recipe}"],
]


def test_a_tracking_server_that_is_down_is_named_within_10_s(make_recipe, tmp_path):
    address, began = f"http://127.0.0.1:{free_port()}", time.monotonic()

    done = vggrow("train", make_recipe(), "--store", tmp_path / "store", "--tracking", address)

    refused(done, f"--tracking {address}", "no MLflow server answers (connection refused)", "start it")
    assert time.monotonic() - began < 10
    assert files(tmp_path / "store") == set()


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(command[:2]) for command in COMMANDS])
def test_a_tracking_server_that_never_answers_is_named_within_10_s(command, silent_port, make_recipe, tmp_path):
    recipe, address = make_recipe(), f"http://127.0.0.1:{silent_port}"
    command = [word.format(recipe=recipe) for word in command]
    began = time.monotonic()

    done = vggrow(*command, "--store", tmp_path / "store", "--tracking", address)

    refused(done, f"--tracking {address}", "no MLflow server answers (no answer within", "start it")
    assert time.monotonic() - began < 10
    assert files(tmp_path / "store") == set()


# fmt: off
WRONG_MODELS = [
    # model                        picture           words of the message
    ("models:/phots@champion",     "cat-000.jpg",    ["no registered model 'phots'", "did you mean 'photos'?"]),
    ("models:/photos@challenger",  "cat-000.jpg",    ["no alias 'challenger'", "'champion' (version 1)"]),
    ("B-63",                       "cat-000.jpg",    ["B-63: no such model", "did you mean 'B-36'?"]),
    (CHAMPION,                     "photos.toml",    ["photos.toml: not a picture", "give a JPEG"]),
    (CHAMPION,                     "absent.jpg",     ["absent.jpg: cannot be read (No such file or directory)"]),
]
# fmt: on


@pytest.mark.parametrize(("model", "picture", "words"), WRONG_MODELS, ids=[words[0] for *_, words in WRONG_MODELS])
def test_a_prediction_that_cannot_be_made_is_refused(model, picture, words, trained, photos, tmp_path):
    before = files(trained.store)
    shutil.copy(photos / "test" / "cat" / "cat-000.jpg", tmp_path)
    shutil.copy(trained.recipe, tmp_path)

    done = vggrow("predict", model, picture, "--store", trained.store, cwd=tmp_path)

    refused(done, *words)
    assert files(trained.store) == before


# The other mistakes of promote, rollback and compare: tests/deploy/test_registry_commands.py, where MLflow is loaded once.
def test_a_model_that_is_not_in_the_registry_is_not_promoted(trained):
    before = files(trained.store)

    done = vggrow("models", "promote", "phots", "--store", trained.store)

    refused(done, "models:/phots: no registered model 'phots'", "did you mean 'photos'?")
    assert files(trained.store) == before


def test_pictures_of_other_classes_cannot_measure_a_model(trained, photos, tmp_path):
    before = files(trained.store)
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    for split in ("train", "val", "test"):
        (other / split / "coffee").rename(other / split / "tea")

    done = vggrow("evaluate", CHAMPION, "--data", other, "--store", trained.store)

    refused(done, "classes of model and pictures differ", "'coffee' has no pictures", "does not know 'tea'")
    assert {path.partition("/")[0] for path in files(trained.store) - before} == {"data"}   # the pictures were scanned


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cuda"], ["--device cuda", "no GPU", "--device cpu"]),
        (["--scales", "36,16"], ["--scales: 16 is below the model's crop, 32"]),
        (["--scales", "small"], ["--scales", "'small'", "such as 96,160"]),
    ],
    ids=["no GPU", "below the crop", "no number"],
)
def test_an_evaluation_that_cannot_be_made_is_refused(flags, words, trained):
    before = files(trained.store)

    done = vggrow("evaluate", CHAMPION, *flags, "--store", trained.store, CUDA_VISIBLE_DEVICES="")

    refused(done, *words)
    assert files(trained.store) == before


def test_a_report_needs_a_store_and_a_schedule_that_is_in_it(trained, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()

    no_store = vggrow("report", "--store", tmp_path / "store")
    no_schedule = vggrow("report", empty)
    unknown = vggrow("report", "0123456789abcdef", "--store", trained.store)

    refused(no_store, f"{tmp_path / 'store'}: no store here")
    refused(no_schedule, f"{empty}: ", "vggrow train RECIPE")
    refused(unknown, "no schedule '0123456789abcdef'", "(photos)")
    assert files(tmp_path) == set() and not (tmp_path / "store").exists()


def test_a_second_train_of_the_same_recipe_is_told_who_holds_it_and_the_first_is_unharmed(make_recipe, tmp_path):
    recipe, store = make_recipe(epochs=500), tmp_path / "store"
    first = Running("train", recipe, "--store", store, log=tmp_path / "log")
    try:
        wait_until(lambda: iterations(store) >= 3, timeout_s=120, running=first)
        first.process.send_signal(signal.SIGSTOP)       # it must not end before the second one has asked

        second = vggrow("train", recipe, "--store", store)

        reached = iterations(store)
        first.process.send_signal(signal.SIGCONT)
        wait_until(lambda: iterations(store) >= reached + 7, timeout_s=60, running=first)      # an epoch on
        first.send(signal.SIGINT)
        code = first.wait()
    finally:
        first.kill_everything()
    refused(second, "recipe 'photos'", f"held by process {first.process.pid} on {socket.gethostname()}", "wait until")
    assert code == 130, first.output()
    assert run_statuses(store) == {"A-36": "KILLED", "photos": "KILLED"}


@pytest.mark.slow
def test_a_picture_that_breaks_while_a_run_reads_it_is_named_and_the_same_command_goes_on(photos, make_recipe, tmp_path):
    pictures, store = tmp_path / "pictures", tmp_path / "store"
    shutil.copytree(photos, pictures)
    recipe = make_recipe(epochs=20)
    recipe.write_text(recipe.read_text().replace(str(photos), str(pictures)))
    broken = pictures / "train" / "coffee" / "coffee-003.jpg"
    # Without the decoded cache, which would not miss a file any more.
    running = Running("train", recipe, "--store", store, "--cache-gib", 0, log=tmp_path / "log")
    try:
        wait_until(lambda: iterations(store) >= 3, timeout_s=120, running=running)
        broken.rename(tmp_path / "kept.jpg")

        code = running.wait()
    finally:
        running.kill_everything()
    reached, after_break = iterations(store), run_statuses(store)
    (tmp_path / "kept.jpg").rename(broken)
    again = vggrow("train", recipe, "--store", store, "--cache-gib", 0)

    errors = [line for line in running.output().splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1, running.output()
    assert str(broken) in errors[0] and "Traceback" not in running.output()
    assert after_break == {"A-36": "FAILED", "photos": "FAILED"} and reached < 20 * 7
    assert again.returncode == 0, again.stderr
    assert run_statuses(store) == {"A-36": "FINISHED", "photos": "FINISHED"}
    assert iterations(store) == 20 * 7


def test_a_pace_of_system_metrics_that_is_no_number_is_named_before_a_run_is_recorded(make_recipe, tmp_path):
    store = tmp_path / "store"

    done = vggrow("train", make_recipe(), "--store", store, MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL="often")

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL=often: not a number")
    assert not (store / "stages").exists() and not (store / "mlflow.db").exists()
