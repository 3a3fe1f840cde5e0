"""Weights from a stage of the store by its key: found, or refused before anything starts where they cannot serve."""

import json
from pathlib import Path

import pytest

from training.parents import check_stored_parents, parent_weights
from training.store import Store
from vggcore.errors import RecipeError, StoreError
from vggcore.recipe import parse_recipe
from vggcore.schedule import resolve_stages, stage_keys

KEY = "0123456789abcdef"
RECIPE = f"""
name = "pets"
[data]
root = "pictures"
[[stage]]
name = "D-256"
net = "D"
scale = 256
init_from = "stage:{KEY}"
[[stage]]
name = "D-384"
net = "D"
scale = 384
init_from = "D-256"
"""
CLASSES = ["cat", "dog"]


@pytest.fixture
def stages():
    return resolve_stages(parse_recipe(RECIPE, place="pets.toml", folder=Path("/somewhere")))


@pytest.fixture
def store(tmp_path) -> Store:
    """It has the parent, of net A, finished after 7 iterations."""
    found = Store(tmp_path)
    found.stage(KEY).mkdir(parents=True)
    (found.stage(KEY) / "stage.json").write_text(json.dumps({"classes": CLASSES, "stage": {"net": "A"}}))
    (found.stage(KEY) / "result.json").write_text(json.dumps({"checkpoint": "iteration-7"}))
    return found


def test_the_parent_is_found_by_its_key_and_counts_in_the_childs(stages, store):
    keys = stage_keys(stages, classes=CLASSES, fingerprint="0" * 32)

    check_stored_parents(stages, store, CLASSES)
    net, weights = parent_weights(stages[0], stages, keys, store)

    assert net == "A"
    assert weights == store.stage(KEY) / "checkpoints" / "iteration-7" / "model.safetensors"
    other = (stages[0].model_copy(update={"init_from": "stage:" + "f" * 16}), *stages[1:])
    changed = stage_keys(other, classes=CLASSES, fingerprint="0" * 32)
    assert all(changed[name] != keys[name] for name in keys)


def test_a_parent_that_is_absent_unfinished_or_of_other_classes_is_refused_before_anything_starts(stages, store):
    with pytest.raises(RecipeError, match=r"init_from 'stage:0123.*' knows the classes cat, dog, but .* dog, cat"):
        check_stored_parents(stages, store, ["dog", "cat"])

    (store.stage(KEY) / "result.json").unlink()
    with pytest.raises(StoreError, match=r"stage 'D-256': .* has not finished in store"):
        check_stored_parents(stages, store, CLASSES)

    (store.stage(KEY) / "stage.json").unlink()
    with pytest.raises(StoreError, match=r"stage 'D-256': .* is not in store .*`vggrow plan` prints keys"):
        check_stored_parents(stages, store, CLASSES)


def test_a_key_that_is_none_is_a_stage_that_does_not_exist():
    with pytest.raises(RecipeError, match=r"init_from names 'stage:0123', which is no stage here"):
        parse_recipe(RECIPE.replace(KEY, "0123"), place="pets.toml", folder=Path("/somewhere"))
