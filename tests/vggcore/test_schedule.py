"""Stages and their keys: what changes a weight changes the key, and nothing else does."""

from pathlib import Path

import pytest

from vggcore.recipe import BEST_ON_VAL, parse_recipe
from vggcore.schedule import EXEMPT, LATER, Stage, evaluated_stages, resolve_stages, schedule_key, stage_keys

RECIPE = """
name = "pets"
[data]
root = "pictures"
[[stage]]
name = "D-256"
net = "D"
scale = 256
init_from = "A-256"
[[stage]]
name = "A-256"
net = "A"
scale = 256
[[stage]]
name = "D-384"
net = "D"
scale = 384
init_from = "D-256"
learning_rate = 1e-3
max_epochs = 20
"""
CLASSES, FINGERPRINT = ("cat", "dog"), "0" * 32


def stages_of(text: str) -> tuple[Stage, ...]:
    return resolve_stages(parse_recipe(text, place="pets.toml", folder=Path("/somewhere")))


def keys_of(text: str, classes=CLASSES, fingerprint=FINGERPRINT) -> dict[str, str]:
    return stage_keys(stages_of(text), classes=classes, fingerprint=fingerprint)


def test_parents_come_first_and_a_stages_own_settings_win():
    stages = stages_of(RECIPE)

    assert [stage.name for stage in stages] == ["A-256", "D-256", "D-384"]
    assert [stage.learning_rate for stage in stages] == [1e-2, 1e-2, 1e-3]
    assert [stage.max_epochs for stage in stages] == [74, 74, 20]


def test_a_stages_own_first_weights_win_over_those_of_all_nets():
    text = RECIPE.replace('init_from = "A-256"', 'initialise = "glorot"') + '[net]\ninitialise = "he"\nwidth = 0.5'

    stages = {stage.name: stage for stage in stages_of(text)}

    assert {name: stage.initialise for name, stage in stages.items()} == {"A-256": "he", "D-256": "glorot", "D-384": "he"}
    assert {stage.width for stage in stages.values()} == {0.5}


# Every field of the recipe, a changed value, and the stages whose keys must change with it.
ALL = {"A-256", "D-256", "D-384"}
# fmt: off
CHANGES = [
    ("seed",             'name = "pets"\nseed = 8', 'name = "pets"', ALL),
    ("head",             '[net]\nhead = "compact"', "", ALL),
    ("width",            "[net]\nwidth = 0.5", "", ALL),
    ("crop",             "[net]\ncrop = 192", "", ALL),
    ("dropout",          "[net]\ndropout = 0.4", "", ALL),
    ("initialise",       '[net]\ninitialise = "he"', "", ALL),
    ("initialise",       'init_from = "A-256"\ninitialise = "he"', 'init_from = "A-256"', {"D-256", "D-384"}),
    ("standardise",      'root = "pictures"\nstandardise = true', 'root = "pictures"', ALL),
    ("flip",             "[augment]\nflip = false", "", ALL),
    ("colour",           "[augment]\ncolour = 0.2", "", ALL),
    ("global_batch",     "[train]\nglobal_batch = 128", "", ALL),
    ("momentum",         "[train]\nmomentum = 0.8", "", ALL),
    ("weight_decay",     "[train]\nweight_decay = 1e-4", "", ALL),
    ("drops",            "[train]\ndrops = 2", "", ALL),
    ("patience",         "[train]\npatience = 4", "", ALL),
    ("max_epochs",       "[train]\nmax_epochs = 30", "", ALL),
    ("learning_rate",    "[train]\nlearning_rate = 2e-2", "", ALL),
    ("precision",        '[train]\nprecision = "bf16"', "", ALL),
    ("channels_last",    "[train]\nchannels_last = false", "", ALL),
    ("compile",          "[train]\ncompile = true", "", ALL),
    ("all_reduce",       '[train]\nall_reduce = "bf16"', "", ALL),
    ("optimiser",        '[train]\noptimiser = "adamw"', "", ALL),
    ("decay_biases",     "[train]\ndecay_biases = false", "", ALL),
    ("layer_decay",      "[train]\nlayer_decay = 0.8", "", ALL),
    ("rule",             '[train]\nrule = "cosine"', "", ALL),
    ("warmup_epochs",    "[train]\nwarmup_epochs = 2", "", ALL),
    ("final_learning_rate", '[train]\nrule = "cosine"\nfinal_learning_rate = 1e-4', "", ALL),
    ("label_smoothing",  "[train]\nlabel_smoothing = 0.1", "", ALL),
    ("balance",          "[train]\nbalance = 0.5", "", ALL),
    ("class_weights",    '[train]\nclass_weights = "balanced"', "", ALL),
    ("class_weights",    "[train]\nclass_weights = { cat = 2 }", "", ALL),
    ("average",          "[train]\naverage = 3", "", ALL),
    ("view",             'augment = { view = "whole" }', "scale = 384", {"D-384"}),
    ("flip_vertical",    "[augment]\nflip_vertical = true", "", ALL),
    ("quarter_turns",    "[augment]\nquarter_turns = true", "", ALL),
    ("area",             "augment = { area = [0.08, 1.0] }", "scale = 384", {"D-384"}),
    ("aspect",           "augment = { area = [0.08, 1.0], aspect = [0.5, 2.0] }", "scale = 384", {"D-384"}),
    ("mixup",            "[augment]\nmixup = 0.2", "", ALL),
    ("erase",            "[augment]\nerase = 0.25", "", ALL),
    ("freeze",           "freeze = 1\nlearning_rate = 1e-3", "learning_rate = 1e-3", {"D-384"}),
    ("new_rows",         'init_from = "stage:0123456789abcdef"\nnew_rows = "random"', 'init_from = "D-256"', {"D-384"}),
    ("mean",             'mean = "weights"\nlearning_rate = 1e-3', "learning_rate = 1e-3", {"D-384"}),
    ("features",         '[net]\nhead = "linear"\nfeatures = { groups = [3] }', "", ALL),
    ("fit",              'fit = "logistic"\nhead = "linear"', "learning_rate = 1e-3\nmax_epochs = 20", {"D-384"}),
    ("crop",             "crop = 192\nlearning_rate = 1e-3", "learning_rate = 1e-3", {"D-384"}),
    ("standardise",      "standardise = true\nlearning_rate = 1e-3", "learning_rate = 1e-3", {"D-384"}),
    ("flip",             "augment = { flip = false }\nlearning_rate = 1e-3", "learning_rate = 1e-3", {"D-384"}),
    ("momentum",         "momentum = 0.8\nlearning_rate = 1e-3", "learning_rate = 1e-3", {"D-384"}),
    ("net",              'net = "A-LRN"', 'net = "A"', ALL),
    ("scale",            "scale = [256, 288]\ninit_from = \"A-256\"", 'scale = 256\ninit_from = "A-256"', {"D-256", "D-384"}),
    ("learning_rate",    "learning_rate = 2e-3", "learning_rate = 1e-3", {"D-384"}),
    ("init_from",        'scale = 384\ninit_from = "A-256"', 'scale = 384\ninit_from = "D-256"', {"D-384"}),
    ("micro_batch",      "[train]\nmicro_batch = 32", "", set()),
    ("checkpoint_every", '[train]\ncheckpoint_every = "1min"', "", set()),
    ("name",             'name = "first"', 'name = "A-256"', set()),
    ("max_bad",          'root = "pictures"\nmax_bad = 0.5', 'root = "pictures"', set()),
    ("[evaluate]",       '[evaluate]\nprotocol = "centre"', "", set()),
    ("[register]",       "[register]\nfloor = 0.5", "", set()),
    ("recipe's name",    'name = "cats"', 'name = "pets"', set()),
    ("a comment",        "# a word", "", set()),
]
# fmt: on


@pytest.mark.parametrize(("field", "new", "old", "changed"), CHANGES, ids=[f"{row[0]}-{n}" for n, row in enumerate(CHANGES)])
def test_a_key_follows_what_changes_a_weight_and_nothing_else(field, new, old, changed):
    text = RECIPE.replace(old, new) if old else RECIPE + new
    if field == "name":
        text = text.replace('init_from = "A-256"', 'init_from = "first"')

    before, after = keys_of(RECIPE), {name.replace("first", "A-256"): key for name, key in keys_of(text).items()}

    assert text != RECIPE
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_setting_that_came_later_leaves_the_keys_of_who_does_not_use_it():
    stage = stages_of(RECIPE)[0]

    assert keys_of(RECIPE)["A-256"] == "63871f13f3792613"      # as stores have it that were made before [train] all_reduce
    assert Stage.model_validate(stage.model_dump(exclude=set(LATER))) == stage


IDLE = [      # a stage's settings, and one that it does not use with them
    ('rule = "cosine"', "[train]\ndrops = 1"),
    ('rule = "cosine"', "[train]\npatience = 2"),
    ('optimiser = "adamw"', "[train]\nmomentum = 0.8"),
    ("weight_decay = 0", "[train]\ndecay_biases = false"),
    ('learning_rate = 1e-2\nrule = "plateau"', '[train]\nrule = "cosine"\nfinal_learning_rate = 1e-4'),
    ('augment = { area = "none" }\nscale = 384', "[augment]\narea = [0.1, 1.0]\naspect = [1.0, 1.0]"),
]


@pytest.mark.parametrize(("own", "shared"), IDLE)
def test_a_shared_setting_that_a_stage_does_not_use_is_not_in_its_key(own, shared):
    alone = RECIPE.replace("learning_rate = 1e-3", own + "\ninit_from = \"A-256\"").replace('init_from = "D-256"\n', "")
    alone = alone.replace("scale = 384\n", "", "area" in own).replace('init_from = "A-256"\n', "", 2)
    together = alone + shared
    if "area" in shared:
        together = together.replace("scale = 256\n", "")

    assert stages_of(together)[-1].name == "D-384"
    assert keys_of(together)["D-384"] == keys_of(alone)["D-384"]
    assert keys_of(together)["A-256"] != keys_of(alone)["A-256"]


def test_how_new_classes_begin_is_part_of_the_key():
    text = RECIPE.replace('init_from = "D-256"', 'init_from = "stage:0123456789abcdef"')
    means, random = (text.replace("scale = 384", f'scale = 384\nnew_rows = "{how}"') for how in ("means", "random"))

    assert keys_of(text) == keys_of(means)
    assert {name for name, key in keys_of(random).items() if key != keys_of(text)[name]} == {"D-384"}


def test_every_setting_of_a_stage_is_in_the_table_above_or_exempt_by_name():
    tried = {field for field, _, _, _ in CHANGES}

    assert set(Stage.model_fields) - {"weights_digest"} == tried & set(Stage.model_fields)
    assert {field for field, _, _, changed in CHANGES if not changed} >= EXEMPT - {"init_from", "weights_digest"}


LINEAR = """
[[stage]]
name = "linear"
net = "D"
head = "linear"
features = { groups = [3, 4], scales = [96, 160] }
fit = "logistic"
init_from = "weights:keras/vgg16"
"""


@pytest.mark.parametrize(
    "change",
    [
        'optimiser = "adamw"', "learning_rate = 0.1", "global_batch = 7", "max_epochs = 3", "weight_decay = 0.1",
        "label_smoothing = 0.1", 'rule = "cosine"', "balance = 0.5", "average = 2",
    ],
)  # fmt: skip
def test_a_logistic_fits_key_holds_what_can_change_its_one_layer_and_nothing_else(change):
    def key(more: str, old: str = "", new: str = "", digest: str = "d" * 32) -> str:
        stages = [stage for stage in stages_of(RECIPE + LINEAR.replace(old, new) + more) if stage.name == "linear"]
        looked_up = [stage.model_copy(update={"weights_digest": digest}) for stage in stages]
        return stage_keys(looked_up, classes=CLASSES, fingerprint=FINGERPRINT)["linear"]

    assert key("[train]\n" + change) == key("") == key('[net]\ndropout = 0.1\ncrop = 192\n[augment]\nflip = false')
    others = [
        key("", "[96, 160]", "[96]"), key("", "[3, 4]", "[4]"), key("", 'net = "D"', 'net = "E"'), key("", digest="e" * 32),
        key('[train]\nclass_weights = "balanced"'), key('[train]\nprecision = "bf16"'),
    ]  # fmt: skip
    assert len({key(""), *others}) == 7


def test_a_logistic_fit_is_the_same_stage_beside_others_that_have_views_and_rates():
    shared = """[net]\ncrop = 64\ndropout = 0.1\n[augment]\narea = [0.1, 1.0]\nmixup = 0.2
[train]\noptimiser = "adamw"\nmax_epochs = 3\naverage = 2\ncheckpoint_every = "1min"\nbalance = 0.5"""
    top, *stages = RECIPE.replace("scale = 256\n", "").replace("scale = 384\n", "").split("[[stage]]")
    alone = stages_of(top + LINEAR)[0]

    beside = stages_of("[[stage]]".join([top, *stages]) + LINEAR + shared)

    assert [stage for stage in beside if stage.name == "linear"] == [alone]
    assert {stage.crop for stage in beside if stage.name != "linear"} == {64} != {alone.crop}


def test_published_weights_count_as_the_parent_by_their_digest_and_not_by_their_name():
    def key(name: str, digest: str) -> str:
        text = RECIPE.replace('init_from = "A-256"', f'init_from = "weights:{name}"')
        stages = [stage.model_copy(update={"weights_digest": digest}) for stage in stages_of(text)]
        return stage_keys(stages, classes=CLASSES, fingerprint=FINGERPRINT)["D-256"]

    assert key("keras/vgg16", "d" * 32) == key("mine", "d" * 32)
    assert key("mine", "d" * 32) != key("mine", "e" * 32)


def test_stages_of_one_recipe_differ_in_head_width_crop_views_and_optimiser():
    text = RECIPE + LINEAR + """
[[stage]]
name = "narrow"
net = "A"
width = 0.125
crop = 64
dropout = 0.0
initialise = "he"
standardise = true
augment = { view = "whole", flip_vertical = true }
optimiser = "adamw"
rule = "cosine"
global_batch = 16
max_epochs = 38
"""
    stages = {stage.name: stage for stage in stages_of(text)}
    narrow, linear, plain = stages["narrow"], stages["linear"], stages["D-384"]

    assert (narrow.width, narrow.crop, narrow.scale, narrow.view, narrow.flip) == (0.125, 64, (64, 64), "whole", True)
    assert (narrow.optimiser, narrow.rule, narrow.global_batch, narrow.standardise) == ("adamw", "cosine", 16, True)
    assert linear.head == "linear"
    assert linear.features.scales == linear.scale == linear.default_test_scales == (96, 160)
    assert (plain.width, plain.crop, plain.scale, plain.view, plain.optimiser) == (1.0, 224, (384, 384), "crop", "sgd")


def test_random_areas_are_validated_at_the_papers_ratio_of_picture_to_crop():
    text = RECIPE.replace("scale = 384", "augment = { area = [0.08, 1.0] }")

    assert {stage.name: stage.scale for stage in stages_of(text)}["D-384"] == (256, 256)     # 224 * 256 / 224


def test_other_pictures_or_another_order_of_classes_are_another_stage():
    assert set(keys_of(RECIPE).values()).isdisjoint(keys_of(RECIPE, fingerprint="1" * 32).values())
    assert set(keys_of(RECIPE).values()).isdisjoint(keys_of(RECIPE, classes=("dog", "cat")).values())


def test_keys_are_the_same_for_ever():
    assert keys_of(RECIPE) == {"A-256": "63871f13f3792613", "D-256": "07ecd7ad2de5c149", "D-384": "28c6e684f9c1fbbb"}
    assert schedule_key("pets", keys_of(RECIPE)) == "9dbcffb73ec4729b"


def test_test_scales_are_those_of_the_paper_at_its_crop_and_never_below_a_crop():
    a, d, _ = stages_of(RECIPE)
    jittered = d.model_copy(update={"scale": (256, 512)})
    small = a.model_copy(update={"crop": 64, "scale": (68, 68)})

    assert a.default_test_scales == (224, 256, 288)   # Sec. 4.2: S-32, S, S+32
    assert jittered.default_test_scales == (256, 384, 512)   # Sec. 4.2
    assert jittered.middle_scale == 384   # Sec. 4.1
    assert small.default_test_scales == (64, 68, 77)


def test_what_may_be_registered_is_evaluated_too():
    def names(text: str) -> tuple[str, ...]:
        return evaluated_stages(parse_recipe(text, place="x", folder=Path()))

    assert names(RECIPE) == ("D-384",)
    assert names(RECIPE + '[evaluate]\nstages = ["A-256"]') == ("A-256", "D-384")
    assert names(RECIPE + f'[evaluate]\nstages = ["A-256"]\n[register]\nstage = "{BEST_ON_VAL}"') == ("A-256",)
