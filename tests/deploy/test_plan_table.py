"""What `vggrow plan` says, against the paper's numbers, torch's own memory, and what a store holds."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from deploy.plan_table import StagePlan, kept_for_backward, layer_text, number, plan, plan_text
from pipelines.colour import SUMS, Colour
from pipelines.manifest import SCHEMA, Manifest, fingerprint_of
from tests.training.small_published import publish
from training.freezing import freeze as freeze_groups
from training.store import open_store
from vggcore.errors import RecipeError, StoreError
from vggcore.initialise import initialise_net
from vggcore.nets import build_net, layer_table
from vggcore.recipe import Recipe, load_recipe, parse_recipe
from vggcore.schedule import resolve_stages, stage_keys

PETS = """
name = "pets"
[data]
root = "pets"
[net]
width = 0.125
crop = 64
[train]
global_batch = 8
max_epochs = 10
[[stage]]
name = "A-64"
net = "A"
scale = 64
[[stage]]
name = "D-64"
net = "D"
scale = [64, 80]
init_from = "A-64"
"""


def recipe_of(text: str) -> Recipe:
    """A recipe from its text."""
    return parse_recipe(text, place="recipe.toml", folder=Path("/data"))


def manifest_of(*, train: int) -> Manifest:
    """A manifest of two classes with `train` training pictures; there are no files behind it: a plan opens none."""
    rows = [
        {"path": f"{split}/{label}/{place:03}.png", "class": label, "split": split, "content": f"{place:032x}"}
        for split, count in (("train", train), ("val", 2), ("test", 2))
        for place, label in enumerate(["cat", "dog"] * (count // 2) + ["cat"] * (count % 2))
    ]
    rest = {"height": 64, "width": 80, "bytes": 1, "group": None, **dict.fromkeys(SUMS, 1)}
    table = pa.Table.from_pylist([row | rest for row in rows], schema=SCHEMA).sort_by("path")
    colour = Colour(mean=np.ones(3), deviation=np.ones(3), axes=np.eye(3), eigenvalues=np.ones(3))
    return Manifest(Path("/data/pets"), ("cat", "dog"), table, fingerprint_of(table), colour, (), ())


def finish(store: Path, recipe: Recipe, manifest: Manifest, name: str) -> None:
    """Leaves in the store what a finished stage leaves."""
    stages = resolve_stages(recipe)
    key = stage_keys(stages, classes=manifest.classes, fingerprint=manifest.fingerprint)[name]
    folder = store / "stages" / key
    folder.mkdir(parents=True)
    stage = next(stage for stage in stages if stage.name == name)
    (folder / "stage.json").write_text(json.dumps({"name": name, "key": key, "stage": stage.model_dump(mode="json")}))
    (folder / "result.json").write_text("{}")


def test_the_papers_schedule_is_planned_whole_with_its_sizes(tmp_path: Path) -> None:
    found = plan(recipe_of('name = "paper"\nschedule = "paper"\n[data]\nroot = "x"\n'), None, 4, tmp_path / "store")

    assert len(found.stages) == 12
    parameters = {stage.net: stage.parameters for stage in found.stages}
    assert parameters == {
        "A": 132863336, "A-LRN": 132863336, "B": 133047848, "C": 133638952, "D": 138357544, "E": 143667240
    }   # fmt: skip
    deepest = {stage.name: stage for stage in found.stages}["D-256-512"]
    assert deepest.gflop_per_picture == pytest.approx(6 * 15.47, rel=1e-3)      # 15.47 GMACs forward (Sec. 2)
    assert deepest.weights_mb == pytest.approx(553.4, rel=1e-3)
    assert deepest.traffic_per_iteration_mb == pytest.approx(2 * 3 / 4 * 553.4, rel=1e-3)
    assert {stage.status for stage in found.stages} == {"unknown"}
    assert "1,000 classes" in found.notes[0] and "vggrow data scan" in found.notes[0]
    assert not (tmp_path / "store").exists()


def test_with_the_pictures_known_iterations_and_operations_are_said(tmp_path: Path) -> None:
    found = plan(recipe_of(PETS), manifest_of(train=21), 1, tmp_path)

    first = found.stages[0]
    assert (found.train_pictures, found.classes, first.max_iterations) == (21, 2, 10 * 3)   # 8 + 8 + 5 an epoch
    assert first.max_pflop == pytest.approx(first.gflop_per_picture * 21 * 10 / 1e6)
    assert first.traffic_per_iteration_mb == 0
    assert [(stage.status, stage.reason) for stage in found.stages] == [("to do", "never run"), ("to do", "after A-64")]


def test_a_finished_stage_is_done_and_a_changed_setting_is_named(tmp_path: Path) -> None:
    recipe, manifest = recipe_of(PETS), manifest_of(train=20)
    finish(tmp_path, recipe, manifest, "A-64")
    finish(tmp_path, recipe, manifest, "D-64")
    changed = recipe_of(PETS.replace('init_from = "A-64"', 'init_from = "A-64"\nlearning_rate = 0.001'))

    same, other, more = (
        plan(*asked, 1, tmp_path) for asked in ((recipe, manifest), (changed, manifest), (recipe, manifest_of(train=22)))
    )

    assert [stage.status for stage in same.stages] == ["done", "done"]
    assert [stage.status for stage in other.stages] == ["done", "to do"]
    assert other.stages[1].reason == f"learning_rate was 0.01, is 0.001 (since {same.stages[1].key})"
    assert more.stages[0].reason == f"its pictures, classes or parent changed (since {same.stages[0].key})"
    assert more.stages[1].reason.startswith("after A-64; its pictures")
    assert "1 of 2 stages to run" in plan_text(other)


def test_a_changed_learning_rate_is_to_do_again_with_the_stages_that_start_from_it_and_no_others(tmp_path: Path) -> None:
    more = 'learning_rate = 0.01\n[[stage]]\nname = "D-80"\nnet = "D"\nscale = 80\ninit_from = "D-64"\n'
    more += '[[stage]]\nname = "B-64"\nnet = "B"\nscale = 64\ninit_from = "A-64"\n'
    recipe, manifest = recipe_of(PETS + more), manifest_of(train=20)
    for name in ("A-64", "D-64", "D-80", "B-64"):
        finish(tmp_path, recipe, manifest, name)
    changed = recipe_of(PETS + more.replace("learning_rate = 0.01", "learning_rate = 0.005"))

    stages = {stage.name: stage for stage in plan(changed, manifest, 1, tmp_path).stages}

    assert {name: stage.status for name, stage in stages.items()} == {
        "A-64": "done", "D-64": "to do", "D-80": "to do", "B-64": "done"
    }   # fmt: skip
    assert stages["D-64"].reason.startswith("learning_rate was 0.01, is 0.005 (since ")
    assert stages["D-80"].reason.startswith("after D-64; its pictures, classes or parent changed (since ")


def test_a_stage_that_was_interrupted_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    recipe, manifest = recipe_of(PETS), manifest_of(train=20)
    key = plan(recipe, manifest, 1, tmp_path).stages[0].key
    for iteration in (9, 30, 100):
        (tmp_path / "stages" / str(key) / "checkpoints" / f"iteration-{iteration}").mkdir(parents=True)

    first = plan(recipe, manifest, 1, tmp_path).stages[0]

    assert (first.status, first.reason) == ("begun", "goes on from iteration 100")


@pytest.mark.parametrize(
    ("net", "head", "freeze"),
    [("A", "paper", 0), ("D", "compact", 0), ("A-LRN", "paper", 0), ("D", "paper", 2), ("A", "paper", 3)],
)
def test_the_memory_of_a_forward_pass_is_what_torch_keeps(net, head, freeze: int) -> None:
    settings = {"classes": 10, "head": head, "width": 0.125, "crop": 64, "dropout": 0.5}
    stage = resolve_stages(recipe_of(PETS))[0].model_copy(update={"net": net, "head": head, "freeze": freeze})
    modules = build_net(net, **settings)
    freeze_groups(modules, stage)
    initialise_net(modules, "he", width=0.125, seed=1, name=net)
    modules.train().set_draws(1, 1, torch.arange(4))
    weights = {weight.untyped_storage().data_ptr() for weight in modules.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = modules(torch.randn(4, 3, 64, 64))

    assert logits.requires_grad
    assert kept_for_backward(layer_table(net, **settings), stage) == pytest.approx(sum(kept.values()) / 4, rel=0.07)


def test_memory_falls_with_more_workers_and_with_smaller_micro_batches(tmp_path: Path) -> None:
    one, four = (plan(recipe_of(PETS), None, workers, tmp_path).stages[0] for workers in (1, 4))
    micro = plan(recipe_of(PETS.replace("max_epochs", "micro_batch = 2\nmax_epochs")), None, 1, tmp_path)

    assert one.memory_per_worker_gib > four.memory_per_worker_gib
    assert micro.stages[0].memory_per_worker_gib == four.memory_per_worker_gib     # 8 over 4 workers are 2 each
    assert "2 at a time" in micro.notes[1]


def test_the_plan_of_solar_cells_knows_its_two_classes_before_any_scan(tmp_path: Path) -> None:
    found = plan(recipe_of(PETS.replace('root = "pets"', 'source = "elpv"')), None, 1, tmp_path)

    assert found.classes == 2 and "1,000" not in found.notes[0]
    assert "?" in plan_text(found)


def test_the_text_has_a_line_a_stage_a_line_a_net_and_fits_a_terminal(tmp_path: Path) -> None:
    found = plan(recipe_of(PETS), manifest_of(train=20), 2, tmp_path)

    lines = plan_text(found).splitlines()

    assert lines[0] == "pets: 2 stages, 20 training pictures, 2 classes, 2 workers, global batch 8"
    assert lines[3].split()[:5] == ["A-64", "A", "64", "random", "10"] and lines[4].split()[2] == "64-80"
    assert lines[6].split()[0] == "net" and lines[7].split()[:2] == ["A", f"{found.stages[0].parameters:,}"]
    assert max(map(len, lines[2:9])) <= 100
    assert json.loads(json.dumps(asdict(found)))["stages"][1]["scale"] == [64, 80]


def test_the_layers_of_a_net_add_up_in_the_last_line() -> None:
    lines = layer_text(layer_table("D", classes=1000)).splitlines()

    assert lines[1].split() == ["features.0", "conv3-64", "64x224x224", "1,792", "86,704,128"]
    assert lines[-1].split() == ["138,357,544", "15,470,264,320"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.012345, "0.0123"), (4.5678, "4.57"), (789.4, "789"), (12345.6, "12,346")]
)
def test_numbers_keep_three_digits(value: float, text: str) -> None:
    assert number(value) == text


IMAGENET = 1_281_167      # training pictures of ImageNet-2012
RECIPES = Path(__file__).parents[2] / "training" / "recipes"


def test_the_recipes_for_imagenet_are_planned_completely_before_a_scan(tmp_path: Path) -> None:
    paper, later = (
        plan(load_recipe(RECIPES / name), None, 8, tmp_path, pictures=IMAGENET)
        for name in ("imagenet-paper.toml", "imagenet-2023.toml")
    )

    assert {stage.max_iterations for stage in paper.stages} == {74 * 5005}      # Sec. 3.1: 370K iterations
    assert [stage.name for stage in later.stages] == ["A", "B", "D", "E"]
    assert {stage.max_iterations for stage in later.stages} == {200 * 5005}
    assert all(stage.max_pflop and stage.layers for stage in (*paper.stages, *later.stages))


def test_a_plan_says_which_layers_come_from_where_and_which_are_random(tmp_path: Path) -> None:
    text = plan_text(plan(recipe_of(PETS), manifest_of(train=21), 1, tmp_path)).split("first weights:\n")[1]

    first = text.splitlines()[0]
    assert first.startswith("  D-64: conv1_1, conv2_1, conv3_1, conv3_2, fc1, fc2, fc3 from 'A-64'; random: conv1_2, conv2_2, ")


POOLED = """
name = "pets"
[data]
source = "elpv"
[net]
crop = 32
head = "linear"
[[stage]]
name = "fitted"
net = "A"
init_from = "weights:small/a"
fit = "logistic"
features = { groups = [3, 4], scales = [96, 160] }
[[stage]]
name = "tuned"
net = "A"
scale = 96
init_from = "weights:small/a"
freeze = 3
features = { groups = [3, 4] }
[[stage]]
name = "again"
net = "A"
init_from = "tuned"
fit = "logistic"
features = { groups = [3, 4], scales = [96] }
"""


def test_a_fit_has_its_own_scales_and_stages_of_one_net_with_other_costs_are_told_apart(tmp_path: Path) -> None:
    publish(open_store(tmp_path))

    lines = plan_text(plan(recipe_of(POOLED), None, 1, tmp_path)).splitlines()

    assert [line.split("  ")[0] for line in lines[3:6]] == ["fitted", "tuned", "again"]
    assert "96, 160" in lines[3] and "96-160" not in lines[3]
    nets = [line.split("  ")[0] for line in lines if line.startswith("A: ")]
    assert len(nets) > 1 and {"fitted", "tuned"} <= {name for net in nets for name in net.removeprefix("A: ").split(", ")}
    assert any(line.startswith("  again: conv1_1") and line.endswith("fitted: fc1") for line in lines)


def test_numbers_in_place_of_a_scan_are_refused_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--pictures, --classes: no effect, since the pictures have been scanned"):
        plan(recipe_of(PETS), manifest_of(train=21), 1, tmp_path, pictures=5)


def test_a_frozen_stage_needs_less_memory_and_traffic_and_adamw_needs_more_memory(tmp_path: Path) -> None:
    def planned(more: str) -> StagePlan:
        text = PETS.replace('name = "D-64"\nnet = "D"', f'name = "A-64-80"\nnet = "A"\n{more}')
        return plan(recipe_of(text), None, 2, tmp_path).stages[1]

    plain, frozen, adamw = (planned(more) for more in ("", "freeze = 5", 'optimiser = "adamw"'))

    assert frozen.memory_per_worker_gib < plain.memory_per_worker_gib < adamw.memory_per_worker_gib
    assert adamw.memory_per_worker_gib - plain.memory_per_worker_gib == pytest.approx(plain.weights_mb * 1e6 / 2**30)
    assert frozen.traffic_per_iteration_mb < plain.traffic_per_iteration_mb == adamw.traffic_per_iteration_mb
    assert frozen.checkpoints_gib < plain.checkpoints_gib < adamw.checkpoints_gib
    assert planned("average = 3").checkpoints_gib == pytest.approx(3 * plain.checkpoints_gib)      # two sums of 8 bytes
    assert frozen.gflop_per_picture < 0.4 * plain.gflop_per_picture      # what is left of the rest are the FC layers


def notes_of(text: str, store: Path, workers: int = 1) -> str:
    """A plan's notes, before a scan."""
    return "\n".join(plan(recipe_of(text), None, workers, store).notes)


def test_the_plateau_rule_is_spoken_of_where_a_stage_has_it(tmp_path: Path) -> None:
    cosine = PETS.replace("max_epochs", 'rule = "cosine"\nmax_epochs')
    mixed = PETS.replace('init_from = "A-64"', 'init_from = "A-64"\nrule = "cosine"')

    assert "the plateau rule may end a stage earlier" in notes_of(PETS, tmp_path)
    assert "plateau" not in notes_of(cosine, tmp_path)
    assert "the plateau rule may end A-64 earlier" in notes_of(mixed, tmp_path)


def test_batches_of_stages_are_said_where_they_differ_from_the_shared_ones(tmp_path: Path) -> None:
    two = PETS.replace('init_from = "A-64"', 'init_from = "A-64"\nglobal_batch = 64')

    assert "memory is an estimate for 4 to 32 pictures a worker" in notes_of(two, tmp_path, workers=2)
    assert plan_text(plan(recipe_of(two), None, 1, tmp_path)).splitlines()[0].endswith("global batch 8 to 64")
    both = two.replace("scale = 64\n", "scale = 64\nglobal_batch = 64\n")
    assert plan_text(plan(recipe_of(both), None, 1, tmp_path)).splitlines()[0].endswith("global batch 64")


def test_a_plan_of_fits_alone_speaks_of_no_batch_and_a_single_stage_is_one(tmp_path: Path) -> None:
    publish(open_store(tmp_path))
    fit = POOLED.partition('[[stage]]\nname = "tuned"')[0].replace("crop = 32\n", "")

    text = plan_text(plan(recipe_of(fit), None, 1, tmp_path))

    assert "pets: 1 stage, " in text and "plateau" not in text and "pictures a worker" not in text


def test_a_stage_from_published_weights_that_never_ran_is_not_said_to_wait_for_them(tmp_path: Path) -> None:
    publish(open_store(tmp_path))

    found = plan(recipe_of(POOLED), manifest_of(train=20), 1, tmp_path)

    assert [stage.reason for stage in found.stages] == ["never run", "never run", "after tuned"]


def test_a_stored_parent_that_is_not_there_is_refused_before_a_scan_too(tmp_path: Path) -> None:
    recipe = recipe_of(PETS.replace('init_from = "A-64"', 'init_from = "stage:0123456789abcdef"'))

    with pytest.raises(StoreError, match=r"^stage 'D-64': init_from 'stage:0123456789abcdef': that stage is not in store"):
        plan(recipe, None, 1, tmp_path)


@pytest.mark.parametrize(("scale", "noted"), [("scale = 128", True), ("scale = 96", False), ("scale = [64, 128]", False)])
def test_training_on_from_a_layer_fitted_at_another_scale_is_noted(scale: str, noted: bool, tmp_path: Path) -> None:
    publish(open_store(tmp_path))
    fit = POOLED.partition('[[stage]]\nname = "tuned"')[0].replace("[96, 160]", "[96]")
    tuned = f'[[stage]]\nname = "tuned"\nnet = "A"\ninit_from = "fitted"\n{scale}\nfeatures = {{ groups = [3, 4] }}\n'

    notes = notes_of(fit + tuned, tmp_path)

    words = "tuned takes the linear layer of fitted, fitted at scale 96, and trains at 128"
    assert (words in notes) is noted, notes
