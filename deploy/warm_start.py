"""Where a tick's training starts, the champion's weights or random ones, and the recipe that says so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from deploy.registry import STAGE_KEY_TAG
from training.parents import is_done
from training.store import Store, read_json
from vggcore.class_order import added_classes, spoken_classes
from vggcore.recipe import NewRows, Recipe, StageTable, parse_recipe
from vggcore.recipe_checks import without_effect
from vggcore.schedule import resolve_stages
from vggcore.view_average import effective_views

WARM = "-warm"            # ends the name of a stage that starts from a champion
SLOWER = 0.1              # learning rate against the stage's own: Sec. 3.1 takes 1e-3 in place of 1e-2 on trained weights
SAME = ("net", "head", "features", "width", "crop", "standardise")     # what a champion and the stage must have in common


@dataclass(frozen=True)
class Beginning:
    """Where training starts, and why; the champion's version and stage where it is the champion."""

    warm: bool
    why: str
    version: str | None = None
    stage: str | None = None         # the recipe's stage that is trained on
    stage_key: str | None = None     # the champion's
    wanted: bool = False             # whether the pipeline asks for the champion
    new_classes: tuple[str, ...] = ()    # those that the champion does not know

    @classmethod
    def from_json(cls, found: Mapping[str, Any] | None) -> "Beginning":
        """What a record holds; records from before there were warm starts hold nothing."""
        if not found:
            return cls(False, "warm starts were not known yet")
        return cls(**{**found, "new_classes": tuple(found.get("new_classes", ()))})


def choose_beginning(
    wanted: str, recipe: Recipe, champion: Any, store: Store, classes: Sequence[str], *, recipe_changed: bool
) -> Beginning:
    """From the champion where [start] warm asks for it and it can be, else the whole schedule, with the reason.

    champion: MLflow's ModelVersion, or None. A changed recipe wants the whole schedule, and so do classes that are gone or
    in another order; new ones after the champion's own get rows of their own in its last layer.
    """
    if wanted != "champion":
        return Beginning(False, '[start] warm is "scratch"')
    if champion is None:
        return whole("there is no champion to start from")
    if recipe_changed:
        return whole("the recipe changed since the last training")
    name, key = f"version {champion.version}", champion.tags.get(STAGE_KEY_TAG)
    about = read_json(store.stage(key) / "stage.json") if key else None
    if about is None or not is_done(store, key):
        return whole(f"{name}, the champion, was not trained in this store")
    added = added_classes(about["classes"], classes)
    if added is None:
        return whole(f"the classes are no longer those of {name}, the champion")
    stage_name = str(about["name"]).removesuffix(WARM)
    stage = next((stage for stage in resolve_stages(recipe) if stage.name == stage_name), None)
    if stage is None:
        return whole(f"the recipe has no stage {stage_name!r}, which {name}, the champion, comes from")
    settings = stage.model_dump(mode="json")
    for field in SAME:
        before = about["stage"].get(field)      # stages of before linear heads have no features
        if before != settings[field]:
            return whole(f"{field} is {settings[field]!r}, but {before!r} in {name}, the champion")
    why = f"from {name}, the champion" + (f", with new {spoken_classes(added)}" if added else "")
    return Beginning(True, why, str(champion.version), stage_name, key, wanted=True, new_classes=added)


def whole(why: str) -> Beginning:
    """The whole schedule, though the champion is asked for."""
    return Beginning(False, why, wanted=True)


def warm_recipe(
    recipe: Recipe,
    beginning: Beginning,
    *,
    learning_rate: float | None,
    seed: int,
    place: Path,
    classes: Sequence[str] = (),
    new_rows: NewRows = "means",
) -> tuple[Recipe, str]:
    """The recipe of one stage that goes on from the champion's weights, and its text: all that is needed to run it again.

    learning_rate: None: a tenth of the stage's own. A logistic stage is fitted again on the champion's convs: it has no rate.
    classes: the order of those known, see in_known_order. new_rows: how the last layer's rows of new classes begin.
    """
    own = next(stage for stage in resolve_stages(recipe) if stage.name == beginning.stage)
    table = next(table for table in recipe.stages if table.name == beginning.stage)
    slower = learning_rate or float(f"{SLOWER * own.learning_rate:.6g}")
    settings = table.model_dump(exclude={"learning_rate"}, exclude_unset=True)
    settings |= {"name": f"{table.name}{WARM}", "init_from": f"stage:{beginning.stage_key}"}
    settings.pop("new_rows", None)
    if own.fit == "sgd":
        settings["learning_rate"] = slower
        if own.final_learning_rate:                                        # a cosine keeps its shape
            settings["final_learning_rate"] = float(f"{own.final_learning_rate / own.learning_rate * slower:.6g}")
    warm = StageTable(**settings)
    tables = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    tables.pop("schedule", None)
    for name, key in (("evaluate", "stages"), ("register", "stage")):      # there is one stage: it is meant
        tables.get(name, {}).pop(key, None)
    if own.fit == "logistic":                                              # which has one set of weights
        tables.get("register", {}).pop("weights", None)
    if own.head == "linear":                                               # which is tested in one way
        for key in ("protocol", "scales"):
            tables.get("evaluate", {}).pop(key, None)
    if effective_views(recipe.evaluate.views, recipe.evaluate.protocol, own) == "none":      # what another stage alone used
        tables.get("evaluate", {}).pop("views", None)
    for name in ("net", "augment", "train"):                               # what the others alone used
        for key in without_effect(recipe, table.name) & set(tables.get(name, {})):
            del tables[name][key]
    stage = warm.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    if beginning.new_classes and own.fit == "sgd":       # a logistic fit has no first weights
        stage["new_rows"] = new_rows
    if classes:
        tables["data"]["classes"] = list(classes)
    tables |= {"seed": seed, "stage": [stage]}
    text = f"# {place.name}, warm: stage {table.name} {beginning.why}\n{tomli_w.dumps(tables)}"
    return parse_recipe(text, place=str(place), folder=place.parent), text


def in_known_order(recipe: Recipe, text: str, classes: Sequence[str], place: Path) -> tuple[Recipe, str]:
    """The recipe whose [data] classes are those known, in their order, and its text; without any, the recipe as it is."""
    if not classes or recipe.data.classes is not None:
        return recipe, text
    tables = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    tables["data"]["classes"] = list(classes)
    ordered = f"# {place.name}, its classes in the order of the champion's\n{tomli_w.dumps(tables)}"
    return parse_recipe(ordered, place=str(place), folder=place.parent), ordered
