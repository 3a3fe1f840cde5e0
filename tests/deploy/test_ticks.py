"""When a tick trains: what counts as new, what a model's age does, and what the records of a broken-off tick say."""

import datetime
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.tick_train import renewed
from deploy.ticks import Facts, Ticks, last_trained, news, renewal
from vggcore.errors import RecipeError
from vggcore.recipe import parse_recipe

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime(2026, 11, 24, tzinfo=datetime.UTC)
LAST = Facts(fingerprint="f1", recipe="r1", rules={"alpha": 0.05, "metric": "top1"}, champion="3")
RECIPE = """
name = "solar"   # seed = 5 in a comment is none
{seed}
[data]
root = "pictures"
split = {{ val = 0.2, test = 0.2 }}
[[stage]]
name = "A-256"
net = "A"
scale = 256
"""


def test_nothing_changed_is_nothing_new():
    assert news(LAST, LAST, age=400 * DAY, max_age=None) == ()
    assert news(LAST, LAST, age=29 * DAY, max_age=30 * DAY) == ()


def test_another_champion_alone_is_nothing_new():
    assert news(LAST, replace(LAST, champion="2"), age=DAY, max_age=None) == ()     # a rollback is no reason to train


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (replace(LAST, fingerprint="f2"), "the pictures changed (fingerprint f1 -> f2)"),
        (replace(LAST, recipe="r2"), "the recipe changed"),
        (replace(LAST, rules={"alpha": 0.01, "metric": "top1"}), "gate rules changed: alpha 0.05 -> 0.01"),
        (replace(LAST, champion=None), "there is no champion"),
    ],
)
def test_each_change_is_new_and_named(now, words):
    assert news(LAST, now, age=DAY, max_age=None) == (words,)


def test_the_first_tick_and_a_model_that_is_too_old_are_reasons():
    assert news(None, LAST, age=None, max_age=None) == ("nothing was trained by this pipeline yet",)
    assert news(LAST, LAST, age=31 * DAY, max_age=30 * DAY) == ("the last training is 31 d old, more than max_age 30 d",)


def test_age_alone_raises_the_seed_by_one_each_time_and_other_pictures_begin_again():
    assert renewal(None, LAST, 0, too_old=False) == 0
    assert renewal(LAST, LAST, 2, too_old=True) == 3
    assert renewal(LAST, replace(LAST, rules={"alpha": 0.01}), 2, too_old=False) == 2
    assert renewal(LAST, replace(LAST, fingerprint="f2"), 2, too_old=True) == 0


@pytest.mark.parametrize("seed", ["seed = 7", ""])
def test_a_raised_seed_stands_in_the_recipes_text_too(seed):
    text = RECIPE.format(seed=seed)
    recipe = parse_recipe(text, place="solar.toml", folder=Path("/data"))

    found, changed = renewed(recipe, text, 2, Path("/data/solar.toml"))

    assert found == recipe.model_copy(update={"seed": recipe.seed + 2})
    assert parse_recipe(changed, place="solar.toml", folder=Path("/data")) == found
    assert f"seed = {recipe.seed + 2}   # {recipe.seed} + 2" in changed
    assert renewed(recipe, text, 0, Path("/data/solar.toml")) == (recipe, text)


def test_a_seed_that_cannot_be_raised_in_the_text_is_named():
    text = RECIPE.format(seed='"seed" = 7')       # a quoted key: TOML, but not as people write it
    recipe = parse_recipe(text, place="solar.toml", folder=Path("/data"))

    with pytest.raises(RecipeError, match=r"solar\.toml"):
        renewed(recipe, text, 1, Path("/data/solar.toml"))


def test_an_unfinished_tick_names_its_next_step_and_a_stopped_one_is_not_what_the_next_is_compared_with(tmp_path):
    ticks = Ticks(tmp_path)
    for step in ("scan", "decide", "train", "evaluate", "register", "gate", "promote"):
        ticks.write(1, step, NOW, {})
    ticks.write(1, "notify", NOW, {"outcome": "promoted", "reason": "better"})
    ticks.write(2, "scan", NOW, {})
    ticks.write(2, "notify", NOW, {"outcome": "stopped", "reason": "a class is gone"})
    ticks.write(10, "scan", NOW, {})
    ticks.write(10, "problem", NOW, {"message": "the server is down"})

    found = ticks.all()

    assert [tick.number for tick in found] == [1, 2, 10]
    assert [tick.outcome for tick in found] == ["promoted", "stopped", "unfinished: decide"]
    assert found[-1].reason == "the server is down" and not found[-1].finished
    trained = last_trained(found)
    assert trained is not None and trained.number == 1
