"""The gate split: chosen once, kept for ever, and never learnt from, by real scans of real files."""

import json
import shutil
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.gate_list import find_gate, listed_before, read_gate
from pipelines.manifest import SCANNED, Manifest, manifest_json, read_manifest, scan_summary, write_manifest
from pipelines.near_duplicates import difference_hash
from pipelines.scan import scan
from vggcore.errors import DatasetError, RecipeError, StoreError
from vggcore.recipe import Data, Split, parse_recipe

HASH = Split(by="hash", val=0.15, test=0.2, gate=0.1)


def blobs(seed: int, side: int = 40) -> Image.Image:
    """A picture of soft blobs; another seed is another picture in most of its 64 bits."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def write(path: Path, seed: int, **settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    blobs(seed).save(path, **settings)
    return path


@pytest.fixture(scope="module")
def some_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cat/ and dog/ with 100 and 50 pictures, each unlike the others."""
    root = tmp_path_factory.mktemp("some")
    for label, count, start in (("cat", 100, 0), ("dog", 50, 1000)):
        for number in range(count):
            write(root / label / f"{label}-{number:03}.png", start + number)
    return root


@pytest.fixture
def root(some_pictures: Path, tmp_path: Path) -> Path:
    """The pictures, to be changed; times kept."""
    return Path(shutil.copytree(some_pictures, tmp_path / "pictures"))


def scanned(root: Path, store: Path, split: Split = HASH, **how: bool) -> Manifest:
    return scan(Data(root=root, split=split), store, threads=2, **how)


def contents(manifest: Manifest, *splits: str) -> set[str]:
    rows = manifest.table.to_pylist()
    return {row["content"] for row in rows if row["split"] in splits}


def by_path(manifest: Manifest) -> dict[str, str]:
    return {row["path"]: row["split"] for row in manifest.table.to_pylist()}


@pytest.mark.parametrize("by", ["hash", "stratified"])
def test_the_gate_has_its_share_of_every_class_and_the_other_splits_have_theirs(root: Path, tmp_path: Path, by: str) -> None:
    manifest = scanned(root, tmp_path / "store", HASH.model_copy(update={"by": by}))

    counts = Counter((row["class"], row["split"]) for row in manifest.table.to_pylist())
    assert manifest.table.num_rows == 150
    if by == "stratified":
        assert [counts["cat", name] for name in ("train", "val", "test", "gate")] == [55, 15, 20, 10]
    assert 4 <= counts["dog", "gate"] <= 6 and 8 <= counts["cat", "gate"] <= 12
    assert len(manifest.split("gate")) == counts["cat", "gate"] + counts["dog", "gate"]


def test_a_second_scan_finds_the_same_and_so_does_the_file(root: Path, tmp_path: Path) -> None:
    first = scanned(root, tmp_path / "store")

    again = scanned(root, tmp_path / "store")

    back = read_manifest(tmp_path / "store" / "data" / first.fingerprint)
    assert again.fingerprint == first.fingerprint
    assert back.table.equals(first.table)
    assert (back.gate, back.held_out, back.notes) == (first.gate, first.held_out, first.notes)
    assert sum(manifest_json(first)["pictures"]["gate"].values()) == len(first.split("gate")) > 0
    assert any(line.startswith("class") and line.endswith("gate") for line in scan_summary(first))


@pytest.mark.parametrize(
    "later",
    [
        Split(by="stratified", val=0.3, test=0.3),
        Split(by="hash", val=0.1, test=0.1),
        Split(by="hash", val=0.4, test=0.1, gate=0.4),
        Split(by="group", group=r"(\d\d)\.png", val=0.3, test=0.3),
    ],
    ids=["stratified", "no gate in the recipe", "another share", "group"],
)
def test_once_chosen_the_list_holds_whatever_the_recipe_says(root: Path, tmp_path: Path, later: Split) -> None:
    first = scanned(root, tmp_path / "store")

    other = scanned(root, tmp_path / "store", later)

    assert contents(other, "gate") == contents(first, "gate")
    assert not contents(other, "train", "val", "test") & contents(first, "gate")


def test_new_pictures_do_not_enter_the_gate(root: Path, tmp_path: Path) -> None:
    first = scanned(root, tmp_path / "store")
    for number in range(60):
        write(root / "cat" / f"new-{number:03}.png", 5000 + number)

    later = scanned(root, tmp_path / "store")

    assert contents(later, "gate") == contents(first, "gate")
    new = Counter(split for path, split in by_path(later).items() if "/new-" in path)
    assert new.total() == 60 and new["train"] > new["test"] > 0
    assert {path: split for path, split in by_path(later).items() if "/new-" not in path} == by_path(first)


def test_copies_and_near_duplicates_of_gate_pictures_that_come_later_are_left_out(root: Path, tmp_path: Path) -> None:
    first = scanned(root, tmp_path / "store")
    path = str(first.split("gate").paths[0])
    shutil.copy(root / path, root / "cat" / "zz-copy.png")
    Image.open(root / path).resize((61, 61), Image.Resampling.BICUBIC).save(root / "cat" / "zz-near.jpg", quality=90)

    later = scanned(root, tmp_path / "store")

    assert by_path(later) == by_path(first)
    assert later.fingerprint == first.fingerprint
    reasons = {held.path: held.reason for held in later.held_out}
    assert reasons == {
        "cat/zz-copy.png": f"a copy of gate picture {path}",
        "cat/zz-near.jpg": f"a near-duplicate of gate picture {path}",
    }
    folder = tmp_path / "store" / "data" / later.fingerprint
    assert read_manifest(folder).held_out == later.held_out
    assert any(note.startswith("left out for the gate: 2 pictures, the first is 'cat/zz-copy.png'") for note in later.notes)


def test_bursts_are_not_torn_between_gate_and_train(root: Path, tmp_path: Path) -> None:
    """Ten bursts of five near-duplicates: the gate is chosen from the single pictures, and nothing is lost."""
    for burst in range(10):
        for shot in range(5):
            blobs(9000 + burst, 80).save(root / "cat" / f"burst-{burst}-{shot}.jpg", quality=80 + 4 * shot)

    manifest = scanned(root, tmp_path / "store")

    in_gate = [path for path in manifest.split("gate").paths if "burst" in str(path)]
    assert in_gate == [] and manifest.held_out == ()
    assert manifest.table.num_rows == 200


def test_a_picture_gate_is_chosen_from_what_models_without_a_gate_had_in_test(root: Path, tmp_path: Path) -> None:
    for by in ("hash", "stratified"):
        store = tmp_path / by
        before = scanned(root, store, Split(by=by, val=0.15, test=0.2))

        after = scanned(root, store, Split(by=by, val=0.15, test=0.2, gate=0.1))

        assert before.gate is None
        assert contents(after, "gate") and contents(after, "gate") <= contents(before, "test")


def test_a_renewed_list_has_new_pictures_of_test_and_the_old_ones_go_there(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = scanned(root, store)

    renewed = scanned(root, store, renew_gate=True)

    assert renewed.gate is not None and first.gate is not None
    assert renewed.gate.key == first.gate.key and renewed.gate.digest != first.gate.digest
    assert contents(renewed, "gate") <= contents(first, "test")
    assert contents(first, "gate") <= contents(renewed, "test")
    assert by_path(scanned(root, store)) == by_path(renewed)
    assert listed_before(store / "gates" / first.gate.key) == contents(first, "gate") | contents(renewed, "gate")


def test_a_list_is_renewed_while_enough_pictures_of_test_were_on_none(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    seen = [contents(scanned(root, store), "gate")]

    with pytest.raises(DatasetError, match=r"\d pictures of test were on no earlier list, and a new one wants"):
        for _ in range(20):
            seen.append(contents(scanned(root, store, renew_gate=True), "gate"))

    assert len(seen) >= 2
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert contents(scanned(root, store), "gate") == seen[-1]


def test_a_moved_folder_goes_on_with_its_list(root: Path, tmp_path: Path) -> None:
    first = scanned(root, tmp_path / "store")
    moved = root.rename(tmp_path / "moved")

    later = scanned(moved, tmp_path / "store")

    assert later.gate == first.gate
    assert by_path(later) == by_path(first)


def test_other_pictures_in_the_same_store_have_a_list_of_their_own(root: Path, tmp_path: Path) -> None:
    first = scanned(root, tmp_path / "store")
    for number in range(60):
        write(tmp_path / "others" / ("cat" if number % 2 else "dog") / f"{number:03}.png", 20_000 + number)

    other = scanned(tmp_path / "others", tmp_path / "store")

    assert other.gate is not None and first.gate is not None
    assert other.gate.key != first.gate.key


def test_gate_pictures_that_are_gone_or_relabelled_are_said(root: Path, tmp_path: Path) -> None:
    first = scanned(root, tmp_path / "store")
    gone, relabelled = (str(path) for path in first.split("gate").paths[:2])
    (root / gone).unlink()
    shutil.move(root / relabelled, root / "dog" / Path(relabelled).name)

    later = scanned(root, tmp_path / "store")

    total = len(first.split("gate"))
    assert any(note.startswith(f"1 of {total} gate pictures are not there any more") for note in later.notes)
    assert any(note.startswith("1 gate pictures have another class") and "(then 'cat')" in note for note in later.notes)
    assert len(later.split("gate")) == total - 1


def test_by_group_whole_groups_are_the_gates_and_their_later_pictures_stay_out(root: Path, tmp_path: Path) -> None:
    rule = Split(by="group", group=r"-\d(\d)\d?", val=0.2, test=0.2, gate=0.2)
    first = scanned(root, tmp_path / "store", rule)
    groups = {row["group"]: row["split"] for row in first.table.to_pylist()}
    gates = sorted(group for group, split in groups.items() if split == "gate")
    write(root / "cat" / f"late-0{gates[0]}.png", 7000)

    later = scanned(root, tmp_path / "store", rule)

    assert gates and len({(row["group"], row["split"]) for row in first.table.to_pylist()}) == len(groups)
    assert by_path(later) == by_path(first)
    assert [held.reason for held in later.held_out] == [f"of group {gates[0]!r}, which the gate has"]


def folders(tmp_path: Path, *, gate: bool = True) -> Path:
    """train/ val/ test/ and gate/ with two classes of four pictures each."""
    root, number = tmp_path / "split", 0
    for split in ("train", "val", "test", *(["gate"] if gate else [])):
        for label in ("cat", "dog"):
            for _ in range(4):
                write(root / split / label / f"{number:03}.png", 300 + number)
                number += 1
    return root


@pytest.mark.parametrize("by", ["folder", None])
def test_a_folder_beside_the_others_is_the_gate_and_what_comes_to_it_later_waits(tmp_path: Path, by: str | None) -> None:
    root, split = folders(tmp_path), Split(by=by)
    first = scanned(root, tmp_path / "store", split)
    write(root / "gate" / "cat" / "late.png", 999)
    shutil.copy(root / "gate" / "cat" / "024.png", root / "train" / "cat" / "leak.png")

    later = scanned(root, tmp_path / "store", split)
    renewed = scanned(root, tmp_path / "store", split, renew_gate=True)

    assert len(first.split("gate")) == 8
    assert by_path(later) == by_path(first)
    assert {held.path: held.reason for held in later.held_out} == {
        "gate/cat/late.png": "came to gate/ after the list was made",
        "train/cat/leak.png": "a copy of gate picture gate/cat/024.png",
    }
    assert by_path(renewed) == by_path(first) | {"gate/cat/late.png": "gate"}


def test_a_gate_picture_moved_to_train_stays_the_gates(tmp_path: Path) -> None:
    root = folders(tmp_path)
    scanned(root, tmp_path / "store", Split(by="folder"))
    shutil.move(root / "gate" / "cat" / "024.png", root / "train" / "cat" / "024.png")

    later = scanned(root, tmp_path / "store", Split(by="folder"))

    assert by_path(later)["train/cat/024.png"] == "gate"


def test_a_class_called_gate_is_a_class(tmp_path: Path) -> None:
    for label in ("gate", "fence"):
        for number in range(12):
            write(tmp_path / "things" / label / f"{number}.png", hash(label) % 1000 + number)

    manifest = scanned(tmp_path / "things", tmp_path / "store", Split(by="stratified"))

    assert manifest.classes == ("fence", "gate") and manifest.gate is None


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("{gate = 0.8}", "val 0.15, test 0.15 and gate 0.8 leave nothing to train on"),
        ('{by = "folder", gate = 0.1}', 'gate has no effect with by = "folder"'),
        ("{test = 0.0, gate = 0.1}", "gate 0.1 needs test above 0"),
        ('{gate = "much"}', "split.gate: expected a number, got 'much'"),
        ("{gates = 0.1}", "unknown key 'gates'; did you mean 'gate'"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_in_the_recipe(split: str, words: str) -> None:
    text = f'name = "x"\n[data]\nroot = "p"\nsplit = {split}\n[[stage]]\nname = "A"\nnet = "A"\nscale = 256\n'

    with pytest.raises(RecipeError, match=words):
        parse_recipe(text, place="x.toml", folder=Path("/x"))


def test_a_share_without_effect_a_renewal_without_a_gate_and_one_that_changes_nothing_are_refused(tmp_path: Path) -> None:
    bare = folders(tmp_path, gate=False)
    with pytest.raises(DatasetError, match=r"gate = 0\.1 has no effect where folders are the splits; add a folder gate/"):
        scanned(bare, tmp_path / "store", Split(gate=0.1))
    with pytest.raises(DatasetError, match="no gate to renew"):
        scanned(bare, tmp_path / "store", Split(by="folder"), renew_gate=True)

    write(bare / "gate" / "cat" / "a.png", 1)
    write(bare / "gate" / "dog" / "b.png", 2)
    scanned(bare, tmp_path / "store", Split(by="folder"))
    with pytest.raises(DatasetError, match="the gate list would stay as it is"):
        scanned(bare, tmp_path / "store", Split(by="folder"), renew_gate=True)


def test_without_a_gate_nothing_is_kept_and_old_digests_hold(root: Path, tmp_path: Path) -> None:
    manifest = scanned(root, tmp_path / "store", Split(by="hash"))

    assert not (tmp_path / "store" / "gates").exists()
    assert "gate" not in manifest_json(manifest)["pictures"] and "gate" not in Split().model_dump()
    assert len(manifest.split("gate")) == 0


def test_a_list_killed_before_it_was_in_force_is_made_again_the_same(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = scanned(root, store)
    assert first.gate is not None
    (store / "gates" / first.gate.key / "current.json").unlink()

    assert scanned(root, store).gate == first.gate


def test_a_broken_list_is_named_and_never_chosen_anew(root: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    gate = scanned(root, store).gate
    assert gate is not None
    (store / "gates" / gate.key / gate.digest / "list.parquet").write_bytes(b"PAR1")

    with pytest.raises(StoreError, match="the gate list cannot be read"):
        scanned(root, store)


def test_the_list_says_when_and_from_what_it_was_made(root: Path, tmp_path: Path) -> None:
    first = scanned(root, tmp_path / "store")
    assert first.gate is not None

    gate = read_gate(tmp_path / "store" / "gates" / first.gate.key)

    assert gate is not None
    about = json.loads((gate.folder / "list.json").read_text())
    assert about["from_fingerprint"] == first.fingerprint and about["share"] == 0.1
    assert about["digest"] == gate.digest == first.gate.digest
    assert about["pictures"] == len(gate.contents) == len(first.split("gate"))
    assert find_gate(tmp_path / "store", Data(root=root), root, []) is not None


def test_the_hash_of_each_picture_is_in_the_manifest(root: Path, tmp_path: Path) -> None:
    manifest = scanned(root, tmp_path / "store")

    for row in manifest.table.to_pylist()[::20]:
        assert row["dhash"] == difference_hash(np.asarray(Image.open(root / row["path"]).convert("RGB")))


def test_a_ledger_and_a_manifest_of_before_are_read_and_pictures_decoded_again_for_their_hash(
    root: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    first = scanned(root, store, Split(by="hash"))
    with sqlite3.connect(store / "data" / "facts.sqlite") as ledger:
        ledger.execute("ALTER TABLE facts DROP COLUMN dhash")
    without = first.table.drop_columns(["dhash"])
    write_manifest(replace(first, table=without), store / "data" / first.fingerprint)
    assert read_manifest(store / "data" / first.fingerprint).table.column_names == without.column_names

    steps: list[int] = []
    again = scan(Data(root=root, split=Split(by="hash")), store, threads=2, progress=lambda done, _: steps.append(done))

    assert steps[0] == 0
    assert again.table.equals(first.table) and again.fingerprint == first.fingerprint
    assert again.table.schema.equals(SCANNED)
