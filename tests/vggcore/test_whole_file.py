"""A folder that takes no writes is one line, whatever the system calls it."""

import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
