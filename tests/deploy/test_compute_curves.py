"""`vggrow curves`: stages held against each other by their operations, on a store whose numbers are known."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from deploy.cli import vggrow
from deploy.compute_curves import compare, comparison_json, comparison_text, write_figure
from pipelines.colour import SUMS, Colour
from pipelines.manifest import SCHEMA, Manifest, fingerprint_of, write_manifest
from vggcore.errors import StoreError
from vggcore.nets import layer_table
from vggcore.recipe import parse_recipe
from vggcore.schedule import resolve_stages, schedule_key, stage_keys

RECIPE = """
name = "starts"
seed = {seed}
[data]
root = "/nowhere"
[net]
width = 0.125
crop = 32
initialise = "he"
[train]
global_batch = 4
[[stage]]
name = "A-32"
net = "A"
scale = 32
[[stage]]
name = "D-from-A"
net = "D"
scale = 32
init_from = "A-32"
[[stage]]
name = "D-glorot"
net = "D"
scale = 32
initialise = "glorot"
"""
EPOCHS = {"A-32": 3, "D-from-A": 2, "D-glorot": 4}
TRAIN = 6                  # pictures: an epoch of two iterations, the second of two pictures


def manifest_of(*, train: int = TRAIN) -> Manifest:
    """Two thirds of the training pictures are cats."""
    rows = [
        {"path": f"{split}/{place}.png", "class": ("dog", "cat", "cat")[place % 3], "split": split, "content": f"{place:032x}"}
        for split, count in (("train", train), ("val", 3), ("test", 3))
        for place in range(count)
    ]
    rest = {"height": 32, "width": 32, "bytes": 1, "group": None, **dict.fromkeys(SUMS, 1)}
    table = pa.Table.from_pylist([row | rest for row in rows], schema=SCHEMA).sort_by("path")
    colour = Colour(mean=np.ones(3), deviation=np.ones(3), axes=np.eye(3), eigenvalues=np.ones(3))
    return Manifest(Path("/nowhere"), ("cat", "dog"), table, fingerprint_of(table), colour, (), ())


def add_schedule(store: Path, seed: int, manifest: Manifest, *, test: float | None = 0.8, name: str = "starts") -> str:
    """Leaves what `vggrow train` leaves of a schedule: val top-1 rises by a tenth an epoch from seed/10 on."""
    write_manifest(manifest, store / "data" / manifest.fingerprint)
    stages = resolve_stages(parse_recipe(RECIPE.format(seed=seed).replace("starts", name), place="x", folder=Path("/")))
    keys = stage_keys(stages, classes=manifest.classes, fingerprint=manifest.fingerprint)
    key = schedule_key(name, keys)
    evaluations = {}
    for stage in stages:
        folder = store / "stages" / keys[stage.name]
        (folder / "evaluations" / "e").mkdir(parents=True, exist_ok=True)
        parent = {"net": "A", "key": keys[stage.init_from]} if stage.init_from else None
        record = {"name": stage.name, "key": keys[stage.name], "stage": stage.model_dump(mode="json"), "parent": parent}
        (folder / "stage.json").write_text(json.dumps(record))
        rows: list[dict[str, float]] = []
        for epoch in range(1, EPOCHS[stage.name] + 1):
            rows += [{"iteration": 2 * epoch + step, "train_loss": 1 / epoch} for step in (-1, 0)]
            whole = {"epoch": epoch, "iteration": 2 * epoch, "train_loss": 1 / epoch}
            rows.append(whole | {"val_top1_accuracy": (seed + epoch) / 10})
        (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if test is not None:
            (folder / "evaluations" / "e" / "evaluation.json").write_text(json.dumps({"top1_accuracy": test, "auc": None}))
            evaluations[stage.name] = f"stages/{keys[stage.name]}/evaluations/e"
    entries = [
        {"name": stage.name, "key": keys[stage.name], "net": stage.net, "scale": [32, 32], "init_from": stage.init_from}
        for stage in stages
    ]
    (store / "schedules" / key).mkdir(parents=True)
    record = {"name": name, "key": key, "fingerprint": manifest.fingerprint, "classes": list(manifest.classes)}
    (store / "schedules" / key / "stages.json").write_text(json.dumps(record | {"stages": entries, "evaluations": evaluations}))
    return key


def flop(net: str, pictures: int) -> float:
    """Operations of so many views, forward and backward."""
    return 6.0 * pictures * sum(row.macs for row in layer_table(net, classes=2, width=0.125, crop=32))


def test_a_stage_is_charged_with_the_stages_it_starts_from(tmp_path):
    add_schedule(tmp_path, 1, manifest_of())

    curves = {curve.stage: curve for curve in compare(tmp_path, []).curves}

    parent = flop("A", 3 * TRAIN)
    assert [x for x, _ in curves["A-32"].accuracy] == pytest.approx([flop("A", epoch * TRAIN) for epoch in (1, 2, 3)])
    assert [x for x, _ in curves["D-from-A"].accuracy] == pytest.approx([parent + flop("D", TRAIN * n) for n in (1, 2)])
    assert curves["D-from-A"].begins == pytest.approx(parent) and curves["D-glorot"].begins == 0
    assert curves["D-glorot"].ends == pytest.approx(flop("D", 4 * TRAIN))
    assert [y for _, y in curves["D-from-A"].accuracy] == pytest.approx([0.2, 0.3])


def test_the_training_loss_is_drawn_within_its_epoch_too(tmp_path):
    add_schedule(tmp_path, 1, manifest_of())

    loss = compare(tmp_path, []).of("A-32")[0].loss

    assert [y for _, y in loss] == pytest.approx([1, 1, 1 / 2, 1 / 2, 1 / 3, 1 / 3])
    assert [x for x, _ in loss[::2]] == pytest.approx([flop("A", TRAIN * epoch + 2) for epoch in (0, 1, 2)])   # half a batch


def test_a_recipes_name_stands_for_all_its_seeds_and_a_key_for_one_schedule(tmp_path):
    manifest = manifest_of()
    first, _, _ = (add_schedule(tmp_path, seed, manifest) for seed in (1, 2, 4))
    add_schedule(tmp_path, 1, manifest, name="others")

    by_name, by_key = compare(tmp_path, ["starts"]), compare(tmp_path, [first])

    assert by_name.stages == ("A-32", "D-from-A", "D-glorot")
    assert [curve.seed for curve in by_name.of("D-glorot")] == [1, 2, 4]
    assert [curve.seed for curve in by_key.of("D-glorot")] == [1]


def test_a_stage_that_two_schedules_share_counts_once(tmp_path):
    manifest = manifest_of()
    add_schedule(tmp_path, 1, manifest)
    add_schedule(tmp_path, 1, manifest, name="others")

    found = compare(tmp_path, ["starts", "others"])

    assert [len(found.of(stage)) for stage in found.stages] == [1, 1, 1]


def test_the_table_has_mean_and_deviation_over_seeds_and_what_knowing_nothing_costs(tmp_path):
    manifest = manifest_of()
    for seed in (1, 3):
        add_schedule(tmp_path, seed, manifest, test=0.8 + seed / 100)

    found = compare(tmp_path, ["starts"])
    text = comparison_text(found)

    row = next(line for line in text.splitlines() if line.startswith("D-glorot"))
    assert "random, glorot" in row and "60.0 ± 14.1" in row and "82.0 ± 1.4" in row and "0.250 ± 0.000" in row
    assert "0.693 (all classes alike)" in text and "0.637 (the classes' shares)" in text
    assert comparison_json(found)["class_shares_loss"] == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 3)


def test_the_figure_has_a_line_a_seed_and_a_thick_one_a_stage(tmp_path):
    manifest = manifest_of()
    for seed in (1, 2):
        add_schedule(tmp_path, seed, manifest)

    write_figure(compare(tmp_path, []), tmp_path / "a.svg")
    write_figure(compare(tmp_path, []), tmp_path / "b.svg")

    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(drawn)
    assert all(words in drawn for words in ("D-from-A", "D-glorot", "Training loss", "all classes alike: 0.693"))
    assert len(re.findall(r"stroke-width: 1\.6\b", drawn)) >= 2 * 3           # two panels, three stages
    assert len(re.findall(r"opacity: 0\.5; stroke-width: 0\.5\b|stroke-width: 0\.5; *stroke-opacity", drawn)) >= 2 * 3 * 2
    assert drawn == (tmp_path / "b.svg").read_text(encoding="utf-8")      # the same store, the same bytes


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_a_figure_replaces_a_figure_of_ours_and_nothing_else(tmp_path, name):
    add_schedule(tmp_path, 1, manifest_of())
    found = compare(tmp_path, [])
    write_figure(found, tmp_path / name)

    write_figure(found, tmp_path / name)
    (tmp_path / name).write_bytes(b"a photograph")
    with pytest.raises(StoreError, match="exists already and is not a figure of vggrow's"):
        write_figure(found, tmp_path / name)

    assert (tmp_path / name).read_bytes() == b"a photograph"


def test_logistic_fits_have_no_curve_and_are_named(tmp_path):
    key = add_schedule(tmp_path, 1, manifest_of())
    entries = json.loads((tmp_path / "schedules" / key / "stages.json").read_text())["stages"]

    def fit(entry: dict[str, str]) -> None:
        folder = tmp_path / "stages" / entry["key"]
        (folder / "history.jsonl").unlink()
        record = json.loads((folder / "stage.json").read_text())
        (folder / "stage.json").write_text(json.dumps(record | {"stage": record["stage"] | {"fit": "logistic"}}))

    fit(entries[2])
    found = compare(tmp_path, [])
    assert "note: D-glorot has no curve, being fitted without epochs" in comparison_text(found)
    assert comparison_json(found)["left_out"] == ["D-glorot"]
    for entry in entries[:2]:
        fit(entry)
    with pytest.raises(StoreError, match="the stages of starts are logistic fits, which have no epochs to draw"):
        compare(tmp_path, [])


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("no name of a figure; wanted one that ends in .svg or .png", ["starts", "--out", "figure.pdf"]),
        ("no schedule 'startz'; did you mean 'starts'?", ["startz"]),
        ("on other pictures or splits", ["starts", "others"]),
        ("no stage of empty has finished an epoch yet", ["empty"]),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(tmp_path, words, arguments):
    add_schedule(tmp_path, 1, manifest_of())
    add_schedule(tmp_path, 1, manifest_of(train=9), name="others")
    key = add_schedule(tmp_path, 5, manifest_of(), name="empty")
    for entry in json.loads((tmp_path / "schedules" / key / "stages.json").read_text())["stages"]:
        (tmp_path / "stages" / entry["key"] / "history.jsonl").unlink()

    found = CliRunner().invoke(vggrow, ["curves", *arguments, "--store", str(tmp_path)])

    assert isinstance(found.exception, StoreError) and words in str(found.exception)


def test_the_command_prints_the_table_or_json_and_writes_the_figure(tmp_path):
    add_schedule(tmp_path, 1, manifest_of(), test=None)

    table = CliRunner().invoke(vggrow, ["curves", "--store", str(tmp_path), "--out", str(tmp_path / "figure.png")])
    for_programs = CliRunner().invoke(vggrow, ["curves", "starts", "--store", str(tmp_path), "--json"])

    assert table.exit_code == 0 and "D-from-A" in table.output and (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    rows = {row["stage"]: row for row in json.loads(for_programs.output)["stages"]}
    assert rows["D-from-A"]["init_from"] == "A-32" and rows["D-glorot"]["test_top1_accuracy"] == [None]
