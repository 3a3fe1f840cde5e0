"""A folder that takes no writes is one line, whatever the system calls it."""

import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vggcore.errors import StoreError
from vggcore.whole_file import write_text

REPOSITORY = Path(__file__).resolve().parents[2]
WRITE = """
import os, sys
from pathlib import Path
from vggcore.errors import StoreError
from vggcore.whole_file import append_text, write_json
os.setuid(int(sys.argv[2]))
for write in (lambda path: write_json(path, {}), lambda path: append_text(path, "more")):
    try:
        write(Path(sys.argv[1]) / "result.json")
    except StoreError as error:
        print(error)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter, with a file of root's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        (Path(name) / "result.json").write_text("before")
        yield Path(name)


def what_is_said(folder: Path, user: int) -> list[str]:
    """The lines that writing and adding to result.json come to."""
    done = subprocess.run([sys.executable, "-c", WRITE, folder, str(user)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone mounts, and becomes nobody")
@pytest.mark.parametrize("refusal", ["Permission denied", "Read-only file system", "Operation not permitted"])
def test_a_file_that_may_not_be_written_is_one_line_and_stays_as_it_was(refusal, folder):
    user, undo = 0, ["true"]
    if refusal == "Permission denied":
        user = pwd.getpwnam("nobody").pw_uid
    elif refusal == "Read-only file system":
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        undo = ["umount", folder]
    elif subprocess.run(["chattr", "+i", folder, folder / "result.json"], capture_output=True).returncode == 0:
        undo = ["chattr", "-i", folder, folder / "result.json"]
    else:
        pytest.skip("this filesystem knows no immutable files")

    try:
        said = what_is_said(folder, user)
    finally:
        subprocess.run([*map(str, undo)], check=True)

    assert said == [
        f"{folder}/result.json: cannot be written ({refusal}); make room, or make the folder writable, and start the same"
        " command again"
    ] * 2
    assert [path.name for path in folder.iterdir()] == ["result.json"]
    assert (folder / "result.json").read_text() == "before"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("n" * 300, "cannot be written (File name too long); name another file"),
        ("f" * 300 + "/page.html", "cannot be written (File name too long); name another file"),
        ("file/page.html", "cannot be written (Not a directory); name another file"),
        ("folder", "is a folder, expected a file's name; name another"),
        ("pipe", "is a pipe, expected a file's name; name another"),
        ("dangling", "is a link to nothing, expected a file; remove it, or name another"),
        ("circle", "cannot be written (Too many levels of symbolic links); name another file"),
        ("to-pipe", "is a pipe, expected a file's name; name another"),
    ],
)
def test_a_place_where_no_file_can_be_is_one_line_and_stays_what_it_was(place: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for link, to in (("dangling", "nowhere"), ("circle", "circle"), ("to-pipe", "pipe")):
        (tmp_path / link).symlink_to(tmp_path / to)
    before = sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(StoreError) as caught:
        write_text(tmp_path / place, "ours")

    assert str(caught.value) == f"{tmp_path / place}: {words}"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "file").read_text() == "mine"


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("before")
    (tmp_path / "link").symlink_to("page")

    write_text(tmp_path / "link", "after")

    assert (tmp_path / "link").is_symlink() and (tmp_path / "page").read_text() == "after"


def test_a_name_as_long_as_the_system_allows_is_written(tmp_path: Path) -> None:
    name = "ä" * 127

    write_text(tmp_path / name, "ours")

    assert [path.name for path in tmp_path.iterdir()] == [name]
