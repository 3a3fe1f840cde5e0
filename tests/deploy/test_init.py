"""`vggrow init`: the recipe that it writes for a folder, what it refuses, and that nothing is overwritten or half-written."""

import dataclasses
import os
import subprocess
import sys
import tomllib
import zlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy import starter_rules as rules
from deploy.init_recipe import Asked, init_recipe
from deploy.machine import Machine, this_machine
from deploy.pipeline_file import load_pipeline
from deploy.plan_table import kept_for_backward, plan
from deploy.starter import choose_scales, choose_scratch, share_out
from deploy.starter_lines import facts_for
from deploy.starter_tables import recipe_tables
from pipelines.folder_look import FolderLook, Sizes, look_at_folder
from pipelines.scan import scan
from training.store import open_store
from vggcore.errors import DatasetError, VggrowError
from vggcore.nets import build_net, layer_table
from vggcore.published import PublishedWeights
from vggcore.recipe import Features, Recipe, load_recipe
from vggcore.schedule import resolve_stages
from vggcore.weights import save_weights
from vggcore.whole_file import write_json

LAPTOP = Machine(cores=4, memory_gib=16.0, bf16=False)
GPU = Machine(cores=16, memory_gib=128.0, bf16=True, gpu="H200", gpu_gib=139.0)


def picture(path: Path, size: tuple[int, int] = (80, 80), **how: object) -> Path:
    """A real picture of random pixels, (width, height); different paths have different contents."""
    seed = zlib.crc32(str(path).encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return path


def pets(root: Path, *, cats: int = 30, dogs: int = 20, size: tuple[int, int] = (80, 80)) -> Path:
    """A folder of two classes."""
    for label, count in (("cat", cats), ("dog", dogs)):
        for number in range(count):
            picture(root / label / f"{number:03}.png", size)
    return root


def asked(folder: Path, **words: object) -> Asked:
    """The command's words, files beside the folder."""
    return Asked(
        **{  # type: ignore[arg-type]
            "folder": folder,
            "weights": None,
            "pipeline": False,
            "out": folder.parent / "pets.toml",
            "force": False,
            "store": str(folder.parent / "store"),
            **words,
        }
    )


def look(counts: dict[str, int], *, side: int = 300, aspect: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> FolderLook:
    """A folder that is only thought up."""
    sizes = Sizes(400, (side, side, side), aspect)
    return FolderLook(Path("/pictures"), counts, None, 0, sizes, ())


def published(store: Path, name: str = "keras/vgg16_notop") -> PublishedWeights:
    """An entry of weights in a store, as an import leaves it, of random numbers."""
    convs = (2, 2, 3, 3, 3)
    layers = tuple(f"conv{group}_{place}" for group, count in enumerate(convs, 1) for place in range(1, count + 1))
    record = PublishedWeights(
        name=name,
        digest=f"{abs(hash(name)):032x}"[-32:],
        net="D",
        layers=layers,
        classes=None,
        outputs=None,
        crop=None,
        mean=(123.68, 116.779, 103.939),
        licence="CC BY 4.0",
        origin=None,
        source="test",
        source_digest="0" * 32,
        imported_at=datetime.now(UTC).isoformat(),
    )
    open_store(store)
    write_json(store / "weights" / record.digest / "weights.json", record.model_dump(mode="json"))
    all_groups = Features(groups=(5,), pool="average")
    net = build_net("D", classes=2, head="linear", features=all_groups, width=1.0, crop=224, dropout=0.0)
    convs_only = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("features.")}
    save_weights(convs_only, store / "weights" / record.digest / "model.safetensors")
    return record


def vggrow(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    home = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", "deploy", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(home), "VGGROW_STORE": "store"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_first_command_writes_a_recipe_that_the_others_take(tmp_path):
    pets(tmp_path / "pets")

    done = vggrow("init", "pets", "--pipeline", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "written: pets.toml" in done.stdout and "written: pets-pipeline.toml" in done.stdout
    assert "50 pictures in 2 classes" in done.stdout and "50 headers read" in done.stdout
    recipe = load_recipe(tmp_path / "pets.toml")
    assert recipe.name == "pets" and recipe.data.root == tmp_path / "pets"
    assert load_pipeline(tmp_path / "pets-pipeline.toml").recipe == tmp_path / "pets.toml"
    planned = vggrow("plan", "pets.toml", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets", "pets-pipeline.toml", "pets.toml"]


def test_each_line_of_the_recipe_has_its_reason(tmp_path):
    init_recipe(asked(pets(tmp_path / "pets")), machine=LAPTOP)

    lines = (tmp_path / "pets.toml").read_text().splitlines()
    settings = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(settings) > 15
    for number in settings:
        assert "# " in lines[number] or lines[number - 1].startswith("# "), lines[number]


def test_the_splits_come_out_as_the_recipe_says(tmp_path):
    folder = pets(tmp_path / "pets", cats=31, dogs=4)
    init_recipe(asked(folder, pipeline=True), machine=LAPTOP)

    manifest = scan(load_recipe(tmp_path / "pets.toml").data, tmp_path / "store", threads=1)

    says = share_out(look_at_folder(folder), with_gate=True)
    classes = {part: set(manifest.split(part).labels.tolist()) for part in ("train", "val", "test", "gate")}
    assert classes == {part: {0, 1} for part in classes}
    assert {part: len(manifest.split(part)) for part in says.counts} == says.counts


@pytest.mark.parametrize(
    ("counts", "with_gate", "share"),
    [
        ({"a": 1000, "b": 1223}, False, 0.15),
        ({"a": 100, "b": 100}, False, 0.2),
        ({"a": 1000, "b": 3}, False, 0.25),
        ({"a": 30_000, "b": 30_000}, False, 0.1),
        ({"a": 600_000, "b": 600_000}, False, 0.05),
        ({"a": 1000, "b": 4}, True, 0.25),
    ],
)
def test_every_class_has_a_picture_in_every_split(counts, with_gate, share):
    sharing = share_out(look(counts), with_gate=with_gate)

    assert sharing.rule is not None and sharing.rule.val == sharing.rule.test == share
    assert min(sharing.fewest.values()) >= 1
    assert sum(sharing.counts.values()) == sum(counts.values())


def test_pictures_of_one_shape_are_seen_whole_and_others_in_crops(tmp_path):
    alike = load(recipe_of(look({"a": 900, "b": 900}, aspect=(1.30, 1.33, 1.5))), tmp_path)
    mixed = load(recipe_of(look({"a": 900, "b": 900}, aspect=(0.67, 1.33, 1.5))), tmp_path)
    strips = load(recipe_of(look({"a": 900, "b": 900}, aspect=(3.0, 3.0, 3.0))), tmp_path)

    assert alike.augment.view == "whole" and alike.stages[0].scale is None
    assert mixed.augment.view == "crop" and mixed.stages[0].scale == (73, 73)
    assert strips.augment.view == "crop"


def test_upside_down_is_off_and_said(tmp_path):
    init_recipe(asked(pets(tmp_path / "pets")), machine=LAPTOP)

    text = (tmp_path / "pets.toml").read_text()
    assert "flip_vertical = false" in text and "photographs have an up" in text


@pytest.mark.parametrize(
    ("pictures", "side", "machine", "width", "crop", "nets"),
    [
        (400, 300, LAPTOP, 0.125, 64, ["A"]),
        (400, 25, LAPTOP, 0.125, 32, ["A"]),
        (400, 300, GPU, 0.125, 64, ["A"]),
        (12_000, 300, GPU, 0.25, 96, ["A"]),
        (40_000, 300, GPU, 0.5, 128, ["A", "D"]),
        (40_000, 300, LAPTOP, 0.125, 64, ["A", "D"]),
        (200_000, 400, GPU, 1.0, 224, ["A", "D", "D"]),
    ],
)
def test_the_net_grows_with_the_set_as_far_as_the_machine_can(tmp_path, pictures, side, machine, width, crop, nets):
    half = pictures // 2

    recipe = load(recipe_of(look({"a": half, "b": half}, side=side), machine), tmp_path)

    assert (recipe.net.width, recipe.net.crop, [table.net for table in recipe.stages]) == (width, crop, nets)


def test_a_large_set_on_a_gpu_gets_the_papers_schedule(tmp_path):
    recipe = load(recipe_of(look({"a": 100_000, "b": 100_000}), GPU), tmp_path)

    assert recipe.net.head == "paper" and recipe.train.global_batch == 256 and recipe.train.rule == "plateau"
    assert [stage.scale for stage in resolve_stages(recipe)] == [(256, 256), (256, 256), (256, 512)]
    assert recipe.train.max_epochs == 74 and recipe.train.micro_batch == 0
    small = dataclasses.replace(GPU, gpu_gib=8.0)
    assert load(recipe_of(look({"a": 100_000, "b": 100_000}), small), tmp_path).train.micro_batch == 64


def test_published_weights_give_a_linear_stage_and_a_small_net_beside_it(tmp_path):
    folder = pets(tmp_path / "pets", size=(200, 200))
    published(tmp_path / "store")

    init_recipe(asked(folder, weights="weights:keras/vgg16_notop"), machine=LAPTOP)

    recipe = load_recipe(tmp_path / "pets.toml")
    small, linear = recipe.stages
    assert (linear.fit, linear.init_from, linear.net) == ("logistic", "weights:keras/vgg16_notop", "D")
    assert linear.features is not None
    assert (linear.features.groups, linear.features.pool, linear.features.scales) == ((3, 4), "both", (96, 160))
    assert small.init_from is None and small.net == "A" and recipe.register_.stage == "best on val"
    stages = plan(recipe, None, 1, tmp_path / "store").stages
    assert [stage.mean for stage in stages] == ["data", "weights"]


def test_the_small_net_is_the_same_stage_with_and_without_published_weights(tmp_path):
    folder = pets(tmp_path / "pets")
    published(tmp_path / "store")

    init_recipe(asked(folder, out=tmp_path / "alone.toml"), machine=LAPTOP)
    init_recipe(asked(folder, weights="weights:keras/vgg16_notop"), machine=LAPTOP)

    stages = [resolve_stages(load_recipe(tmp_path / name))[0] for name in ("alone.toml", "pets.toml")]
    keys = {stage.key(classes=["cat", "dog"], fingerprint="f", parent_key=None) for stage in stages}
    assert [stage.name for stage in stages] == ["A-64", "A-64"] and len(keys) == 1


@pytest.mark.parametrize(
    ("counts", "side", "machine", "scales"),
    [
        ({"a": 900, "b": 900}, 300, LAPTOP, (96, 160)),
        ({"a": 900, "b": 900}, 60, LAPTOP, (96,)),
        ({"a": 900, "b": 900}, 32, LAPTOP, (32, 64)),
        ({"a": 900, "b": 900}, 8, LAPTOP, (32, 64)),
        ({"a": 20_000, "b": 20_000}, 300, LAPTOP, (96,)),
        ({"a": 90_000, "b": 90_000}, 300, LAPTOP, (64,)),
        ({"a": 90_000, "b": 90_000}, 300, GPU, (96, 160)),
    ],
)
def test_scales_of_the_linear_stage_fit_the_pictures_and_the_machine(counts, side, machine, scales):
    assert choose_scales(look(counts, side=side), machine, "bf16" if machine.bf16 else "fp32").scales == scales


@pytest.mark.parametrize(
    ("counts", "floor"),
    [
        ({"cat": 105, "dog": 75}, 0.59),
        ({"a": 9, "b": 9}, 0.51),
        ({"x": 3, "y": 22}, 0.89),
        ({"good": 1000, "defective": 4}, 0.99),
    ],
)
def test_a_net_that_always_answers_with_the_commonest_class_does_not_become_champion(counts, floor):
    facts = facts_for(look(counts), LAPTOP, root=Path("/pictures"), weights=None, with_gate=False)

    (register,) = (table for table in recipe_tables(facts, "pets") if table.heading == "[register]")

    assert {setting.key: setting.value for setting in register.settings}["floor"] == floor
    assert floor == 0.99 or floor > max(counts.values()) / sum(counts.values())


def test_one_set_of_weights_in_the_store_is_suggested(tmp_path):
    folder = pets(tmp_path / "pets")
    published(tmp_path / "store")

    done = vggrow("init", "pets", cwd=tmp_path)
    published(tmp_path / "store", "mine")
    two = vggrow("init", "pets", "--force", cwd=tmp_path)

    lines = [line for line in done.stderr.splitlines() if "--from" in line]
    assert len(lines) == 1 and "vggrow init pets --from weights:keras/vgg16_notop" in lines[0], folder
    assert "--from" not in two.stderr


def test_a_recipe_that_exists_is_left_as_it_is(tmp_path):
    folder = pets(tmp_path / "pets")
    (tmp_path / "pets.toml").write_text("mine\n")

    done = vggrow("init", "pets", "--pipeline", cwd=tmp_path)

    assert done.returncode == 2
    assert done.stderr.startswith("error: pets.toml: exists already") and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "pets.toml").read_text() == "mine\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets", "pets.toml"]
    init_recipe(asked(folder, force=True), machine=LAPTOP)
    assert load_recipe(tmp_path / "pets.toml").name == "pets"


def test_a_command_killed_between_its_two_files_is_repeated(tmp_path):
    folder = pets(tmp_path / "pets")
    init_recipe(asked(folder, pipeline=True), machine=LAPTOP)
    before = (tmp_path / "pets.toml").read_text()
    (tmp_path / "pets-pipeline.toml").unlink()

    init_recipe(asked(folder, pipeline=True), machine=LAPTOP)

    assert (tmp_path / "pets.toml").read_text() == before
    load_pipeline(tmp_path / "pets-pipeline.toml")


def test_a_full_or_read_only_place_leaves_nothing(tmp_path):
    folder = pets(tmp_path / "pets")
    (tmp_path / "file").touch()

    with pytest.raises(VggrowError, match=r"file: .*is a file|is a file, expected a folder"):
        init_recipe(asked(folder, out=tmp_path / "file" / "pets.toml"), machine=LAPTOP)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pets"]


def test_split_folders_are_kept_and_incomplete_ones_pooled(tmp_path):
    for part in ("train", "val", "test"):
        pets(tmp_path / "whole" / part, cats=6, dogs=5)
    for part in ("train", "test"):
        pets(tmp_path / "part" / part, cats=6, dogs=5)

    init_recipe(asked(tmp_path / "whole", out=tmp_path / "whole.toml"), machine=LAPTOP)
    done = init_recipe(asked(tmp_path / "part", out=tmp_path / "part.toml"), machine=LAPTOP)

    assert load_recipe(tmp_path / "whole.toml").data.split.by == "folder"
    assert load_recipe(tmp_path / "part.toml").data.split.by == "stratified"
    assert any("pooled" in note for note in done.notes)


def test_a_folder_beside_elsewhere_is_named_in_full(tmp_path):
    folder = pets(tmp_path / "pictures" / "pets")

    init_recipe(asked(folder, out=tmp_path / "recipes" / "p.toml"), machine=LAPTOP)
    init_recipe(asked(folder, out=folder / "inside.toml"), machine=LAPTOP)

    assert tomllib.loads((tmp_path / "recipes" / "p.toml").read_text())["data"]["root"] == str(folder)
    assert tomllib.loads((folder / "inside.toml").read_text())["data"]["root"] == "."
    assert load_recipe(folder / "inside.toml").data.root == folder


def test_sizes_are_those_of_upright_pictures_and_nothing_is_decoded(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(3):
        picture(tmp_path / "pets" / "cat" / f"{number}.jpg", (100, 50), exif=exif)
        whole = picture(tmp_path / "pets" / "dog" / f"{number}.jpg", (50, 100)).read_bytes()
        (tmp_path / "pets" / "dog" / f"{number}.jpg").write_bytes(whole[: len(whole) // 3])     # no decoder would take it

    found = look_at_folder(tmp_path / "pets")

    assert found.sizes == Sizes(6, (50, 50, 50), (0.5, 0.5, 0.5))


def one_class(folder: Path) -> None:
    pets(folder, dogs=0)


def empty(folder: Path) -> None:
    folder.mkdir()


def two_dogs(folder: Path) -> None:
    pets(folder, dogs=2)


def no_headers(folder: Path) -> None:
    for name in ("cat/1.jpg", "dog/1.jpg"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("a web page")


def in_a_store(folder: Path) -> None:
    (folder.parent / "locks").mkdir()
    (folder.parent / "data").mkdir()
    pets(folder)


REFUSED = [
    (lambda folder: None, {}, "no such folder"),
    (lambda folder: folder.write_text("x"), {}, "is a file"),
    (empty, {}, "is empty"),
    (one_class, {}, "one class only"),
    (two_dogs, {}, "class 'dog' has 2 pictures, expected 3 at least, one for each of train, val, test"),
    (two_dogs, {"pipeline": True}, "expected 4 at least"),
    (no_headers, {}, "none of 2 files looked at"),
    (in_a_store, {}, "is inside the store"),
    (pets, {"weights": "keras/vgg16"}, "--from: expected weights:NAME, got 'keras/vgg16'"),
    (pets, {"weights": "weights:"}, "expected weights:NAME"),
    (pets, {"weights": "weights:keras/vgg16"}, "no store there"),
    (pets, {"out": Path("/")}, "is a folder"),
    (pets, {"out": Path(__file__) / "further" / "pets.toml"}, "test_init.py is a file, expected a folder"),
    (pets, {"out": Path("n" * 300 + ".toml")}, "cannot be written (File name too long)"),
    (pets, {"out": Path("n" * 245 + ".toml"), "pipeline": True}, "cannot be written (File name too long)"),
    (pets, {"out": Path("caf\udce9.toml"), "pipeline": True}, "caf\\xe9.toml: its name is not UTF-8; name another file"),
    (pets, {"folder": Path("two\nlines")}, "two\\nlines: no such folder"),
]


@pytest.mark.parametrize(("make", "words", "message"), REFUSED)
def test_what_cannot_be_is_one_line_and_leaves_no_file(tmp_path, make, words, message):
    make(tmp_path / "pets")

    with pytest.raises(VggrowError) as refused:
        init_recipe(asked(**({"folder": tmp_path / "pets"} | words)), machine=LAPTOP)

    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*.toml")) and not list(tmp_path.glob(".*.part"))


def test_a_store_itself_is_no_folder_of_pictures_but_may_stand_among_them(tmp_path):
    open_store(tmp_path / "pets" / "store")
    pets(tmp_path / "pets")

    init_recipe(asked(tmp_path / "pets", store=str(tmp_path / "pets" / "store")), machine=LAPTOP)
    with pytest.raises(DatasetError, match="is a store"):
        init_recipe(asked(tmp_path / "pets" / "store", store=str(tmp_path / "pets" / "store")), machine=LAPTOP)

    assert load_recipe(tmp_path / "pets.toml").data.root == tmp_path / "pets"


def test_weights_that_are_not_there_are_named_with_the_nearest(tmp_path):
    folder = pets(tmp_path / "pets")
    published(tmp_path / "store")

    with pytest.raises(VggrowError, match="did you mean 'keras/vgg16_notop'"):
        init_recipe(asked(folder, weights="weights:keras/vgg16"), machine=LAPTOP)


def test_the_numbers_of_the_table_are_those_of_the_nets():
    stage = resolve_stages(load_recipe(Path("training/recipes/elpv.toml")))[0]
    for net, gmacs in (("A", rules.A_GMACS), ("D", rules.D_GMACS)):
        macs = sum(row.macs for row in layer_table(net, classes=1000, head="paper", width=1.0, crop=224))
        assert macs / 1e9 == pytest.approx(gmacs, rel=0.02)
    table = layer_table("D", classes=1000, head="paper", width=1.0, crop=224)
    for precision, mib in rules.KEPT_MIB.items():
        paper = stage.model_copy(update={"crop": 224, "precision": precision})
        assert kept_for_backward(table, paper) / 2**20 == pytest.approx(mib, rel=0.02)


def test_this_machine_is_looked_at():
    found = this_machine()

    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.memory_gib > 0
    assert str(found.cores) in str(found)


def recipe_of(folder: FolderLook, machine: Machine = LAPTOP) -> str:
    """The recipe's text for a folder that is only thought up."""
    from deploy.starter_files import recipe_text

    facts = facts_for(folder, machine, root="pictures", weights=None, with_gate=False)
    assert facts.scratch == choose_scratch(folder, machine, facts.sharing.train, facts.precision)
    return recipe_text(recipe_tables(facts, "thought-up"), opening=["a test"])


def load(text: str, folder: Path) -> Recipe:
    """A recipe from its text."""
    (folder / "recipe.toml").write_text(text)
    return load_recipe(folder / "recipe.toml")

