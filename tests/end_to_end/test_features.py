"""`vggrow features` as its users run it: resumed after kills, refused in one line."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.cli import main
from tests.end_to_end.command import SIGINT, SIGKILL, Running, vggrow, wait_until
from tests.training.small_published import publish
from training.store import open_store

KILLS = 3
OPTIONS = ("--groups", "1,2", "--scales", "96,160")


def command(photos: Path, store: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("features", "small/a", photos, *OPTIONS, "--out", out, "--store", store, "--threads", "1", *more)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = open_store(tmp_path_factory.mktemp("features") / "store")
    publish(opened)
    return opened.root


@pytest.fixture(scope="module")
def whole(photos: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of a run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole") / "features.parquet"
    done = vggrow(*command(photos, store, out))
    assert done.returncode == 0, done.stderr
    assert "90 pictures, 768 values each (90 computed, 0 from the store)" in done.stdout
    assert "90 of 90 pictures" in done.stderr
    return out


def rows_in(store: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in store.glob("features/*/parts/*.parquet"))


def test_a_command_killed_at_random_moments_resumes_and_finds_the_same_bits(
    photos: Path, whole: Path, tmp_path: Path
) -> None:
    store = open_store(tmp_path / "store").root
    publish(open_store(store))
    out, seed = tmp_path / "features.parquet", int(os.environ.get("VGGROW_SEED", "11"))
    print(f"VGGROW_SEED={seed}")
    draws, before = random.Random(seed), 0

    for number in range(KILLS):
        running = Running(*command(photos, store, out), log=tmp_path / f"killed-{number}.log")
        target = before + draws.randint(1, 20)
        wait_until(lambda target=target: rows_in(store) >= target, timeout_s=120, running=running)
        running.send(SIGKILL)
        running.wait()
        assert rows_in(store) >= before, "what was computed is kept"
        before = rows_in(store)
        assert not out.exists()
    done = vggrow(*command(photos, store, out, "--json"))

    assert done.returncode == 0, done.stderr
    assert f'"computed": {90 - before}' in done.stdout
    assert pq.read_table(out).equals(pq.read_table(whole))


def test_ctrl_c_ends_the_command_at_once_and_loses_nothing_that_was_computed(photos: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store").root
    publish(open_store(store))
    long = ("--groups", "5", "--scales", "320", "--flip")      # a minute for two cores: the signal comes among them
    running = Running(*command(photos, store, tmp_path / "f.parquet", *long), log=tmp_path / "log")
    wait_until(lambda: rows_in(store) >= 1, timeout_s=120, running=running)

    running.send(SIGINT)
    code = running.wait(30)

    assert code == 130
    assert "Traceback" not in running.output()
    assert not (tmp_path / "f.parquet").exists()


def test_the_table_has_a_row_a_picture_with_the_split_of_a_recipe(
    photos: Path, whole: Path, store: Path, make_recipe, tmp_path: Path
) -> None:
    folder_table = pq.read_table(whole)
    assert folder_table.column_names == ["path", "class", "content", "features"]
    assert folder_table["path"].to_pylist() == sorted(folder_table["path"].to_pylist())
    assert np.isfinite(np.array(folder_table["features"].to_pylist())).all()

    out = tmp_path / "with-split.parquet"
    out.write_bytes(whole.read_bytes())      # an earlier file of ours is replaced
    done = vggrow("features", "weights:small/a", make_recipe(), *OPTIONS, "--out", out, "--store", store)

    assert done.returncode == 0, done.stderr
    assert "(0 computed, 90 from the store)" in done.stdout
    table = pq.read_table(out)
    assert table.column_names == ["path", "class", "split", "content", "features"]
    assert {split: table["split"].to_pylist().count(split) for split in ("train", "val", "test")} == {
        "train": 60,
        "val": 15,
        "test": 15,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("small/b",), "small/b: no such model"),
        (("weights:small/b",), "weights 'small/b': not in store"),
        (("small/a", "--groups", "4,3"), "expected conv groups 1 to 5, ascending"),
        (("small/a", "--groups", "6"), "expected conv groups 1 to 5, ascending"),
        (("small/a", "--groups", "fc"), "--groups fc: weights:small/a have no FC layers"),
        (("small/a", "--groups", "fc", "--pool", "both"), "--pool has no effect with --groups fc"),
        (("small/a", "--groups", "fc", "--flip"), "--flip has no effect with --groups fc"),
        (("small/a", "--scales", "0"), "expected numbers of pixels"),
        (("small/a", "--scales", "8", "--groups", "4"), "--scales: 8 is below 16, the pixels that group 4 needs"),
        (("small/a", "--out", "nowhere/f.parquet"), "--out nowhere/f.parquet: has no folder"),
        (("small/a", "--out", "photo.jpg"), "photo.jpg: exists already and is not a file of `vggrow features`; name another"),
        (("small/a", "--out", "other.parquet"), "other.parquet: exists already and is not a file of `vggrow features`"),
        (("small/a", "--out", "pipe"), "pipe: is a pipe, expected a file's name"),
        (("small/a", "--out", "n" * 300), "cannot be written (File name too long)"),
        (("small/a", "--scales", "99999999999999999999999"), "expected numbers of pixels up to 16,384, ascending"),
        (("small/aa",), "small/aa: no such model; did you mean 'small/a'?"),
        (("small/a", "--device", "cuda"), "--device cuda: torch finds no GPU"),
        (("small/a", "--address", "127.0.0.1:1"), "--address 127.0.0.1:1: no Ray head answers there"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_no_file(
    words: tuple[str, ...],
    message: str,
    photos: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    what, *more = words
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(next(photos.rglob("*.jpg")).read_bytes())
    pq.write_table(pa.table({"path": ["mine"]}), tmp_path / "other.parquet")
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.is_fifo() or path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(
        sys, "argv", ["vggrow", "features", what, str(photos), "--out", "f.parquet", *more, "--store", str(store)]
    )

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert {path: path.is_fifo() or path.read_bytes() for path in tmp_path.iterdir()} == before
