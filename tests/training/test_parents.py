"""Where first weights and means come from: found, or refused before anything starts where they cannot serve."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.colour import Colour
from tests.training import small_published
from training.parents import (
    check_named,
    check_parents,
    known_order,
    parent_of,
    published_ancestor,
    recorded_colour,
    settle,
    stage_colour,
)
from training.store import Store
from vggcore.errors import RecipeError, StoreError
from vggcore.recipe import parse_recipe
from vggcore.schedule import resolve_stages, stage_keys

KEY = "0123456789abcdef"
HERE, ELSEWHERE = "0" * 32, "1" * 32       # fingerprints
RECIPE = f"""
name = "pets"
[data]
root = "pictures"
[net]
width = 0.0625
crop = 32
[[stage]]
name = "D-36"
net = "D"
scale = 36
init_from = "stage:{KEY}"
[[stage]]
name = "D-48"
net = "D"
scale = 48
init_from = "D-36"
"""
PUBLISHED = """
[[stage]]
name = "published"
net = "A"
width = 1.0
head = "linear"
features = { groups = [1, 2], scales = [48] }
fit = "logistic"
init_from = "weights:somewhere/vgg11"
[[stage]]
name = "fine"
net = "A"
width = 1.0
head = "linear"
features = { groups = [1, 2] }
scale = 48
init_from = "published"
"""
CLASSES = ["cat", "dog"]
DATA = Colour(mean=np.array([1.0, 2.0, 3.0]), deviation=np.full(3, 50.0), axes=np.eye(3), eigenvalues=np.ones(3))
THEIRS = [123.68, 116.779, 103.939]


def recipe_of(text=RECIPE):
    return parse_recipe(text, place="pets.toml", folder=Path("/somewhere"))


def stages_of(text=RECIPE):
    return resolve_stages(recipe_of(text))


def keys_of(stages):
    return stage_keys(stages, classes=CLASSES, fingerprint=HERE)


@pytest.fixture
def store(tmp_path) -> Store:
    """It has the parent, of net A, finished after 7 iterations on these pictures."""
    found = Store(tmp_path)
    stage = resolve_stages(
        parse_recipe(RECIPE.replace('net = "D"', 'net = "A"').split("[[stage]]\nname = \"D-48\"")[0], place="x", folder=Path())
    )[0].model_copy(update={"init_from": None})
    found.stage(KEY).mkdir(parents=True)
    about = {"name": "A-36", "classes": CLASSES, "fingerprint": HERE, "stage": stage.model_dump(mode="json")}
    (found.stage(KEY) / "stage.json").write_text(json.dumps(about))
    (found.stage(KEY) / "result.json").write_text(json.dumps({"checkpoint": "iteration-7"}))
    for fingerprint, mean in ((HERE, DATA.mean), (ELSEWHERE, np.array([9.0, 9.0, 9.0]))):
        found.data(fingerprint).mkdir(parents=True)
        colour = {**DATA.to_json(), "mean": mean.tolist()}
        (found.data(fingerprint) / "colour.json").write_text(json.dumps(colour))
    return found


def publish(store: Store) -> str:
    """Leaves the convs of net A in the store as imported weights; their digest."""
    return small_published.publish(store, "somewhere/vgg11").digest


def change(store: Store, **about) -> None:
    path = store.stage(KEY) / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about))


def test_the_parent_is_found_by_its_key_and_counts_in_the_childs(store):
    stages = settle(stages_of(), store, HERE)
    keys = keys_of(stages)

    parent = parent_of(stages[0], stages, keys, store, CLASSES)

    assert parent.weights == store.stage(KEY) / "checkpoints" / "iteration-7" / "model.safetensors"
    assert parent.key == KEY and len(parent.tensors) == 14       # Sec. 3.1's four convs, three FC layers
    other = (stages[0].model_copy(update={"init_from": "stage:" + "f" * 16}), *stages[1:])
    assert all(keys_of(other)[name] != keys[name] for name in keys)


def test_a_parent_that_is_absent_unfinished_or_of_other_classes_is_refused_before_anything_starts(store):
    stages = settle(stages_of(), store, HERE)

    with pytest.raises(RecipeError, match=r"init_from 'stage:0123.*' knows the classes cat, dog, but .* dog, cat"):
        check_parents(stages, store, ["dog", "cat"])

    (store.stage(KEY) / "result.json").unlink()
    with pytest.raises(StoreError, match=r"stage 'D-36': .* has not finished in store"):
        settle(stages_of(), store, HERE)

    (store.stage(KEY) / "stage.json").unlink()
    with pytest.raises(StoreError, match=r"stage 'D-36': .* is not in store .*`vggrow plan` prints keys"):
        settle(stages_of(), store, HERE)


def test_a_parent_may_lack_the_last_classes_and_no_others(store):
    stages = settle(stages_of(RECIPE.replace('net = "D"', 'net = "A"')), store, HERE)
    random = (stages[0].model_copy(update={"new_rows": "random"}), *stages[1:])

    origins = check_parents(stages, store, ["cat", "dog", "ant"])
    parent = parent_of(stages[0], stages, keys_of(stages), store, ["cat", "dog", "ant"])

    assert [origin.added for origin in origins["D-36"]][-1] == ("ant",) == parent.added
    assert all(origin.added == () for origin in (*origins["D-36"][:-1], *origins["D-48"]))
    check_parents(random, store, ["cat", "dog", "ant"])
    for classes in (["ant", "cat", "dog"], ["cat", "ant"], ["cat"]):
        with pytest.raises(RecipeError, match=r"knows the classes cat, dog, but .* others after them \(\[data\] classes"):
            check_parents(stages, store, classes)
    with pytest.raises(RecipeError, match=r"stage 'D-36': new_rows has no effect: 'stage:0123.*' gives no last layer"):
        check_parents(random, store, CLASSES)


def test_the_known_order_is_the_recipes_else_that_of_the_parent_in_the_store(store):
    data, stages = recipe_of().data, stages_of()
    change(store, classes=["dog", "cat"])

    assert known_order(stages, store, data) == ("dog", "cat")
    assert known_order(stages, store, data.model_copy(update={"classes": ("cat",)})) == ("cat",)
    assert known_order([stage.model_copy(update={"init_from": None}) for stage in stages], store, data) == ()
    (store.stage(KEY) / "stage.json").unlink()
    with pytest.raises(StoreError, match="is not in store"):
        known_order(stages, store, data)


def test_a_parent_of_another_width_is_refused_before_anything_starts(store):
    stages = settle(stages_of(RECIPE.replace("0.0625", "0.125")), store, HERE)

    with pytest.raises(RecipeError, match=r"stage 'D-36': net D from 'stage:0123.*: its features.0.weight is \(4, 3, 3, 3\)"):
        check_parents(stages, store, CLASSES)


def test_a_key_that_is_none_is_a_stage_that_does_not_exist():
    with pytest.raises(RecipeError, match=r"init_from names 'stage:0123', which is not a stage of this recipe"):
        parse_recipe(RECIPE.replace(KEY, "0123"), place="pets.toml", folder=Path("/somewhere"))


def test_stages_on_the_pictures_of_their_parent_keep_their_keys_and_take_the_pictures_mean(store):
    stages = settle(stages_of(), store, HERE)

    assert [stage.mean for stage in stages] == ["data", "data"]
    assert keys_of(stages) == keys_of(stages_of())
    assert stage_colour(stages[0], keys_of(stages), store, DATA) == DATA


def test_a_parents_mean_that_is_the_pictures_own_makes_no_other_stage(store):
    stages = settle(stages_of(RECIPE.replace("scale = 48", 'scale = 48\nmean = "weights"')), store, HERE)

    assert keys_of(stages) == keys_of(stages_of())


def test_new_pictures_leave_the_mean_under_the_old_weights_as_it_was(store):
    change(store, fingerprint=ELSEWHERE)

    stages = settle(stages_of(), store, HERE)
    keys = keys_of(stages)

    assert [stage.mean for stage in stages] == ["weights", "weights"]
    assert set(keys.values()).isdisjoint(keys_of(stages_of()).values())
    assert stage_colour(stages[0], keys, store, DATA).mean.tolist() == [9.0, 9.0, 9.0]      # of the parent's pictures


def test_a_stage_that_recorded_its_mean_gives_that_one(store):
    change(store, fingerprint=ELSEWHERE, mean=THEIRS, deviation=None)

    assert recorded_colour(store, KEY).mean.tolist() == THEIRS
    stages = settle(stages_of(), store, HERE)
    assert stage_colour(stages[0], keys_of(stages), store, DATA).mean.tolist() == THEIRS


def test_the_pictures_mean_can_be_asked_for_by_name(store):
    change(store, fingerprint=ELSEWHERE)

    stages = settle(stages_of(RECIPE.replace("scale = 36", 'scale = 36\nmean = "data"')), store, HERE)

    assert stages[0].mean == "data"


def test_published_weights_bring_their_mean_to_all_that_start_from_them(store):
    digest = publish(store)

    stages = settle(stages_of(RECIPE + PUBLISHED), store, HERE)
    named = {stage.name: stage for stage in stages}
    keys = keys_of(stages)

    assert named["published"].weights_digest == digest
    assert (named["published"].mean, named["fine"].mean) == ("weights", "weights")
    assert stage_colour(named["published"], keys, store, DATA).mean.tolist() == THEIRS
    parent = parent_of(named["published"], stages, keys, store, CLASSES)
    assert (parent.key, parent.name) == (f"weights:{digest}", "weights:somewhere/vgg11")
    origins = check_parents(stages, store, CLASSES)
    assert [(origin.layer, origin.source) for origin in origins["published"]] == [
        ("conv1_1", "weights:somewhere/vgg11"), ("conv2_1", "weights:somewhere/vgg11"), ("fc1", None)
    ]  # fmt: skip
    assert {origin.source for origin in origins["fine"]} == {"'published'"}

    content = bytearray(parent.weights.read_bytes())
    content[-1] ^= 1
    parent.weights.write_bytes(content)
    with pytest.raises(StoreError, match="the weights were changed or damaged; run vggrow weights remove somewhere/vgg11"):
        parent_of(named["published"], stages, keys, store, CLASSES)


def test_weights_that_are_not_there_and_a_deviation_that_they_do_not_have_are_one_line_each(store):
    for look in (lambda stages: check_named(stages, store), lambda stages: settle(stages, store, HERE)):
        with pytest.raises(StoreError, match=r"somewhere/vgg11"):
            look(stages_of(RECIPE + PUBLISHED))

    publish(store)
    text = RECIPE + PUBLISHED.replace('fit = "logistic"', 'fit = "logistic"\nstandardise = true')
    with pytest.raises(RecipeError, match=r"stage 'published': standardise = true, but weights:somewhere/vgg11 have their dev"):
        settle(stages_of(text), store, HERE)


def test_a_stage_that_takes_its_parents_mean_must_be_standardised_as_it_was(store):
    change(store, fingerprint=ELSEWHERE)
    text = RECIPE.replace('root = "pictures"', 'root = "pictures"\nstandardise = true')

    with pytest.raises(RecipeError, match=r"stage 'D-36': standardise is true, expected false as in 'stage:0123"):
        settle(stages_of(text), store, HERE)


def test_a_stage_that_asks_for_the_pictures_mean_need_not_be_standardised_as_its_parent(store):
    text = RECIPE.replace('root = "pictures"', 'root = "pictures"\nstandardise = true')

    stages = settle(stages_of(text.replace("scale = 36", 'scale = 36\nmean = "data"')), store, HERE)

    assert (stages[0].mean, stages[0].standardise) == ("data", True)      # its parent in the store is not


@pytest.mark.parametrize(
    ("of_all", "own", "words"),
    [
        ("true", ("published", "false"), r"stage 'fine': standardise is true, expected false as in 'published'"),
        ("false", ("fine", "true"), r"stage 'fine': standardise is true, expected false as in 'published'"),
        ("true", ("D-36", "false"), r"stage 'D-36': standardise is false, expected true as in 'stage:0123"),
        ("false", ("D-48", "true"), r"stage 'D-48': standardise is true, expected false as in 'D-36'"),
    ],
)
def test_a_mean_passed_down_a_recipe_comes_with_its_deviation_or_is_refused(store, of_all, own, words):
    publish(store)
    about = json.loads((store.stage(KEY) / "stage.json").read_text())
    record = about["stage"] | {"standardise": of_all == "true"}
    change(store, fingerprint=ELSEWHERE, stage=record)
    text = (RECIPE + PUBLISHED).replace('root = "pictures"', f'root = "pictures"\nstandardise = {of_all}')
    text = text.replace(f'name = "{own[0]}"\n', f'name = "{own[0]}"\nstandardise = {own[1]}\n')

    with pytest.raises(RecipeError, match=words):
        settle(stages_of(text), store, HERE)


def test_a_stage_is_traced_to_the_published_weights_that_it_goes_back_to(store):
    publish(store)
    named = {stage.name: stage for stage in stages_of(RECIPE + PUBLISHED)}

    def ancestor(name):
        return published_ancestor(named[name], tuple(named.values()), store)

    assert ancestor("fine") == ancestor("published") == "weights:somewhere/vgg11"
    assert ancestor("D-36") is ancestor("D-48") is None
    grandparent = "f" * 16
    (store.stage(grandparent)).mkdir(parents=True)
    record = json.loads((store.stage(KEY) / "stage.json").read_text())
    other = record | {"stage": record["stage"] | {"init_from": "weights:somewhere/vgg11"}}
    (store.stage(grandparent) / "stage.json").write_text(json.dumps(other))
    (store.stage(grandparent) / "result.json").write_text("{}")
    change(store, stage=record["stage"] | {"init_from": "first"}, parent={"key": grandparent, "name": "'first'"})
    assert ancestor("D-48") == "weights:somewhere/vgg11"
