"""A warm start: the champion's stage goes on from its weights where it can; where it can't, the whole schedule, and why."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.warm_start import Beginning, choose_beginning, in_known_order, warm_recipe
from training.store import Store
from vggcore.recipe import load_recipe, parse_recipe
from vggcore.schedule import resolve_stages, stage_keys

RECIPE = """
name = "pets"   # whose?
seed = 4
[data]
root = "pictures"
split = {val = 0.2, test = 0.2, gate = 0.1, by = "hash"}
[net]
crop = 64
[augment]
flip = false
[evaluate]
stages = ["A-72", "D-72"]
protocol = "centre"
[register]
stage = "best on val"
floor = 0.5
[[stage]]
name = "A-72"
net = "A"
scale = 72
[[stage]]
name = "D-72"
net = "D"
scale = [72, 96]
init_from = "A-72"
max_epochs = 9
"""
KEY = "0123456789abcdef"
CLASSES = ("cat", "dog")


def parsed(text: str = RECIPE):
    return parse_recipe(text, place="pets.toml", folder=Path("/somewhere"))


def champion(key: str | None = KEY):
    """What choose_beginning asks of MLflow's ModelVersion; the registry's own is in tests/end_to_end."""
    return SimpleNamespace(version=3, tags={"vggrow.stage_key": key} if key else {})


@pytest.fixture
def store(tmp_path) -> Store:
    """A store in which the champion's stage, D-72, has finished."""
    found = Store(tmp_path)
    folder = found.stage(KEY)
    folder.mkdir(parents=True)
    stage = resolve_stages(parsed())[1].model_dump(mode="json")
    (folder / "stage.json").write_text(json.dumps({"name": "D-72", "classes": list(CLASSES), "stage": stage}))
    (folder / "result.json").write_text("{}")
    return found


def chosen(store, *, wanted="champion", recipe=None, by=None, classes=CLASSES, changed=False) -> Beginning:
    return choose_beginning(wanted, recipe or parsed(), by or champion(), store, classes, recipe_changed=changed)


def test_the_champions_stage_goes_on_from_its_weights(store):
    found = chosen(store)

    assert found == Beginning(True, "from version 3, the champion", "3", "D-72", KEY, wanted=True)


def test_what_cannot_start_warm_trains_the_whole_schedule_and_says_why(store):
    wider = parsed(RECIPE.replace("crop = 64", "crop = 64\nwidth = 0.5"))
    renamed = parsed(RECIPE.replace('"D-72"', '"D-80"'))

    reasons = [
        chosen(store, wanted="scratch").why,
        choose_beginning("champion", parsed(), None, store, CLASSES, recipe_changed=False).why,
        chosen(store, changed=True).why,
        chosen(store, by=champion(key=None)).why,
        chosen(store, by=champion(key="f" * 16)).why,
        chosen(store, classes=("cat",)).why,
        chosen(store, classes=("dog", "cat")).why,
        chosen(store, recipe=renamed).why,
        chosen(store, recipe=wider).why,
    ]

    assert reasons == [
        '[start] warm is "scratch"',
        "there is no champion to start from",
        "the recipe changed since the last training",
        "version 3, the champion, was not trained in this store",
        "version 3, the champion, was not trained in this store",
        "the classes are no longer those of version 3, the champion",
        "the classes are no longer those of version 3, the champion",
        "the recipe has no stage 'D-72', which version 3, the champion, comes from",
        "width is 0.5, but 1.0 in version 3, the champion",
    ]


def test_new_classes_after_the_champions_own_start_warm_and_others_do_not(store):
    found = chosen(store, classes=("cat", "dog", "ant", "fox"))

    assert (found.warm, found.new_classes) == (True, ("ant", "fox"))
    assert found.why == "from version 3, the champion, with new classes 'ant', 'fox'"
    assert Beginning.from_json(json.loads(json.dumps(asdict(found)))) == found
    for others in (("ant", "cat", "dog"), ("cat", "ant", "dog"), ("cat", "ant")):
        assert not chosen(store, classes=others).warm


def test_a_warm_recipe_for_new_classes_keeps_the_champions_order_and_says_how_their_rows_begin(store):
    grown = chosen(store, classes=("cat", "dog", "ant"))
    place = Path("/somewhere/pets.toml")

    recipe, text = warm_recipe(
        parsed(), grown, learning_rate=None, seed=4, place=place, classes=CLASSES, new_rows="random"
    )

    assert recipe.data.classes == CLASSES and resolve_stages(recipe)[0].new_rows == "random"
    assert parse_recipe(text, place="again", folder=Path("/elsewhere")) == recipe


def test_a_whole_schedule_keeps_the_champions_order_too_and_a_recipe_that_has_one_is_left_as_it_is():
    place = Path("/somewhere/pets.toml")
    own = RECIPE.replace('root = "pictures"', 'root = "pictures"\nclasses = ["dog"]')

    recipe, text = in_known_order(parsed(), RECIPE, ("dog", "cat"), place)

    assert recipe.data.classes == ("dog", "cat") and recipe.stages == parsed().stages
    assert parse_recipe(text, place="again", folder=Path("/elsewhere")) == recipe
    assert in_known_order(parsed(), RECIPE, (), place) == (parsed(), RECIPE)
    assert in_known_order(parsed(own), own, ("dog", "cat"), place) == (parsed(own), own)


def test_a_warm_recipe_is_one_stage_of_the_recipe_with_another_beginning(store):
    recipe, text = warm_recipe(parsed(), chosen(store), learning_rate=None, seed=5, place=Path("/somewhere/pets.toml"))

    (stage,) = resolve_stages(recipe)
    plain = resolve_stages(parsed())[1]
    changes = {"name": "D-72-warm", "init_from": f"stage:{KEY}", "learning_rate": 1e-3, "seed": 5}
    assert stage == plain.model_copy(update=changes)
    assert recipe.data == parsed().data and recipe.register_.floor == 0.5 and recipe.evaluate.protocol == "centre"
    assert parse_recipe(text, place="again", folder=Path("/elsewhere")) == recipe
    (key,) = stage_keys([stage], classes=CLASSES, fingerprint="0" * 32).values()
    other = warm_recipe(parsed(), replace(chosen(store), stage_key="f" * 16), learning_rate=None, seed=5, place=Path("p"))
    assert stage_keys(resolve_stages(other[0]), classes=CLASSES, fingerprint="0" * 32).values() != {key}


LINEAR = """
name = "pets"
[data]
root = "pictures"
[net]
head = "linear"
[train]
momentum = 0.8
drops = 1
[register]
stage = "tuned"
[[stage]]
name = "D-linear"
net = "D"
init_from = "weights:keras/vgg16"
fit = "logistic"
features = { groups = [3, 4], scales = [96, 160] }
[[stage]]
name = "tuned"
net = "D"
scale = 256
init_from = "D-linear"
learning_rate = 1e-4
features = { groups = [3, 4] }
"""


def test_a_linear_champion_is_fitted_again_on_its_own_convs(store):
    stage = resolve_stages(parsed(LINEAR))[0].model_dump(mode="json")
    (store.stage(KEY) / "stage.json").write_text(
        json.dumps({"name": "D-linear", "classes": list(CLASSES), "stage": stage})
    )
    begins = chosen(store, recipe=parsed(LINEAR))

    recipe, text = warm_recipe(parsed(LINEAR), begins, learning_rate=1e-5, seed=5, place=Path("/somewhere/pets.toml"))

    (warm,) = resolve_stages(recipe)
    plain = resolve_stages(parsed(LINEAR))[0]
    assert warm == plain.model_copy(update={"name": "D-linear-warm", "init_from": f"stage:{KEY}", "seed": 5})
    assert "learning_rate" not in text
    assert parse_recipe(text, place="again", folder=Path("/elsewhere")) == recipe
    other = parsed(LINEAR.replace("groups = [3, 4], scales", "groups = [4], scales"))
    assert chosen(store, recipe=other).why.startswith("features is {'groups': [4]")


def test_settings_that_only_other_stages_or_a_first_start_used_are_left_out(store):
    flips = RECIPE.replace('protocol = "centre"', 'protocol = "dense"\nviews = "flips"')
    flips = flips.replace('net = "A"\n', 'net = "A"\naugment = { flip_vertical = true }\n')
    flips = flips.replace('init_from = "A-72"', f'init_from = "stage:{"e" * 16}"\nnew_rows = "random"')

    recipe, text = warm_recipe(parsed(flips), chosen(store), learning_rate=None, seed=5, place=Path("/somewhere/pets.toml"))

    assert "views" not in text and "new_rows" not in text and recipe.evaluate.protocol == "dense"
    assert resolve_stages(parsed(flips))[1].flip_vertical is False


def test_the_end_of_a_cosine_is_lowered_as_its_beginning_is(store):
    cosine = parsed(RECIPE.replace("[augment]", '[train]\nrule = "cosine"\nfinal_learning_rate = 5e-3\n[augment]'))

    recipe, _ = warm_recipe(cosine, chosen(store), learning_rate=None, seed=5, place=Path("/somewhere/pets.toml"))

    (stage,) = resolve_stages(recipe)
    assert (stage.learning_rate, stage.final_learning_rate) == (1e-3, 5e-4)


def test_a_champion_that_was_itself_warm_is_gone_on_from(store):
    about = store.stage(KEY) / "stage.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "name": "D-72-warm"}))

    recipe, _ = warm_recipe(parsed(), chosen(store), learning_rate=2e-4, seed=4, place=Path("/somewhere/pets.toml"))

    assert [(stage.name, stage.learning_rate) for stage in resolve_stages(recipe)] == [("D-72-warm", 2e-4)]


RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_whichever_stage_of_a_shipped_recipe_is_champion_a_warm_start_from_it_can_be_read(path, tmp_path):
    recipe = load_recipe(path)
    for stage in resolve_stages(recipe):
        begins = Beginning(True, "from version 1", "1", stage.name, KEY, wanted=True, new_classes=("ant",))

        _, text = warm_recipe(recipe, begins, learning_rate=1e-5, seed=5, place=path, classes=CLASSES)
        (warm,) = resolve_stages(parse_recipe(text, place="again", folder=tmp_path))

        assert (warm.name, warm.init_from, warm.net) == (f"{stage.name}-warm", f"stage:{KEY}", stage.net)
        assert (warm.head, warm.features, warm.crop, warm.view) == (stage.head, stage.features, stage.crop, stage.view)
