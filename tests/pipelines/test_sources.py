"""Where pictures come from: class folders with and without splits, elpv, and a clear message for whatever is amiss."""

import os
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.sources import Listing, list_folder, list_pictures
from vggcore.errors import DatasetError
from vggcore.recipe import Data, Split

REPOSITORY = Path(__file__).parents[2]


def touch(root: Path, *paths: str) -> Path:
    """Empty files: a listing looks at names alone."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def rows(listing: Listing) -> list[tuple[str, str, str | None]]:
    return [tuple(candidate) for candidate in listing.candidates]  # type: ignore[misc]


def test_class_folders_give_each_picture_its_class_also_from_nested_folders(tmp_path: Path) -> None:
    touch(tmp_path, "dog/b.jpg", "cat/a.PNG", "cat/house 2/deep/c.jpeg", "cat/a/z.webp")

    listing = list_folder(tmp_path, by=None)

    assert rows(listing) == [
        ("cat/a.PNG", "cat", None),
        ("cat/a/z.webp", "cat", None),
        ("cat/house 2/deep/c.jpeg", "cat", None),
        ("dog/b.jpg", "dog", None),
    ]
    assert listing.classes == ("cat", "dog")
    assert listing.notes == []


def test_split_folders_give_each_picture_its_split(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/a.jpg", "train/dog/a.jpg", "val/cat/b.jpg", "test/dog/x/c.jpg")

    listing = list_folder(tmp_path, by=None)

    assert rows(listing) == [
        ("test/dog/x/c.jpg", "dog", "test"),
        ("train/cat/a.jpg", "cat", "train"),
        ("train/dog/a.jpg", "dog", "train"),
        ("val/cat/b.jpg", "cat", "val"),
    ]


def test_another_rule_pools_the_split_folders_and_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/a.jpg", "train/dog/a.jpg", "val/cat/b.jpg", "val/dog/b.jpg")

    listing = list_folder(tmp_path, by="hash")

    assert {(label, split) for _, label, split in rows(listing)} == {("cat", None), ("dog", None)}
    assert listing.notes == ['train, val are pooled: split.by = "hash" shares all pictures anew']


def test_hidden_files_and_folders_are_passed_over_without_a_word(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg", "cat/.hidden.jpg", "cat/.cache/c.jpg", ".git/d.jpg", "._e.jpg", "cat/._a.jpg")

    listing = list_folder(tmp_path, by=None)

    assert [path for path, _, _ in rows(listing)] == ["cat/a.jpg", "dog/b.jpg"]
    assert listing.notes == []


def test_what_is_left_out_is_counted_in_notes(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg", "cat/notes.txt", "dog/film.gif", "dog/film2.GIF", "README", "stray.png")
    (tmp_path / "bird").mkdir()

    listing = list_folder(tmp_path, by=None)

    assert sorted(listing.notes) == [
        "1 picture outside any class folder left out, 'stray.png' first",
        "4 files without a picture's extension left out (2 .gif, 1 .txt, 1 without one)",
        "class folders without a picture left out: 'bird'",
    ]


def test_folders_beside_the_split_folders_are_left_out_in_a_note(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "val/cat/c.jpg", "test/cat/d.jpg", "unsorted/e.jpg")

    listing = list_folder(tmp_path, by="folder")

    assert len(listing.candidates) == 4
    assert listing.notes == ["folders beside train, val, test are left out: 'unsorted'"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "pets/dog/a.jpg", "elsewhere/c.jpg")
    (tmp_path / "pets/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pets/dog/again").symlink_to(tmp_path / "pets")

    listing = list_folder(tmp_path / "pets", by=None)

    assert [path for path, _, _ in rows(listing)] == ["cat/c.jpg", "dog/a.jpg"]


def test_a_pipe_with_a_pictures_name_is_never_opened(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg")
    os.mkfifo(tmp_path / "dog/c.jpg")

    listing = list_folder(tmp_path, by=None)

    assert [path for path, _, _ in rows(listing)] == ["cat/a.jpg", "dog/b.jpg"]


def test_a_store_inside_the_pictures_folder_is_no_class(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg", "vggrow-store/artifacts/views.png")

    listing = list_folder(tmp_path, by=None, skip=tmp_path / "vggrow-store")

    assert listing.classes == ("cat", "dog")


def test_odd_names_are_kept_and_names_that_are_not_utf8_are_quarantined(tmp_path: Path) -> None:
    touch(tmp_path, "cat/two\nlines.jpg", "cat/ blank .jpg", "dog/☕.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/dog/caf\xe9.jpg")).touch()

    listing = list_folder(tmp_path, by=None)

    assert [path for path, _, _ in rows(listing)] == ["cat/ blank .jpg", "cat/two\nlines.jpg", "dog/☕.jpg"]
    assert [(bad.path, bad.reason) for bad in listing.quarantine] == [("dog/caf\\xe9.jpg", "its name is not UTF-8; rename it")]


def absent(root: Path) -> Path:
    return root / "absent"


def a_file(root: Path) -> Path:
    return touch(root, "pets.zip") / "pets.zip"


def not_utf8(root: Path) -> Path:
    touch(root, "cat/a.jpg", "dog/b.jpg")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9")).mkdir()
    return root


def unicode_twins(root: Path) -> Path:
    return touch(root, unicodedata.normalize("NFC", "café") + "/a.jpg", unicodedata.normalize("NFD", "café") + "/b.jpg")


@pytest.mark.parametrize(
    ("make", "by", "words"),
    [
        (absent, None, r"absent: no such folder; wanted a folder of class folders"),
        (a_file, None, r"pets.zip: is a file; wanted a folder of class folders"),
        (lambda root: root, None, r": is empty; wanted a folder of class folders"),
        (lambda root: touch(root, ".DS_Store"), None, r": is empty; wanted a folder of class folders"),
        (lambda root: touch(root, "cat/a.jpg"), None, r": one class only, 'cat'; wanted two"),
        (lambda root: touch(root, "cat/a.jpg", "dog/b.txt"), None, r": one class only, 'cat'; wanted two"),
        (lambda root: touch(root, "cat/a.txt", "dog/b.gif"), None, r": no picture in any class folder \(found 2 other files\)"),
        (lambda root: touch(root, "notes.txt"), None, r": no picture in any class folder \(found 1 other file\)"),
        (lambda root: touch(root, "a.jpg", "b.jpg"), None, r": 2 pictures without a class folder, 'a.jpg' first; wanted one"),
        (
            lambda root: touch(root, "train/a.jpg", "val/b.jpg", "test/c.jpg"),
            None,
            r": 3 pictures without a class folder, 'test/c.jpg' first",
        ),
        (lambda root: touch(root, "Cat/a.jpg", "cat/b.jpg"), None, r"two spellings of one class, 'Cat' and 'cat'; .*case"),
        (lambda root: touch(root, "sea lion/a.jpg", "sealion /b.jpg"), None, r"two spellings .* 'sea lion' and 'sealion '"),
        (unicode_twins, None, r"two spellings of one class, 'cafe\\u0301' and 'caf\\xe9'"),
        (
            lambda root: touch(root, "train/Cat/a.jpg", "train/dog/b.jpg", "val/cat/c.jpg", "test/dog/d.jpg"),
            None,
            r"two spellings of one class, 'Cat' and 'cat'",
        ),
        (
            lambda root: touch(root, "cat/a.jpg", "dog/b.jpg"),
            "folder",
            r": no folder train/, val/, test/ \(found 'cat', 'dog'\)",
        ),
        (
            lambda root: touch(root, "train/cat/a.jpg", "train/dog/b.jpg", "test/cat/c.jpg"),
            None,
            r": no folder val/ \(found 'test', 'train'\); a split by folder wants train/ val/ test/",
        ),
        (
            lambda root: touch(root, "Train/cat/a.jpg", "Valid/dog/b.jpg", "Test/cat/c.jpg"),
            None,
            r": no folder train/, val/, test/ \(found 'Test', 'Train', 'Valid'\)",
        ),
        (lambda root: touch(root, "two\nlines/a.jpg", "dog/b.jpg"), None, r"class folder 'two\\nlines' is not printable"),
        (not_utf8, None, r"class folder 'caf\\xe9' is not printable UTF-8; rename it"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_in_one_clear_line(
    tmp_path: Path, make: Callable[[Path], Path], by: str | None, words: str
) -> None:
    root = make(tmp_path)

    with pytest.raises(DatasetError, match=words) as refusal:
        list_folder(root, by=by)

    assert str(refusal.value).startswith(str(root))
    assert "\n" not in str(refusal.value)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may read; pytest closes its own to others, also while this test runs."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody; root itself may read anything")
@pytest.mark.parametrize("closed", ["pets", "pets/cat"])
def test_a_folder_that_this_user_may_not_read_is_named(open_folder: Path, closed: str) -> None:
    touch(open_folder, "pets/cat/a.jpg", "pets/dog/b.jpg")
    (open_folder / closed).chmod(0)
    code = (
        "import os, pwd, sys; from pathlib import Path; from pipelines.sources import list_folder\n"
        "from vggcore.errors import DatasetError\n"
        "os.setuid(pwd.getpwnam('nobody').pw_uid)\n"
        "try: list_folder(Path(sys.argv[1]), by=None)\n"
        "except DatasetError as error: sys.exit(f'refused: {error}')\n"
    )

    result = subprocess.run(
        [sys.executable, "-c", code, open_folder / "pets"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )

    assert f"refused: {open_folder / closed}: the folder cannot be listed (Permission denied)" in result.stderr


def test_elpv_certain_labels_are_the_cells_of_probability_0_or_1() -> None:
    listing = list_pictures(Data(source="elpv"))

    assert Counter(label for _, label, _ in rows(listing)) == {"functional": 1508, "defective": 715}
    assert listing.classes == ("defective", "functional")
    assert all((listing.root / path).is_file() for path, _, _ in rows(listing))


@pytest.mark.parametrize(("threshold", "defective"), [(0.2, 715 + 106 + 295), (1 / 3, 715 + 106), (0.5, 715 + 106), (0.9, 715)])
def test_elpv_all_labels_are_defective_above_the_threshold(threshold: float, defective: int) -> None:
    listing = list_pictures(Data(source="elpv", labels="all", threshold=threshold))

    assert Counter(label for _, label, _ in rows(listing))["defective"] == defective
    assert len(listing.candidates) == 2624


def test_listing_elpv_does_not_run_the_package() -> None:
    list_pictures(Data(source="elpv", split=Split(by="stratified")))

    assert "elpv_dataset" not in sys.modules


def test_without_the_package_elpv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)  # Python's own way to say: there is no such package

    with pytest.raises(DatasetError, match=r"elpv-dataset is not installed; run pip install 'vggrow\[demo\]'"):
        list_pictures(Data(source="elpv"))
