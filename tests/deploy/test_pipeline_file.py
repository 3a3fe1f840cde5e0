"""The pipeline file: what is wrong in it is named in one line with its place; what is right is read with whole paths."""

# ruff: noqa: E501   (a table)

from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import pytest

from deploy.gate import GateRules
from deploy.pipeline_file import Gate, check_start, load_pipeline
from vggcore.errors import RecipeError
from vggcore.recipe import load_recipe

WHOLE = """
name = "weekly"
recipe = "recipes/solar.toml"
[watch]
folders = ["incoming", "/mnt/share"]
[timetable]
cron = "30 2 * * 1-5"
time_zone = "Europe/Berlin"
[start]
warm = "scratch"
max_age = "30d"
[gate]
metric = "balanced"
min_gain = 0.01
[run]
workers = 2
store = "store"
tracking = "sqlite:///runs.db"
[notify]
url = "https://hooks.example.org/vggrow"
secret_env = "HOOK_SECRET"
"""


@pytest.fixture
def write(tmp_path):
    """Writes a pipeline file beside a recipe."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "solar.toml").write_text("")

    def make(text: str) -> Path:
        path = tmp_path / "pipeline.toml"
        path.write_text(text)
        return path

    return make


def test_paths_count_from_the_files_own_folder(write, tmp_path):
    pipeline = load_pipeline(write(WHOLE))

    assert pipeline.recipe == tmp_path / "recipes" / "solar.toml"
    assert pipeline.watch.folders == (tmp_path / "incoming", Path("/mnt/share"))
    assert pipeline.run.store == tmp_path / "store"
    assert pipeline.run.tracking == f"sqlite:///{tmp_path / 'runs.db'}"


def test_settings_reach_those_who_use_them(write):
    pipeline = load_pipeline(write(WHOLE))

    assert pipeline.gate.rules() == GateRules(metric="balanced", min_gain=0.01)
    assert pipeline.start.age == timedelta(days=30)
    assert pipeline.run.workers == 2


def test_a_name_and_a_recipe_are_enough(write):
    pipeline = load_pipeline(write('name = "weekly"\nrecipe = "recipes/solar.toml"\n'))

    assert pipeline.timetable is None and pipeline.notify is None and pipeline.start.age is None
    assert pipeline.gate.rules() == GateRules()


def test_the_gate_table_has_the_gates_own_rules_and_defaults():
    own = {"new_classes": "person"}      # of who is asked, not of what is asked
    assert {name: field.default for name, field in Gate.model_fields.items()} == own | {
        field.name: field.default for field in fields(GateRules)
    }


# fmt: off
MISTAKES = [
    # right                              wrong                                  words of the message
    ('name = "weekly"',                  'nmae = "weekly"',                     ["unknown key 'nmae'", "did you mean 'name'?", "name is missing"]),
    ('recipe = "recipes/solar.toml"',    'recipe = "recipes/solr.toml"',        ["recipe: ", "recipes/solr.toml' is no file"]),
    ('"/mnt/share"',                     '"~nosuchuser/share"',                 ["~nosuchuser/share: ~nosuchuser is no home on this machine"]),
    ('store = "store"',                  'store = "~nosuchuser/store"',         ["~nosuchuser/store: ~nosuchuser is no home on this machine"]),
    ("metric",                           "metrik",                              ["[gate]: unknown key 'metrik'", "did you mean 'metric'?"]),
    ('metric = "balanced"',              'metric = "auc"',                      ["[gate] metric", "got 'auc'"]),
    ("min_gain = 0.01",                  "min_gain = 1.5",                      ["[gate] min_gain is 1.5"]),
    ("folders =",                        "folder =",                            ["[watch]: unknown key 'folder'", "did you mean 'folders'?"]),
    ("[watch]",                          "[watch]\nfolder = 3",                 ["[watch]: unknown key 'folder'; did you mean 'folders'?"]),
    ('["incoming", "/mnt/share"]',       "3",                                  ['[watch] folders: expected a list such as ["pictures"], got 3']),
    ('max_age = "30d"',                  'max_age = "99999999999d"',           ["[start] max_age", "such as '30d'"]),
    ('"30 2 * * 1-5"',                   '"30 2 * *"',                          ["[timetable] cron", "4 fields", "wanted five"]),
    ('"30 2 * * 1-5"',                   '"61 2 * * *"',                        ["[timetable] cron", "61"]),
    ('"30 2 * * 1-5"',                   '"0 0 31 2 *"',                        ["[timetable] cron", "never comes"]),
    ('"30 2 * * 1-5"',                   '"0 0 1 * 1"',                         ["[timetable] cron", "set one of them to *"]),
    ("Europe/Berlin",                    "Europe/Berln",                        ["[timetable] time_zone", "'Europe/Berln'", "did you mean 'Europe/Berlin'?"]),
    ('warm = "scratch"',                 'warm = "scratch"\nlearning_rate = 0.1', ["[start]", "learning_rate has no effect", 'warm = "champion"']),
    ('warm = "scratch"',                 'warm = "scratch"\nnew_rows = "random"', ["[start]", "new_rows has no effect", 'warm = "champion"']),
    ('metric = "balanced"',              'new_classes = "me"',                  ["[gate] new_classes", "got 'me'", "'person' or 'gate'"]),
    ('max_age = "30d"',                  'max_age = "a month"',                 ["[start] max_age", "'a month'", "'30d'"]),
    ("workers = 2",                      "workers = 0",                         ["[run] workers", "found 0"]),
    ("workers = 2",                      'workers = "3:1"',                     ["[run] workers", "found 3:1", "MIN:MAX"]),
    ("workers = 2",                      'address = "head"',                    ["[run] address", "found 'head'", "'http://HOST:8265'", "'HOST:6379'"]),
    ("workers = 2",                      'env = ["A=secret"]',                  ["[run] env", "found 'A'", "names of variables"]),
    ("workers = 2",                      'device = "gpu"',                      ["[run] device", "'cpu' or 'cuda'"]),
    ("https://hooks",                    "ftp://hooks",                         ["[notify] url", "https://HOST/PATH"]),
    ("https://hooks",                    "https://me:word@hooks",               ["[notify] url", "a user or a password"]),
    ("secret_env",                       "secret",                              ["[notify]: unknown key 'secret'", "did you mean 'secret_env'?"]),
    ("[run]",                            "[run",                                ["not TOML"]),
]
# fmt: on


@pytest.mark.parametrize(("right", "wrong", "words"), MISTAKES, ids=[wrong for _, wrong, _ in MISTAKES])
def test_a_mistake_is_named_in_one_line_with_its_place(right, wrong, words, write):
    assert right in WHOLE
    path = write(WHOLE.replace(right, wrong, 1))

    with pytest.raises(RecipeError) as error:
        load_pipeline(path)

    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for word in words:
        assert word in message


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.toml: cannot be read as a pipeline file"):
        load_pipeline(tmp_path / "nothing.toml")


LINEAR = """
name = "pets"
[data]
root = "pictures"
[[stage]]
name = "D-linear"
net = "D"
init_from = "weights:keras/vgg16"
head = "linear"
fit = "logistic"
features = { scales = [96] }
"""
TUNED = '[[stage]]\nname = "tuned"\nnet = "D"\nhead = "linear"\ninit_from = "D-linear"\nscale = 256\n'


@pytest.mark.parametrize("key", ["learning_rate = 1e-4", 'new_rows = "random"'])
def test_a_rate_that_no_champion_can_use_is_refused(key, tmp_path):
    path = tmp_path / "pipeline.toml"
    path.write_text(f'name = "weekly"\nrecipe = "pets.toml"\n[start]\nwarm = "champion"\n{key}\n')
    (tmp_path / "pets.toml").write_text(LINEAR)
    read = lambda: check_start(load_pipeline(path), load_recipe(tmp_path / "pets.toml"))  # noqa: E731

    with pytest.raises(RecipeError) as caught:
        read()
    (tmp_path / "pets.toml").write_text(LINEAR + TUNED)
    read()

    assert f"[start] {key.split()[0]} in the pipeline file has no effect: each stage that can become champion" in str(caught.value)
