"""`vggrow bench` measures what it says, side by side, and leaves nothing behind but the decoded pictures of `bench train`."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.command import SIGINT, Running, vggrow, wait_until


@pytest.fixture
def temporary(monkeypatch) -> Iterator[Path]:
    """The commands' folder for temporary files; its path is short, for Ray's sockets."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_four_figures_come_with_their_ratios_and_nothing_is_kept(make_recipe, tmp_path):
    recipe, store = make_recipe(), tmp_path / "store"

    done = vggrow("bench", "train", recipe, "--store", store, "--seconds", 0.2, "--turns", 1, "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("limit", "bare", "plain", "ours", "ours_cached"):
        assert found[name] > 0
    assert found["ours_of_bare"] == pytest.approx(found["ours"] / found["bare"])
    assert found["ours_of_plain"] == pytest.approx(found["ours"] / found["plain"])
    assert 0 < found["bare_of_limit"] < 1
    assert (found["train_pictures"], found["val_pictures"]) == (60, 15)
    epoch = found["train_pictures"] / found["ours_cached"]
    assert found["validation_later_of_epoch"] == pytest.approx(15 / found["validation_later"] / epoch)
    assert {path.name for path in store.iterdir()} <= {"data", "locks"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_choice_of_speed_is_told_as_a_ratio_to_the_recipes_own_and_short_batches_compile_once(make_recipe, tmp_path):
    recipe, store = make_recipe(), tmp_path / "store"

    words = ("--settings", "--seconds", 0.1, "--turns", 2, "--threads", 1, "--store", store)
    done = vggrow("bench", "train", recipe, *words, "--json", timeout_s=600)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    own, *others = found["choices"]
    assert own["name"] == "as in the recipe" and own["of_default"] == [1.0, 1.0]
    names = {choice["name"] for choice in others}
    assert {"contiguous (NCHW)", "compile", "SGD foreach", "gradients zeroed", "memory given back", "bf16"} <= names
    assert {"freeze = 3", "freeze = 5"} <= names
    assert all(choice["images_per_second"] > 0 and len(choice["of_default"]) == 2 for choice in others)
    (compiled,) = (choice for choice in others if choice["name"] == "compile")
    assert compiled["graphs"] == 2 and compiled["compile_seconds"] > 0    # 60 pictures in batches of 9: 9 and 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_layer_is_told_with_its_time_at_the_batch_that_is_asked_for(make_recipe, tmp_path):
    recipe, store = make_recipe(), tmp_path / "store"

    words = ("--layers", "--batch", 2, "--seconds", 0.5, "--threads", 1, "--store", store)
    done = vggrow("bench", "train", recipe, *words, "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert found["batch"] == 2
    assert layers["features.3"]["kind"] == "conv3-8" and layers["features.3"]["output"] == [8, 16, 16]
    assert 0 < layers["features.3"]["of_limit"] < 1 and layers["features.1"]["of_limit"] is None
    assert {"memory format", "classifier.6", "loss", "update"} <= set(layers)
    assert all(layer["forward"] + layer["backward"] > 0 for layer in layers.values())


LINEAR = """
[[stage]]
name = "pooled"
net = "A"
scale = 36
head = "linear"
features = { groups = [3, 4], pool = "both" }
[[stage]]
name = "tuned"
net = "A"
scale = 36
head = "linear"
features = { groups = [3, 4], pool = "both" }
init_from = "pooled"
freeze = 4
[[stage]]
name = "fitted"
net = "A"
head = "linear"
features = { groups = [3, 4], scales = [36] }
init_from = "pooled"
fit = "logistic"
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_linear_heads_layers_are_told_too_and_frozen_ones_have_no_way_back(make_recipe, tmp_path):
    words = ("--layers", "--batch", 2, "--seconds", 0.5, "--threads", 1, "--store", tmp_path / "store", "--json")
    done = vggrow("bench", "train", make_recipe(more=LINEAR), "--stage", "tuned", *words)

    assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout)["layers"]
    assert [layer["name"] for layer in layers if layer["backward"] > 0] == ["classifier.0"]
    assert [layer["output"] for layer in layers if layer["kind"] == "pool-both"] == [[32], [64]]


def test_a_fitted_stage_has_no_iterations_to_measure(make_recipe, tmp_path):
    done = vggrow("bench", "train", make_recipe(more=LINEAR), "--stage", "fitted", "--store", tmp_path / "store")

    assert done.returncode == 2 and '--stage fitted: expected a stage that trains by iterations, got fit = "log' in done.stderr


def test_two_measurements_at_once_are_refused(make_recipe, tmp_path):
    done = vggrow("bench", "train", make_recipe(), "--settings", "--layers", "--store", tmp_path / "store")

    assert done.returncode == 2 and "--settings --layers: each is a measurement of its own" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_stage_that_is_not_there_is_named(make_recipe, tmp_path):
    done = vggrow("bench", "train", make_recipe(), "--stage", "A-63", "--store", tmp_path / "store")

    assert done.returncode == 2 and "--stage A-63: no such stage" in done.stderr and "did you mean 'A-36'?" in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_recovery_is_measured_beside_bare_ray_train_and_nothing_is_left(make_recipe, temporary):
    done = vggrow("bench", "recovery", make_recipe(), "--workers", 2, "--turns", 1, "--json", timeout_s=2900)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for measure in ("first_step", "worker", "command"):
        for name in ("vggrow", "bare", "bare_quick"):
            assert found["medians"][name][measure] > 0
            assert found["seconds"][name][measure] == [found["medians"][name][measure]]
        for name in ("bare", "bare_quick"):
            ratio = found["medians"]["vggrow"][measure] / found["medians"][name][measure]
            assert found["ratios"][measure][name] == pytest.approx(ratio)
    assert found["medians"]["vggrow"]["new_store"] > 0 and found["medians"]["bare"]["new_store"] is None
    assert all(number >= 0 for numbers in found["repeated"].values() for number in numbers)
    assert "worker killed, to the first new step" in done.stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_recovery_that_is_interrupted_ends_what_it_started_and_leaves_nothing(make_recipe, tmp_path, temporary):
    running = Running("bench", "recovery", make_recipe(), "--turns", 1, log=tmp_path / "log")
    try:
        wait_until(lambda: len(running.workers()) == 2, timeout_s=600, running=running)
        below = psutil.Process(running.process.pid).children(recursive=True)
        running.send(SIGINT)
        code = running.wait(120)
    finally:
        running.kill_everything()

    assert code == 130 and "Traceback" not in running.output()
    assert not [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--stage", "A-63"), "--stage A-63: no such stage"),
        (("--workers", "1"), "1 is not in the range x>=2"),
        (("--workers", "10"), "--workers 10 is more than global_batch 9"),
        (("--turns", "0"), "0 is not in the range x>=1"),
    ],
)
def test_recovery_that_cannot_be_measured_is_refused_in_one_line(make_recipe, words, told):
    done = vggrow("bench", "recovery", make_recipe(), *words)

    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_recipe_whose_training_fails_ends_the_measuring_with_its_own_line(make_recipe, photos, tmp_path):
    recipe = make_recipe()
    recipe.write_text(recipe.read_text().replace(str(photos), str(tmp_path / "nowhere")))

    done = vggrow("bench", "recovery", recipe, "--turns", 1)

    assert done.returncode == 2 and "the command ended (2): error: " in done.stderr and "nowhere" in done.stderr
