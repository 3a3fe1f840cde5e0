"""A recipe's stages with every setting resolved, and what cannot be, or would have no effect, refused before anything starts.

Pure, and free of torch: a mistake in a recipe answers at once. What needs the store or a net's shapes is checked by
training.parents.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vggcore.recipe import Evaluate, Features, Recipe, StageTable

Settings = Mapping[str, Any]

LARGEST_SIDE = 16_384           # pixels, of a crop and of a scale
PICTURE_TO_CROP = 256 / 224     # shorter side to crop where validation reads the pictures of random areas (Sec. 3.1's S)

# What a stage's table says of itself; all its other keys take the place of a key of [net], [data], [augment] or [train].
OWN = frozenset({"name", "net", "scale", "init_from", "mean", "fit", "freeze", "new_rows", "augment"})

NONE = "none"       # switches a setting of a shared table off in one stage: TOML has no null

# Settings that only some stages use: when, and what to say of the others.
USED: dict[str, tuple[Callable[[Settings], bool], str]] = {
    "features": (lambda stage: stage["head"] == "linear", 'without head = "linear"'),
    "dropout": (lambda stage: stage["head"] != "linear", 'with head = "linear"'),
    "momentum": (lambda stage: stage["optimiser"] == "sgd", 'with optimiser = "adamw"'),
    "decay_biases": (lambda stage: stage["weight_decay"] > 0, "with weight_decay = 0"),
    "drops": (lambda stage: stage["rule"] == "plateau", 'with rule = "cosine"'),
    "patience": (lambda stage: stage["rule"] == "plateau", 'with rule = "cosine"'),
    "final_learning_rate": (lambda stage: stage["rule"] == "cosine", 'without rule = "cosine"'),
    "aspect": (lambda stage: stage["area"] is not None, "without area"),
}
# A logistic fit has no views, no rate and no epochs: of [net], [data], [augment] and [train] it uses these.
LOGISTIC_USES = frozenset({"head", "features", "width", "standardise", "precision", "class_weights"})


def stored_key(init_from: str | None) -> str | None:
    """The key in an init_from such as "stage:3f0c6a52b1d94e77", a finished stage of the store; None for anything else."""
    found = re.fullmatch(r"stage:([0-9a-f]{16})", init_from or "")
    return found[1] if found else None


def weights_name(init_from: str | None) -> str | None:
    """The name, or digest, in an init_from such as "weights:keras/vgg16", published weights; None for anything else."""
    found = re.fullmatch(r"weights:(\S+)", init_from or "")
    return found[1] if found else None


def nearest(word: str, known: list[str]) -> str:
    """The hint '; did you mean ...?' with the known word nearest to `word`, else the list of the known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(map(repr, known))}"


def written_settings(recipe: "Recipe", table: "StageTable") -> dict[str, Any]:
    """The stage's settings as the recipe's tables have them, its own over those of [net], [data], [augment] and [train]."""
    settings = {**dict(recipe.net), "standardise": recipe.data.standardise, **dict(recipe.augment), **dict(recipe.train)}
    settings |= {name: getattr(table, name) for name in own_keys(table)}
    if table.augment is not None:
        settings |= {name: getattr(table.augment, name) for name in table.augment.model_fields_set}
    for name in ("area", "class_weights"):
        settings[name] = None if settings[name] == NONE else settings[name]
    own = {"net": table.net, "fit": table.fit, "freeze": table.freeze, "mean": table.mean}
    return settings | own | {"new_rows": table.new_rows or "means"}


def own_keys(table: "StageTable") -> set[str]:
    """The keys of [net], [data] and [train] that the stage has a value of its own for."""
    return {name for name in table.model_fields_set - OWN if getattr(table, name) is not None}


def stage_settings(recipe: "Recipe", table: "StageTable") -> dict[str, Any]:
    """Every setting of a stage, resolved; those without a meaning for it at their neutral value.

    "scale" is (low, high), "features" is None or has its scales. Raises ValueError, with the stage's name, for what
    cannot be.
    """
    from vggcore.recipe import Augment, Features, Net, Train  # the models know this module

    settings = written_settings(recipe, table)
    neutral = dict(Augment()) | dict(Train())
    if table.fit == "logistic":
        unused = dict(Net()) | neutral | dict(Augment(flip=False, colour=0.0))
        settings |= {name: value for name, value in unused.items() if name not in LOGISTIC_USES}
    settings |= {name: neutral[name] for name, (used, _) in USED.items() if name in neutral and not used(settings)}
    if settings["head"] == "linear":
        settings |= {"features": settings["features"] or Features(), "dropout": 0.0}
    else:
        settings["features"] = None
    if table.fit == "logistic" and settings["head"] != "linear":
        raise ValueError(f'stage {table.name!r}: fit = "logistic" needs head = "linear", got {settings["head"]!r}')
    scale = settings["scale"] = stage_scale(table, settings)
    features = settings["features"]
    if features is not None and features.scales is None:
        settings["features"] = features.model_copy(update={"scales": (sum(scale) // 2,)})
    return settings


def stage_scale(table: "StageTable", settings: Settings) -> tuple[int, int]:
    """The shorter side S as (low, high), given or implied. Raises ValueError where it is absent or has no effect."""
    name, crop, features = table.name, settings["crop"], settings["features"]
    if settings["area"] is not None:
        if settings["view"] == "whole":
            raise ValueError(f'stage {name!r}: area has no effect with view = "whole": each view is the whole picture')
        if table.scale is not None:
            raise ValueError(f"stage {name!r}: scale has no effect with area, which says what a crop covers; remove one")
        side = round(crop * PICTURE_TO_CROP)
        return (side, side)
    if settings["view"] == "whole":
        if table.scale not in (None, (crop, crop)):
            raise ValueError(
                f'stage {name!r}: scale is {list(table.scale or ())}, but with view = "whole" a view is the picture at'
                f" {crop} x {crop}, its crop; remove scale"
            )
        return (crop, crop)
    if table.scale is None and features is not None and features.scales:
        return (features.scales[0], features.scales[-1])
    if table.scale is None and table.fit == "logistic":
        raise ValueError(
            f"stage {name!r}: features.scales is missing, the shorter sides of the pictures; set features.scales = [224], say"
        )
    if table.scale is None:
        raise ValueError(f"stage {name!r}: scale is missing")
    if table.fit == "logistic" and features is not None and features.scales:
        raise ValueError(f"stage {name!r}: scale has no effect with features.scales; remove one of the two")
    return table.scale


def check_recipe(recipe: "Recipe") -> None:
    """ValueError for what cannot be in a recipe whose tables have been read one by one."""
    tables = recipe.stages
    check_names(tables)
    stages = {table.name: stage_settings(recipe, table) for table in tables}
    for table in tables:
        check_stage(table, stages)
    check_effects(recipe, stages)
    check_layer_decay(recipe, stages)
    check_circles(tables)
    check_test(recipe, stages)


def check_names(tables: Sequence["StageTable"]) -> None:
    """ValueError for two stages of one name, or a parent that is none."""
    names: list[str] = []
    for table in tables:
        if table.name in names:
            raise ValueError(f"stage {table.name!r} is defined twice; each needs its own name")
        names.append(table.name)
    for table in tables:
        parent = table.init_from
        if parent is not None and parent not in names and stored_key(parent) is None and weights_name(parent) is None:
            hint = nearest(parent, names)
            raise ValueError(f"stage {table.name!r}: init_from names {parent!r}, which is not a stage of this recipe{hint}")


def check_circles(tables: Sequence["StageTable"]) -> None:
    """ValueError for stages that start from each other in a circle."""
    parents = {table.name: table.init_from for table in tables}
    for table in tables:
        seen = [table.name]
        while (parent := parents[seen[-1]]) is not None and parent in parents:
            if parent in seen:
                circle = " from ".join([*seen[seen.index(parent) :], parent])
                raise ValueError(f"stages start from each other in a circle: {circle}; one must start without init_from")
            seen.append(parent)


def check_stage(table: "StageTable", stages: Mapping[str, Settings]) -> None:
    """ValueError for settings of one stage that contradict each other."""
    place, stage, parent = f"stage {table.name!r}", stages[table.name], table.init_from
    check_scale(table, stage)
    top = max(stage["features"].groups) if stage["features"] else 5
    if table.freeze > top:
        raise ValueError(f"{place}: freeze = {table.freeze}, but its net ends after group {top}; freeze {top} at most")
    if table.freeze and parent is None:
        raise ValueError(f"{place}: freeze = {table.freeze}, but without init_from its layers are random; remove freeze")
    if table.new_rows is not None and stored_key(parent) is None:
        raise ValueError(
            f'{place}: new_rows has no effect without init_from = "stage:<key>": only such a parent can have fewer classes;'
            " remove it"
        )
    if table.mean == "weights" and parent is None:
        raise ValueError(f'{place}: mean = "weights", but without init_from no weights bring one; remove mean')
    if table.fit == "logistic":
        check_logistic(table, stage)
    elif stage["features"] and (len(stage["features"].scales) > 1 or stage["features"].flip):
        raise ValueError(f'{place}: several features.scales, and features.flip, need fit = "logistic"; give one scale')
    if table.fit == "sgd":
        check_weighing(table, stage)
        check_epochs(place, stage)
    check_initialise(table, stages)


def check_scale(table: "StageTable", stage: Settings) -> None:
    """ValueError for a scale that the net, or its crop, does not fit."""
    (low, high), crop, features = stage["scale"], stage["crop"], stage["features"]
    if features is not None:
        smallest = 2 ** max(features.groups)      # pixels of which one place is left after so many poolings
        for side in features.scales:
            if side < smallest:
                raise ValueError(
                    f"stage {table.name!r}: features.scales has {side}, but group {max(features.groups)} needs {smallest}"
                    " pixels at least"
                )
    if table.fit == "sgd" and not crop <= low <= high:
        raise ValueError(
            f"stage {table.name!r}: scale is {[low, high]}, but needs {crop} <= low <= high;"
            f" a {crop}x{crop} crop must fit in the shorter side"
        )


def check_logistic(table: "StageTable", stage: Settings) -> None:
    """ValueError for what a logistic fit cannot have."""
    place = f"stage {table.name!r}"
    if table.init_from is None:
        raise ValueError(
            f'{place}: fit = "logistic" trains the last layer alone and needs init_from for all others, such as'
            ' "weights:keras/vgg16"'
        )
    others = {name for name in ("augment", "freeze", "new_rows") if getattr(table, name)}
    unused = (own_keys(table) | others) - LOGISTIC_USES
    if unused:
        raise ValueError(f'{place}: {sorted(unused)[0]} has no effect with fit = "logistic"; remove it')


def check_weighing(table: "StageTable", stage: Settings) -> None:
    """ValueError for a stage whose classes are weighed in two ways."""
    if not stage["balance"] or stage["class_weights"] is None:
        return
    own = own_keys(table)
    if "balance" in own and "class_weights" not in own:
        advice = 'set class_weights = "none" in this stage'
    elif "class_weights" in own and "balance" not in own:
        advice = "set balance = 0 in this stage"
    else:
        advice = "keep one of the two"
    raise ValueError(f"stage {table.name!r}: class_weights and balance both weigh classes; {advice}")


def check_epochs(place: str, stage: Settings) -> None:
    """ValueError for a warm-up or an average that is longer than the stage."""
    epochs = stage["max_epochs"]
    if stage["warmup_epochs"] >= epochs and stage["warmup_epochs"]:
        raise ValueError(f"{place}: warmup_epochs is {stage['warmup_epochs']}, expected less than max_epochs, {epochs}")
    if stage["average"] > epochs:
        raise ValueError(f"{place}: average is {stage['average']} epochs, expected at most max_epochs, {epochs}")
    if stage["final_learning_rate"] > stage["learning_rate"]:
        raise ValueError(
            f"{place}: final_learning_rate is {stage['final_learning_rate']:g}, expected at most"
            f" learning_rate, {stage['learning_rate']:g}"
        )


def same_features(one: "Features | None", other: "Features | None") -> bool:
    """Whether two linear layers see the same values; sizes of pictures apart, as long as there are as many."""
    if one is None or other is None:
        return one is other
    return (one.groups, one.pool, len(one.scales or ())) == (other.groups, other.pool, len(other.scales or ()))


def check_initialise(table: "StageTable", stages: Mapping[str, Settings]) -> None:
    """ValueError for first weights of a stage whose parent gives every layer."""
    parent = table.init_from
    if table.initialise is None or parent not in stages:
        return
    here, there = stages[table.name], stages[str(parent)]
    same = all(here[name] == there[name] for name in ("net", "head", "width"))
    if same and same_features(here["features"], there["features"]):
        net = here["net"]
        raise ValueError(
            f"stage {table.name!r}: initialise has no effect: {parent!r} is a net {net} too and gives every layer; remove it,"
            " or init_from"
        )


def check_effects(recipe: "Recipe", stages: Mapping[str, Settings]) -> None:
    """ValueError for the first setting without effect: of a stage, or of a table that all stages share."""
    logistic = all(table.fit == "logistic" for table in recipe.stages)
    for table in recipe.stages:
        written = own_keys(table) | (table.augment.model_fields_set if table.augment else set())
        for name in sorted(written & USED.keys()):
            used, words = USED[name]
            if not used(stages[table.name]):
                raise ValueError(f"stage {table.name!r}: {name} has no effect {words}; remove it")
    for place, shared in (("net", recipe.net), ("augment", recipe.augment), ("train", recipe.train)):
        unused = sorted(shared.model_fields_set - LOGISTIC_USES) if logistic else []
        if unused:
            raise ValueError(f'[{place}] {unused[0]} has no effect: every stage has fit = "logistic"; remove it')
        for name in sorted(shared.model_fields_set & USED.keys()):
            used, words = USED[name]
            if not any(used(stage) for stage in stages.values()):
                raise ValueError(f"[{place}] {name} has no effect {words}; remove it")


def decays(stage: Settings) -> bool:
    """Whether a stage trains a conv group, whose rate layer_decay lowers."""
    top = max(stage["features"].groups) if stage["features"] else 5
    return bool(stage["fit"] == "sgd" and stage["freeze"] < top)


def check_layer_decay(recipe: "Recipe", stages: Mapping[str, Settings]) -> None:
    """ValueError for a layer_decay of stages that train no conv group."""
    for table in recipe.stages:
        if table.layer_decay not in (None, 1) and not decays(stages[table.name]):
            raise ValueError(
                f"stage {table.name!r}: layer_decay has no effect with freeze = {table.freeze}, which leaves no conv group to"
                " train; remove it"
            )
    if recipe.train.layer_decay != 1 and not any(map(decays, stages.values())):
        raise ValueError("[train] layer_decay has no effect: no stage trains a conv group; remove it")


def without_effect(recipe: "Recipe", name: str) -> set[str]:
    """The keys of [net], [augment] and [train] that one stage does not use."""
    table = next(table for table in recipe.stages if table.name == name)
    settings = stage_settings(recipe, table)
    unused = {key for key, (used, _) in USED.items() if not used(settings)}
    if table.fit == "logistic":
        tables = (recipe.net, recipe.augment, recipe.train)
        unused |= {key for shared in tables for key in type(shared).model_fields} - LOGISTIC_USES
    return unused


def registrable(recipe: "Recipe") -> list["StageTable"]:
    """The stages whose result can become a registered version, by [register] stage."""
    from vggcore.recipe import BEST_ON_VAL  # the models know this module

    wanted = recipe.register_.stage or recipe.stages[-1].name
    return [table for table in recipe.stages if wanted in (BEST_ON_VAL, table.name)]


def check_linear_test(evaluate: "Evaluate") -> None:
    """ValueError for settings of a test of linear heads alone: it has one way, whole pictures at features.scales."""
    if evaluate.views != "none":
        raise ValueError(f'[evaluate] views = "{evaluate.views}" has no effect on linear heads; set features.flip instead')
    for name in ("protocol", "scales"):
        if name in evaluate.model_fields_set and getattr(evaluate, name) is not None:
            raise ValueError(
                f"[evaluate] {name} has no effect on linear heads, which see whole pictures at features.scales; remove it"
            )


def check_test(recipe: "Recipe", stages: Mapping[str, Settings]) -> None:
    """ValueError for an [evaluate] or [register] that the stages do not allow."""
    from vggcore.recipe import BEST_ON_VAL  # the models know this module

    names, evaluate, register = list(stages), recipe.evaluate, recipe.register_
    for name in evaluate.stages or ():
        if name not in names:
            raise ValueError(f"[evaluate] stages: no stage {name!r}{nearest(name, names)}")
    if register.stage not in (None, BEST_ON_VAL, *names):
        raise ValueError(f"[register] stage: no stage {register.stage!r}{nearest(str(register.stage), [*names, BEST_ON_VAL])}")
    chosen = [table.name for table in registrable(recipe)]
    measured = [stages[name] for name in {*(evaluate.stages or names[-1:]), *chosen} if stages[name]["head"] != "linear"]
    if not measured:
        check_linear_test(evaluate)
    for scale in evaluate.scales or ():
        if scale < (crop := max(stage["crop"] for stage in measured)):
            raise ValueError(f"[evaluate] scales: {scale} is below the crop, {crop}; a net needs its crop at least")
    if evaluate.views == "flips" and evaluate.protocol == "dense" and not any(one["flip_vertical"] for one in measured):
        raise ValueError(
            '[evaluate] views = "flips" has no effect with protocol = "dense", which averages with the mirror image, unless a'
            " stage has [augment] flip_vertical; remove it"
        )
    if evaluate.views == "turns":
        for name in {*(evaluate.stages or names[-1:]), *chosen}:
            if stages[name]["head"] != "linear" and not stages[name]["quarter_turns"]:
                raise ValueError(
                    f'[evaluate] views = "turns": stage {name!r} is not trained on turned pictures, and turning them at test'
                    " would mislead it; set [augment] quarter_turns = true"
                )
    trained = [name for name in chosen if stages[name]["fit"] == "sgd"]
    if register.weights != "last" and not trained:
        raise ValueError(f'[register] weights has no effect: stage {chosen[0]!r} has fit = "logistic", and one set of weights')
    for name in trained:
        if register.weights == "average" and not stages[name]["average"]:
            raise ValueError(f'[register] weights = "average": stage {name!r} has no average; set [train] average')
