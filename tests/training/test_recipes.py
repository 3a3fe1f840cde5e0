"""The recipes that come with the product: each can be read, and holds to what its comment says."""

from pathlib import Path

import pytest

from vggcore.nets import layer_table
from vggcore.recipe import load_recipe
from vggcore.schedule import Stage, resolve_stages

RECIPES = Path(__file__).parents[2] / "training" / "recipes"


def cost(stage: Stage) -> int:
    """Multiply-adds of one view through all epochs, forward."""
    table = layer_table(stage.net, classes=2, **stage.net_settings)
    return stage.max_epochs * sum(row.macs for row in table)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_a_recipe_that_comes_with_the_product_is_named_after_its_file(path):
    assert load_recipe(path).name == path.stem


def test_staged_and_direct_have_equal_compute_and_no_early_end():
    stages = {stage.name: stage for stage in resolve_stages(load_recipe(RECIPES / "staged-or-direct.toml"))}

    staged = cost(stages["A"]) + cost(stages["D-from-A"])

    for name in ("D-he", "D-glorot", "D-paper"):
        assert staged == pytest.approx(cost(stages[name]), rel=0.015), name
    assert all(stage.drops == 0 and stage.patience > stage.max_epochs for stage in stages.values())
    assert [stages[name].initialise for name in ("D-from-A", "D-he", "D-glorot", "D-paper")] == ["he", "he", "glorot", "paper"]


def test_the_long_recipe_has_the_published_quarter_for_test_and_all_labels():
    recipe = load_recipe(RECIPES / "elpv-long.toml")

    assert (recipe.data.labels, recipe.data.threshold, recipe.data.split.test) == ("all", 0.5, 0.25)
    assert recipe.data.split.by == "stratified"
