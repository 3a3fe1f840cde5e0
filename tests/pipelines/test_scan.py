"""The scan on real files: facts, quarantine, going on after a kill, locks, and a store that cannot be written."""

import csv
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from pipelines.manifest import Manifest, fingerprint_of, manifest_json, read_manifest, scan_summary
from pipelines.scan import COMMIT_EVERY, scan
from tests.pipelines.odd_pictures import (
    blocks,
    sixteen_bits,
    truncate,
    write_bad_pictures,
    write_blocks,
    write_class_folders,
    write_good_pictures,
)
from tests.pipelines.photo_folders import make_photo_folder
from vggcore.errors import DatasetError, StoreError
from vggcore.recipe import Data, Split

STRATIFIED = Split(by="stratified", val=0.2, test=0.2)
REPOSITORY = Path(__file__).parents[2]
Odd = tuple[Manifest, dict[str, tuple[int, int]], dict[str, str], Path]  # manifest, sizes by name, reasons by name, root


def scan_folder(root: Path, store: Path, **settings: object) -> Manifest:
    """A stratified scan of `root` unless the settings say otherwise."""
    return scan(Data(root=root, **{"split": STRATIFIED, **settings}), store, threads=2)  # type: ignore[arg-type]


def steps_of_scan(root: Path, store: Path) -> list[int]:
    """How many files were done at each report of progress: the first number is what was known before."""
    steps: list[int] = []
    scan(Data(root=root, split=STRATIFIED), store, threads=2, progress=lambda done, _total: steps.append(done))
    return steps


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Odd:
    """A scan of all odd files, good ones and bad ones among two plain classes."""
    root = tmp_path_factory.mktemp("odd")
    write_class_folders(root, {"cat": 5, "dog": 5})
    good, bad = write_good_pictures(root / "cat" / "odd"), write_bad_pictures(root / "dog" / "bad")
    manifest = scan_folder(root, root / "store", max_bad=0.9)
    return manifest, good, bad, root


def test_odd_pictures_have_the_size_that_dali_decodes(odd: Odd) -> None:
    manifest, good, _, _ = odd

    rows = {row["path"]: (row["height"], row["width"]) for row in manifest.table.to_pylist() if "/odd/" in row["path"]}

    assert rows == {f"cat/odd/{name}": size for name, size in good.items()}


def test_files_that_do_not_decode_are_quarantined_with_the_reason(odd: Odd) -> None:
    manifest, _, bad, _ = odd

    reasons = {Path(quarantined.path).name: quarantined.reason for quarantined in manifest.quarantine}

    assert reasons.keys() == bad.keys()
    for name, words in bad.items():
        assert words in reasons[name]


def test_the_quarantine_list_is_a_csv_file_beside_the_manifest(odd: Odd) -> None:
    manifest, _, bad, root = odd

    with (root / "store" / "data" / manifest.fingerprint / "quarantine.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert [row["path"] for row in rows] == sorted(f"dog/bad/{name}" for name in bad)


def sums_of(manifest: Manifest, path: str) -> tuple[int, ...]:
    row = next(row for row in manifest.table.to_pylist() if row["path"] == path)
    return tuple(row[f"sum_{name}"] for name in ("r", "g", "b", "rr", "rg", "rb", "gg", "gb", "bb"))


def exact_sums(pixels: np.ndarray) -> tuple[int, ...]:
    r, g, b = pixels.reshape(-1, 3).astype(np.int64).T
    return tuple(int(part.sum()) for part in (r, g, b, r * r, r * g, r * b, g * g, g * b, b * b))


def test_pixel_sums_are_those_of_the_picture(odd: Odd) -> None:
    manifest, _, _, _ = odd

    assert sums_of(manifest, "cat/00003.png") == exact_sums(blocks(3))
    assert sums_of(manifest, "cat/odd/alpha.png") == exact_sums(blocks(1))


def test_sixteen_bit_grey_is_scaled_to_eight_bits_and_rounded(odd: Odd) -> None:
    manifest, _, _, _ = odd
    eight_bits = np.round(sixteen_bits() / 257).astype(np.uint8)  # 65535 / 257 = 255; not the upper byte

    assert sums_of(manifest, "cat/odd/sixteen-bits.png") == exact_sums(np.stack([eight_bits] * 3, axis=-1))


def test_the_content_digest_and_bytes_are_those_of_the_file(odd: Odd) -> None:
    manifest, _, _, root = odd

    for row in manifest.table.to_pylist():
        data = (root / row["path"]).read_bytes()
        assert row["content"] == hashlib.blake2b(data, digest_size=16).hexdigest()
        assert row["bytes"] == len(data)


def test_the_manifest_reads_back_as_it_was(odd: Odd) -> None:
    manifest, _, _, root = odd

    back = read_manifest(root / "store" / "data" / manifest.fingerprint)

    assert back.table.equals(manifest.table)
    assert back.colour.to_json() == manifest.colour.to_json()
    assert replace(back, table=None, colour=None) == replace(manifest, table=None, colour=None)
    assert manifest.table["path"].to_pylist() == sorted(manifest.table["path"].to_pylist())
    assert fingerprint_of(back.table) == back.fingerprint


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no whole manifest here .*; run `vggrow data scan`"):
        read_manifest(tmp_path / "absent")


def test_colour_jpegs_by_split_folders_make_a_manifest_of_three_splits(tmp_path: Path) -> None:
    root = make_photo_folder(tmp_path / "photos", per_class=6, split=True, seed=1)

    manifest = scan(Data(root=root), tmp_path / "store", threads=2)

    train = manifest.split("train")
    assert manifest.classes == ("cat", "coffee", "flower")
    assert [len(manifest.split(name)) for name in ("train", "val", "test")] == [18, 6, 6]
    assert list(train.labels) == [0] * 6 + [1] * 6 + [2] * 6
    assert (train.heights > train.widths).any()
    assert (train.heights < train.widths).any()
    for path, height, width in zip(train.paths, train.heights, train.widths, strict=True):
        assert Image.open(root / path).size == (width, height)
    pixels = [np.asarray(Image.open(root / path)).reshape(-1, 3).mean(0) for path in train.paths]
    assert manifest.colour.mean == pytest.approx(np.mean(pixels, axis=0), abs=0.5)


def test_the_summary_for_people_and_the_json_say_the_same(odd: Odd) -> None:
    manifest, _, bad, _ = odd

    lines, values = scan_summary(manifest), json.loads(json.dumps(manifest_json(manifest)))

    number = manifest.table.num_rows
    assert f"{number} pictures in 2 classes" in lines[0]
    assert sum(sum(classes.values()) for classes in values["pictures"].values()) == number
    assert values["shorter_side"] == {"smallest": 1, "median": 48, "largest": 48}
    assert len(values["quarantine"]) == len(bad)
    assert f"quarantined: {len(bad)}" in "\n".join(lines)
    assert lines[-1] == f"fingerprint: {values['fingerprint']}"
    assert all(f"note: {note}" in lines for note in values["notes"])


def test_unchanged_files_are_not_decoded_again_and_changed_ones_are(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 20, "dog": 20})
    (root / "cat/broken.png").write_bytes(b"no picture")
    before = scan_folder(root, tmp_path / "store")
    first_again = steps_of_scan(root, tmp_path / "store")

    Image.fromarray(blocks(77)).save(root / "cat/00003.png")
    after_a_change = steps_of_scan(root, tmp_path / "store")
    after = scan_folder(root, tmp_path / "store")

    assert first_again == [41]
    assert after_a_change[0] == 40
    assert before.fingerprint != after.fingerprint
    changed = {row["path"] for row in before.table.to_pylist()} ^ {row["path"] for row in after.table.to_pylist()}
    assert changed == set()
    assert sums_of(after, "cat/00003.png") == exact_sums(blocks(77))


def test_a_killed_scan_goes_on_where_it_was(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 700, "dog": 700}, height=8, width=8)
    code = (
        "import os, signal, sys; from pathlib import Path; from pipelines.scan import scan; from vggcore.recipe import Data\n"
        "def kill(done, total):\n"
        f"    if done >= {COMMIT_EVERY + 100}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "scan(Data(root=Path(sys.argv[1])), Path(sys.argv[2]), threads=2, progress=kill)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, root, tmp_path / "store"], cwd=REPOSITORY, timeout=120)

    steps = steps_of_scan(root, tmp_path / "store")

    assert killed.returncode == -signal.SIGKILL
    assert COMMIT_EVERY <= steps[0] < 1400
    assert steps[-1] == 1400


def test_a_few_bad_files_are_left_out_and_many_stop_the_scan_with_the_list(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 20, "dog": 20})
    truncate(root / "cat", [f"{number:05d}.png" for number in range(10)])
    few = scan_folder(root, tmp_path / "store")
    truncate(root / "cat", ["00010.png"])

    with pytest.raises(DatasetError, match=r"11 of 40 files cannot be used, more than 10 .*cat/00000.png: truncated") as stop:
        scan_folder(root, tmp_path / "store")

    assert len(few.quarantine) == 10
    assert str(tmp_path / "store/data/quarantine.csv") in str(stop.value)
    assert "allow more by [data] max_bad in a recipe (a folder alone is read with the default)" in str(stop.value)
    assert len((tmp_path / "store/data/quarantine.csv").read_text().splitlines()) == 12


def test_max_bad_is_a_share_of_all_files(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 20, "dog": 20})
    truncate(root / "cat", [f"{number:05d}.png" for number in range(12)])

    manifest = scan_folder(root, tmp_path / "store", max_bad=0.3)

    assert len(manifest.quarantine) == 12


def test_files_that_vanish_or_change_while_they_are_scanned_are_quarantined(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 20, "dog": 20})

    def meddle(done: int, _total: int) -> None:
        if done == 0:
            (root / "cat/00001.png").unlink()
            os.utime(root / "cat/00002.png", ns=(1, 1))

    manifest = scan(Data(root=root, split=STRATIFIED), tmp_path / "store", threads=2, progress=meddle)
    again = scan_folder(root, tmp_path / "store")

    assert [(bad.path, bad.reason.split()[0]) for bad in manifest.quarantine] == [
        ("cat/00001.png", "not"),
        ("cat/00002.png", "changed"),
    ]
    assert again.quarantine == ()
    assert again.table.num_rows == 39


def test_a_class_of_which_nothing_decodes_is_an_error(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 20, "dog": 3})
    truncate(root / "dog", ["10000.png", "10001.png", "10002.png"])

    with pytest.raises(DatasetError, match="class 'dog' has no picture in train"):
        scan_folder(root, tmp_path / "store")

    assert list((tmp_path / "store/data").glob("*/manifest.parquet")) == []
    assert not (tmp_path / "store/data/splits").exists()


def test_files_of_which_none_decodes_are_an_error_that_names_the_first(tmp_path: Path) -> None:
    for path in ("cat/a.jpg", "dog/b.jpg"):
        (tmp_path / "pets" / path).parent.mkdir(parents=True)
        (tmp_path / "pets" / path).touch()

    with pytest.raises(DatasetError, match=r"none of 2 files can be used \(cat/a.jpg: 0 bytes\)"):
        scan_folder(tmp_path / "pets", tmp_path / "store")


def test_the_same_pictures_in_other_splits_have_another_fingerprint(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 20, "dog": 20})

    one, two = scan_folder(root, tmp_path / "store"), scan_folder(root, tmp_path / "store", split=Split(by="hash"))

    assert one.fingerprint != two.fingerprint
    assert read_manifest(tmp_path / "store/data" / one.fingerprint).table.equals(one.table)


def test_stratified_pictures_keep_their_split_when_others_come(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 23, "dog": 31})
    before = scan_folder(root, tmp_path / "store").table
    write_blocks(root / "cat", 40, first_seed=500)

    after = scan_folder(root, tmp_path / "store").table

    split_of = dict(zip(after["path"].to_pylist(), after["split"].to_pylist(), strict=True))
    assert {path: split_of[path] for path in before["path"].to_pylist()} == dict(
        zip(before["path"].to_pylist(), before["split"].to_pylist(), strict=True)
    )
    cats = [split for path, split in split_of.items() if path.startswith("cat")]
    assert [cats.count(name) for name in ("train", "val", "test")] == pytest.approx([37.8, 12.6, 12.6], abs=1)


def test_a_split_by_group_keeps_groups_together_and_names_them(tmp_path: Path) -> None:
    folders = {f"{label}/house{number}": 2 for label in ("cat", "dog") for number in range(20)}
    root = write_class_folders(tmp_path / "pets", folders, height=8, width=8)

    manifest = scan_folder(root, tmp_path / "store", split=Split(by="group", group=r"(house\d+)", val=0.25, test=0.25))

    rows = manifest.table.to_pylist()
    assert rows[0]["group"] == "house0"
    assert len({(row["group"], row["split"]) for row in rows}) == 20


def test_copies_are_noted_by_what_they_spoil(tmp_path: Path) -> None:
    root = write_class_folders(
        tmp_path / "pets", {f"{split}/{label}": 3 for split in ("train", "val", "test") for label in ("cat", "dog")}
    )
    original = (root / "train/cat/00000.png").read_bytes()
    for copy in ("train/cat/copy.png", "val/cat/leak.png"):
        (root / copy).write_bytes(original)
    (root / "train/dog/conflict.png").write_bytes((root / "train/cat/00001.png").read_bytes())
    (root / "train/dog/twice.png").write_bytes((root / "train/dog/10000.png").read_bytes())

    notes = scan(Data(root=root), tmp_path / "store", threads=1).notes

    assert [note.partition(":")[0] for note in notes] == [
        "the same picture in two classes (label conflict",
        "the same picture in two splits (leak",
        "the same picture twice or more in one class and split (each copy counts)",
    ]
    assert "'train/cat/00001.png' and 'train/dog/conflict.png'" in notes[0]


def test_standardise_needs_a_deviation(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for side in range(1, 11):
            Image.new("RGB", (side + number * 10, 5), (9, 9, 9)).save(tmp_path / "pets" / name / f"{side}.png")

    with pytest.raises(DatasetError, match="standardise = true divides by its deviation, 0"):
        scan_folder(tmp_path / "pets", tmp_path / "store", standardise=True)


def test_a_second_scan_waits_for_the_first_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 10, "dog": 10})
    lock = FileLock(tmp_path / "store/locks/data.lock", thread_local=False)
    (tmp_path / "store/locks").mkdir(parents=True)
    lock.acquire()
    waiting = threading.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for it" in record.getMessage():
                waiting.set()

    watch, done = Watch(), []
    logging.getLogger("pipelines.scan").addHandler(watch)
    second = threading.Thread(target=lambda: done.append(scan_folder(root, tmp_path / "store")))
    second.start()
    said = waiting.wait(60)
    second.join(1.5)
    still_waiting = second.is_alive()

    lock.release()
    second.join(60)

    logging.getLogger("pipelines.scan").removeHandler(watch)
    assert said
    assert still_waiting
    assert done[0].table.num_rows == 20


def test_a_ledger_that_is_broken_is_begun_anew(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 10, "dog": 10})
    ledger = tmp_path / "store/data/facts.sqlite"
    ledger.parent.mkdir(parents=True)
    ledger.write_bytes(b"this is no SQLite file " * 100)

    manifest = scan_folder(root, tmp_path / "store")

    assert manifest.table.num_rows == 20
    assert steps_of_scan(root, tmp_path / "store") == [20]


def test_a_store_below_a_file_is_refused(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "pets", {"cat": 10, "dog": 10})
    (tmp_path / "file").touch()

    with pytest.raises(StoreError, match=r"file/store: the store cannot be read and written \(Not a directory\); make it"):
        scan_folder(root, tmp_path / "file" / "store")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may read; pytest closes its own to others, also while this test runs."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody; root itself may write anywhere")
def test_a_store_that_this_user_may_not_write_is_refused(open_folder: Path) -> None:
    root = write_class_folders(open_folder / "pets", {"cat": 10, "dog": 10})
    (open_folder / "store").mkdir(mode=0o755)
    code = (
        "import os, pwd, sys; from pathlib import Path; from pipelines.scan import scan\n"
        "from vggcore.errors import StoreError; from vggcore.recipe import Data\n"
        "os.setgid(pwd.getpwnam('nobody').pw_gid); os.setuid(pwd.getpwnam('nobody').pw_uid)\n"
        "try: scan(Data(root=Path(sys.argv[1])), Path(sys.argv[2]), threads=1)\n"
        "except StoreError as error: sys.exit(f'refused: {error}')\n"
    )

    result = subprocess.run(
        [sys.executable, "-c", code, root, open_folder / "store"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )

    assert result.returncode == 1
    assert f"refused: {open_folder}/store: the store cannot be read and written (Permission denied)" in result.stderr
    assert list((open_folder / "store").iterdir()) == []
