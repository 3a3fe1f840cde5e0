"""The recipe: what is read, and the one line that each mistake gets."""

import pickle
import re
from pathlib import Path

import pytest

import vggcore.errors
from vggcore.errors import RecipeError, VggrowError
from vggcore.recipe import CheckpointEvery, Recipe, load_recipe, parse_recipe
from vggcore.schedule import resolve_stages

PETS = """
name = "pets"
seed = 7
[data]
root = "pictures"
[net]
crop = 64
[train]
patience = 3
checkpoint_every = "30s"
[[stage]]
name = "A-72"
net = "A"
scale = 72
[[stage]]
name = "D-72-96"
net = "D"
scale = [72, 96]
init_from = "A-72"
learning_rate = 1e-3
"""


def pets(old: str = "", new: str = "") -> Recipe:
    assert old in PETS
    return parse_recipe(PETS.replace(old, new) if old else PETS + new, place="pets.toml", folder=Path("/somewhere"))


def test_a_recipe_reads_into_frozen_stages_with_the_defaults_of_the_paper():
    recipe = pets()

    assert recipe.data.root == Path("/somewhere/pictures")
    assert [stage.scale for stage in recipe.stages] == [(72, 72), (72, 96)]
    assert (recipe.train.global_batch, recipe.train.momentum, recipe.train.weight_decay) == (256, 0.9, 5e-4)   # Sec. 3.1
    assert (recipe.train.learning_rate, recipe.train.drops, recipe.net.dropout, recipe.train.max_epochs) == (1e-2, 3, 0.5, 74)
    with pytest.raises(Exception, match="frozen"):
        recipe.train.patience = 4


# fmt: off
MISTAKES = [
    ("patience = 3",         "pacience = 3",            r"pets.toml: \[train\]: unknown key 'pacience'; did you mean 'patience'\?"),
    ("seed = 7",             "sed = 7",                 r"pets.toml: unknown key 'sed'; did you mean 'seed'\?"),
    ("scale = 72\n",         "scale = 72\nlr = 1\n",    r"stage 'A-72': unknown key 'lr'; there are 'name', 'net', 'scale'"),
    ("patience = 3",         "patience = 'three'",      r"\[train\] patience: expected a whole number, got 'three'"),
    ("patience = 3",         "patience = '3'",          r"\[train\] patience: expected a whole number, got '3'"),
    ("patience = 3",         "patience = 0",            r"\[train\] patience: expected 1 or more, got 0"),
    ('net = "D"',            'net = "F"',               r"stage 'D-72-96' net: expected 'A', 'A-LRN', 'B', 'C', 'D' or 'E', got 'F'"),
    ("scale = [72, 96]",     "scale = [48, 96]",        r"stage 'D-72-96': scale is \[48, 96\], but needs 64 <= low <= high"),
    ("scale = [72, 96]",     "scale = [96, 72]",        r"stage 'D-72-96': scale is \[96, 72\]"),
    ("scale = [72, 96]",     "scale = '72'",            r"stage 'D-72-96' scale: found '72', wanted a number of pixels, or two"),
    ("scale = [72, 96]",     "scale = [72, 96, 128]",   r"wanted a number of pixels, or two as \[low, high\]"),
    ('init_from = "A-72"',   'init_from = "A-27"',      r"stage 'D-72-96': init_from names 'A-27', which is not a stage of this recipe; did you mean 'A-72'\?"),
    ("scale = 72\n",         'scale = 72\ninit_from = "D-72-96"\n', r"in a circle: A-72 from D-72-96 from A-72"),
    ('init_from = "A-72"',   'init_from = "D-72-96"',   r"in a circle: D-72-96 from D-72-96"),
    ("scale = 72\n",         'scale = 72\ninitialise = "xavier"\n', r"stage 'A-72' initialise: expected 'paper', 'glorot' or 'he', got 'xavier'"),
    ('net = "D"',            'net = "A"\ninitialise = "he"', r"stage 'D-72-96': initialise has no effect: 'A-72' is a net A too"),
    ('name = "D-72-96"',     'name = "A-72"',           r"stage 'A-72' is defined twice"),
    ("crop = 64",            "crop = 72",               r"\[net\] crop: found 72, wanted a multiple of 32"),
    ('"30s"',                '"30 parsecs"',            r"\[train\] checkpoint_every: found '30 parsecs', wanted a time such as '5min'"),
    ('root = "pictures"',    'root = "~nosuchuser/a"',  r"\[data\] root ~nosuchuser/a: ~nosuchuser is no home on this machine; write"),
    ('root = "pictures"',    "",                        r'\[data\]: needs one of root = "<folder>" and source = "elpv"'),
    ('root = "pictures"',    'source = "elpv"\nthreshold = 0.3', r'\[data\]: threshold has no effect with labels = "certain"'),
    ('root = "pictures"',    'root = "x"\nlabels = "all"', r'\[data\]: labels and threshold have no effect without source'),
    ('root = "pictures"',    'root = "x"\nsplit = {by = "group"}', r'\[data\] split: by = "group" needs group'),
    ('root = "pictures"',    'root = "x"\nclasses = ["a", "b", "a"]', r"\[data\] classes: expected each class once, got 'a' twice"),
    ('root = "pictures"',    'root = "x"\nclasses = []', r"\[data\] classes: expected each class once, got no name"),
    ('root = "pictures"',    'root = "x"\nsplit = {group = "a"}', r'\[data\] split: group has no effect without by'),
    ('root = "pictures"',    'root = "x"\nsplit = {by = "group", group = "("}', r"group '\(' is no regular expression"),
    ('root = "pictures"',    'root = "x"\nsplit = {val = 0.6, test = 0.5}', r"leave nothing to train on"),
    ('root = "pictures"',    'root = "x"\nsplit = {by = "folder", val = 0.2}', r"val and test have no effect"),
    ('name = "pets"',        "",                        r"pets.toml: name is missing"),
    ('[data]\nroot = "pictures"', "",                   r"pets.toml: \[data\] is missing"),
    ("seed = 7",             "seed = ",                 r"pets.toml: not TOML: "),
    ("seed = 7",             'seed = 7\nschedule = "paper"', r'schedule = "paper" takes the place of \[\[stage\]\] tables'),
    ("scale = 72\n",         "",                        r"stage 'A-72': scale is missing"),
    ("scale = 72\n",         'scale = 72\nfreeze = 6\n', r"stage 'A-72': freeze = 6, but its net ends after group 5; freeze 5 at most"),
    ("scale = 72\n",         'scale = 72\nfreeze = 2\n', r"stage 'A-72': freeze = 2, but without init_from its layers are random"),
    ("scale = 72\n",         'scale = 72\nmean = "weights"\n', r"stage 'A-72': mean = \"weights\", but without init_from"),
    ("scale = 72\n",         'scale = 72\nfit = "logistic"\n', r"stage 'A-72': fit = \"logistic\" needs head = \"linear\", got 'paper'"),
    ("scale = 72\n",         'scale = 72\nfit = "logistic"\nhead = "linear"\n', r"stage 'A-72': fit = \"logistic\" trains the last layer alone and needs init_from"),
    ("learning_rate = 1e-3",  'fit = "logistic"\nhead = "linear"\nlearning_rate = 1', r"stage 'D-72-96': learning_rate has no effect with fit = \"logistic\""),
    ("learning_rate = 1e-3",  'fit = "logistic"\nhead = "linear"\naugment = { flip = true }', r"augment has no effect with fit = \"logistic\""),
    ("learning_rate = 1e-3",  'new_rows = "means"', r"stage 'D-72-96': new_rows has no effect without init_from = \"stage:<key>\""),
    ("learning_rate = 1e-3",  'fit = "logistic"\nhead = "linear"\nfreeze = 3', r"freeze has no effect with fit = \"logistic\""),
    ("learning_rate = 1e-3",  'head = "linear"\nfeatures = { groups = [3] }\nfreeze = 4', r"freeze = 4, but its net ends after group 3"),
    ("learning_rate = 1e-3",  'head = "linear"\nfeatures = { groups = [4, 3] }', r"features.groups: found \[4, 3\], expected one or more, each larger"),
    ("learning_rate = 1e-3",  'head = "linear"\nfeatures = { groups = [6] }', r"features.groups: expected 5 or less, got 6"),
    ("learning_rate = 1e-3",  'head = "linear"\nfeatures = { scales = [72, 96] }', r"several features.scales, and features.flip, need fit = \"logistic\""),
    ("scale = [72, 96]\n",   'fit = "logistic"\nhead = "linear"\nfeatures = { scales = [8] }\n', r"stage 'D-72-96'"),
    ("learning_rate = 1e-3",  "features = { groups = [3] }", r"stage 'D-72-96': features has no effect without head = \"linear\""),
    ("patience = 3",         'rule = "cosine"\npatience = 3', r"\[train\] patience has no effect with rule = \"cosine\""),
    ("learning_rate = 1e-3",  'rule = "cosine"\ndrops = 2',   r"stage 'D-72-96': drops has no effect with rule = \"cosine\""),
    ("patience = 3",         "final_learning_rate = 1e-4",  r"\[train\] final_learning_rate has no effect without rule = \"cosine\""),
    ("patience = 3",         'optimiser = "adamw"\nmomentum = 0.9', r"\[train\] momentum has no effect with optimiser = \"adamw\""),
    ("patience = 3",         "max_epochs = 3\nwarmup_epochs = 3", r"warmup_epochs is 3, expected less than max_epochs, 3"),
    ("patience = 3",         "max_epochs = 3\naverage = 4",  r"average is 4 epochs, expected at most max_epochs, 3"),
    ("patience = 3",         "balance = 1.5",               r"\[train\] balance: expected 1 or less, got 1.5"),
    ("patience = 3",         'balance = 0.5\nclass_weights = "balanced"', r"class_weights and balance both weigh classes; keep one"),
    ("patience = 3",         'class_weights = "even"',      r"\[train\] class_weights: expected \"balanced\", \"none\" or a table such as .*, got 'even'"),
    ("patience = 3",         "class_weights = { cat = 0 }", r"\[train\] class_weights: expected a number from 1e-06 to 1e\+06 for 'cat', got 0"),
    ("patience = 3",         "layer_decay = 0.0",           r"\[train\] layer_decay: expected a number above 0, got 0.0"),
    ("",                     "[augment]\naspect = [0.5, 2.0]", r"\[augment\] aspect has no effect without area"),
    ("",                     "[augment]\narea = [0.5, 2.0]", r"\[augment\] area: found \[0.5, 2.0\], expected shares of the picture"),
    ("",                     '[augment]\narea = "all"',       r"\[augment\] area: found 'all', expected \[low, high\], shares of the picture, or \"none\""),
    ("",                     "[augment]\narea = [0.5, true]", r"\[augment\] area: found \[0.5, True\], expected \[low, high\]"),
    ("",                     "[augment]\narea = [0.5, 0.2]", r"\[augment\] area: found \[0.5, 0.2\], expected \[low, high\]"),
    ("",                     "[augment]\nmixup = inf", r"\[augment\] mixup: expected a finite number, got inf"),
    ("",                     "[augment]\nmixup = 1e9", r"\[augment\] mixup: expected 100 or less, got 1000000000.0"),
    ("",                     "[augment]\narea = [0.5, 1.0]\naspect = [1e-9, 1.0]", r"\[augment\] aspect: found \[1e-09, 1.0\], expected"),
    ("",                     "[augment]\narea = [0.5, 1.0]", r"stage 'A-72': scale has no effect with area"),
    ("",                     '[augment]\nview = "whole"',   r"stage 'A-72': scale is \[72, 72\], but with view = \"whole\" a view is the picture at 64 x 64"),
    ("",                     '[evaluate]\nviews = "turns"', r"views = \"turns\": stage 'D-72-96' is not trained on turned pictures"),
    ("",                     '[evaluate]\nviews = "flips"', r"views = \"flips\" has no effect with protocol = \"dense\", which averages with the mirror"),
    ("learning_rate = 1e-3", 'head = "linear"\n[evaluate]\nprotocol = "centre"\nviews = "flips"', r"views = \"flips\" has no effect on linear heads; set features.flip"),
    ("learning_rate = 1e-3", 'head = "linear"\n[evaluate]\nprotocol = "dense"', r"\[evaluate\] protocol has no effect on linear heads, which see whole pictures"),
    ("learning_rate = 1e-3", 'head = "linear"\n[evaluate]\nscales = [256]', r"\[evaluate\] scales has no effect on linear heads, which see whole pictures"),
    ("",                     '[register]\nweights = "average"', r"weights = \"average\": stage 'D-72-96' has no average"),
    ("",                     '[evaluate]\nstages = ["D-72"]', r"\[evaluate\] stages: no stage 'D-72'; did you mean"),
    ("learning_rate = 1e-3", 'crop = 32\n[evaluate]\nscales = [24]', r"\[evaluate\] scales: 24 is below the crop, 32;"),
    ("",                     "[evaluate]\nscales = [48]", r"\[evaluate\] scales: 48 is below the crop, 64"),
    ("",                     '[register]\nstage = "best"', r"\[register\] stage: no stage 'best'"),
    ("",                     '[register]\nfloor = 2.0', r"\[register\] floor: expected a number below 1, got 2.0"),
    # of nested tables, and of values in words of no library
    ("learning_rate = 1e-3",  'features = { groups = [3], scale = [96] }', r"stage 'D-72-96' features: unknown key 'scale'; did you mean 'scales'\?"),
    ("learning_rate = 1e-3",  "augment = { flipp = true }", r"stage 'D-72-96' augment: unknown key 'flipp'; did you mean 'flip'\?"),
    ("crop = 64",             "features = { grups = [3] }", r"\[net\] features: unknown key 'grups'; did you mean 'groups'\?"),
    ('root = "pictures"',     'root = "x"\nsplit = { gat = 0.1 }', r"\[data\] split: unknown key 'gat'; did you mean 'gate'\?"),
    ("",                      "[register]\nflor = 0.5",   r"\[register\]: unknown key 'flor'; did you mean 'floor'\?"),
    ("learning_rate = 1e-3",  "features = { groups = 3 }", r"features.groups: expected a list such as \[3, 4\], got 3$"),
    ("learning_rate = 1e-3",  "features = { scales = 64 }", r"features.scales: expected a list such as \[96, 160\], got 64$"),
    ("learning_rate = 1e-3",  "features = 3",             r"features: expected a table such as \{ groups = \[3, 4\] \}, got 3$"),
    ("[[stage]]\nname = \"A-72\"\nnet = \"A\"\nscale = 72\n[[stage]]", "[stage]", r"stage\]: expected \[\[stage\]\] tables, got a table of 'name'"),
    ("",                      "[augment]\naspect = [1.0]", r"aspect: expected \[low, high\], two numbers, got \[1.0\]$"),
    ("patience = 3",          "class_weights = { cat = -1.0 }", r"\[train\] class_weights: expected a number from .* for 'cat', got -1.0$"),
    ("patience = 3",          "class_weights = {}",       r"\[train\] class_weights: expected \"balanced\", .*, got an empty table"),
    ("patience = 3",          "class_weights = { cat = 1e308 }", r"for 'cat', got 1e\+308"),
    ("patience = 3",          "class_weights = { cat = 1e-320 }", r"for 'cat', got 1e-320"),
    # numbers that nothing can be made of
    ("learning_rate = 1e-3",  "features = { scales = [1000000000] }", r"features.scales: expected 16,384 or less, got 1000000000"),
    ("learning_rate = 1e-3",  f"features = {{ scales = [{10**20}] }}", r"features.scales: expected 16,384 or less, got 1"),
    ("crop = 64",             "crop = 320000000",         r"\[net\] crop: expected 16,384 or less, got 320000000"),
    ("scale = 72\n",          "scale = 320000000\n",      r"stage 'A-72' scale: expected 16,384 or less, got 320000000$"),
    ("seed = 7",              f"seed = {'9' * 5000}",     r"pets.toml: not TOML: "),
    ("seed = 7",              f"seed = {'9' * 4000}",     r"seed: expected a number below .*, got a number of many digits"),
    ("patience = 3",          "max_epochs = 10000000000", r"\[train\] max_epochs: expected 1,000,000,000 or less"),
    ("",                      "[augment]\ncolour = 1e300", r"\[augment\] colour: expected 100 or less, got 1e\+300"),
    # what is missing, and what has no effect
    ("scale = [72, 96]\n",    'fit = "logistic"\nhead = "linear"\n', r"stage 'D-72-96': features.scales is missing"),
    ("scale = [72, 96]\n",    'fit = "logistic"\n',      r"stage 'D-72-96': fit = \"logistic\" needs head = \"linear\", got 'paper'"),
    ("learning_rate = 1e-3",  "freeze = 5\nlayer_decay = 0.5", r"stage 'D-72-96': layer_decay has no effect with freeze = 5"),
    ("learning_rate = 1e-3",  'head = "linear"\nfeatures = { groups = [3] }\nfreeze = 3\nlayer_decay = 0.5', r"layer_decay has no effect with freeze = 3"),
    ("learning_rate = 1e-3",  'head = "linear"\nfeatures = { groups = [3] }\nfreeze = 6', r"freeze = 6, but its net ends after group 3; freeze 3 at most"),
    ("",                      "[evaluate]\nscales = []",  r"\[evaluate\] scales: expected one or more, each once, got \[\]"),
    ("",                      "[evaluate]\nscales = [96, 96]", r"\[evaluate\] scales: expected one or more, each once, got \[96, 96\]"),
    ("",                      "[evaluate]\nscales = [100000]", r"\[evaluate\] scales: expected 16,384 or less"),
    ("",                      '[evaluate]\nstages = ["A-72", "A-72"]', r"\[evaluate\] stages: expected one or more, each once"),
]
# fmt: on


@pytest.mark.parametrize(("old", "new", "words"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_place_what_was_found_and_what_was_wanted(old, new, words):
    with pytest.raises(RecipeError) as caught:
        pets(old, new)

    message = str(caught.value)
    assert re.search(words, message), message
    assert "\n" not in message.partition(": not TOML")[0]


LOGISTIC = """
name = "pets"
[data]
root = "pictures"
[[stage]]
name = "linear"
net = "D"
head = "linear"
features = { scales = [96] }
fit = "logistic"
init_from = "weights:keras/vgg16"
"""
IN_VAIN = [      # keys of shared tables that no logistic stage uses
    *("net.crop = 64", 'net.initialise = "he"'),
    *("augment.flip = true", "augment.mixup = 0.2", "augment.area = [0.1, 1.0]"),
    *("train.learning_rate = 0.1", "train.max_epochs = 3", "train.momentum = 0.8", "train.balance = 0.5", "train.average = 1"),
    *("train.checkpoint_every = '30s'", "train.channels_last = false", "train.micro_batch = 4"),
]


@pytest.mark.parametrize("line", IN_VAIN)
def test_where_every_stage_is_a_logistic_fit_a_shared_setting_that_none_uses_is_refused(line):
    table, key = line.partition(" ")[0].split(".")

    with pytest.raises(RecipeError, match=rf"\[{table}\] {key} has no effect: every stage has fit = \"logistic\"; remove it"):
        parse_recipe(f"{line}\n{LOGISTIC}", place="x", folder=Path())
    scale = "" if key == "area" else "scale = 256"
    trained = f'[[stage]]\nname = "tuned"\nnet = "D"\nhead = "linear"\ninit_from = "linear"\n{scale}'
    parse_recipe(f"{line}\n{LOGISTIC}{trained}", place="x", folder=Path())


def test_what_a_logistic_fit_uses_may_stand_in_shared_tables():
    shared = 'train = { precision = "bf16", class_weights = "balanced" }\nnet = { width = 1.0, head = "linear" }\n'

    parse_recipe(shared + LOGISTIC, place="x", folder=Path())


FITTED = "[[stage]]" + LOGISTIC.partition("[[stage]]")[2]


def two(shared: str, first: str, second: str, more: str = "") -> Recipe:
    """A recipe of two stages, A-72 and A-96 from it, with lines for the top and for each."""
    stages = f'[[stage]]\nname = "A-72"\nnet = "A"\n{first}\n[[stage]]\nname = "A-96"\nnet = "A"\ninit_from = "A-72"\n{second}'
    text = f'{shared}\nname = "pets"\ndata.root = "pictures"\nnet.crop = 64\n{stages}\n{more}'
    return parse_recipe(text, place="pets.toml", folder=Path("/somewhere"))


@pytest.mark.parametrize(
    ("shared", "first", "second", "more"),
    [
        ("train.balance = 1.0", "scale = 72", "scale = 96", FITTED + 'class_weights = "balanced"'),
        ('train.class_weights = "balanced"', "scale = 72", 'scale = 96\nbalance = 0.5\nclass_weights = "none"', ""),
        ('train = { rule = "cosine", final_learning_rate = 1e-3 }', "scale = 72",
         'scale = 96\nrule = "plateau"\nlearning_rate = 1e-4', ""),
        ("augment.area = [0.1, 1.0]", "", 'augment = { view = "whole", area = "none" }', ""),
        ("augment.area = [0.1, 1.0]", "", 'scale = 96\naugment = { area = "none" }', ""),
        ("", "scale = 72", "scale = 96\ncrop = 32", "[evaluate]\nscales = [32]"),
    ],
)  # fmt: skip
def test_what_one_stage_does_not_use_keeps_no_other_from_using_it(shared, first, second, more):
    stages = {stage.name: stage for stage in resolve_stages(two(shared, first, second, more))}

    assert stages["A-96"].area is stages["A-96"].class_weights is None
    assert stages["A-72"].area == ((0.1, 1.0) if "area" in shared else None)


@pytest.mark.parametrize(
    ("shared", "second", "words"),
    [
        ('train.class_weights = "balanced"', "balance = 0.5", 'both weigh classes; set class_weights = "none" in this stage'),
        ("train.balance = 0.5", 'class_weights = "balanced"', "both weigh classes; set balance = 0 in this stage"),
        ('net.head = "linear"', 'initialise = "he"', "initialise has no effect: 'A-72' is a net A too and gives every layer"),
    ],
)
def test_a_stage_that_differs_from_the_others_is_told_what_to_set_where_it_cannot(shared, second, words):
    with pytest.raises(RecipeError, match=f"stage 'A-96': .*{words}"):
        two(shared, "scale = 72" + ("\nbalance = 0" if "balance" in second else ""), f"scale = 96\n{second}")


def test_no_stages_at_all_is_refused(tmp_path):
    recipe = tmp_path / "empty.toml"
    recipe.write_text('name = "x"\n[data]\nsource = "elpv"\n')

    with pytest.raises(RecipeError, match=r"needs \[\[stage\]\] tables, or schedule = \"paper\""):
        load_recipe(recipe)


def test_the_papers_schedule_expands_to_twelve_stages_that_all_start_from_a():
    recipe = parse_recipe('name = "x"\nschedule = "paper"\n[data]\nsource = "elpv"\n', place="x", folder=Path())

    by_name = {stage.name: stage for stage in recipe.stages}
    assert list(by_name) == [
        *("A-256", "A-LRN-256", "B-256"),
        *(f"{net}-{scale}" for net in "CDE" for scale in ("256", "384", "256-512")),
    ]
    for name in ("B-256", "C-256", "D-256", "E-256"):
        assert by_name[name].init_from == "A-256"
    assert by_name["E-384"].init_from == "E-256" and by_name["E-384"].learning_rate == 1e-3
    assert by_name["E-256-512"].init_from == "E-384" and by_name["E-256-512"].scale == (256, 512)


@pytest.mark.parametrize(
    ("text", "seconds", "iterations"),
    [("5min", 300.0, None), ("30s", 30.0, None), ("2h", 7200.0, None), ("500 iterations", None, 500)],
)
def test_checkpoints_are_timed_by_the_clock_or_by_iterations(text, seconds, iterations):
    every = CheckpointEvery.parse(text)

    assert (every.seconds, every.iterations) == (seconds, iterations)


def test_every_error_survives_the_way_from_a_ray_worker():
    errors = [value for value in vars(vggcore.errors).values() if isinstance(value, type) and issubclass(value, VggrowError)]

    assert len(errors) >= 9
    for kind in errors:
        error = pickle.loads(pickle.dumps(kind("D-72: found 1, wanted 2")))
        assert type(error) is kind and str(error) == "D-72: found 1, wanted 2"
