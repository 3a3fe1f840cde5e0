"""Reading a journal while it grows."""

import os
from pathlib import Path
from typing import Any

from training.history import parse_rows

LAST_BYTES = 2**16     # of a journal, where its last line is looked for


class HistoryTail:
    """Reads a growing journal: each call gives the whole lines that are new.

    A history that was cut to a checkpoint is a new file, and is read from its start again: its readers pass over what
    they know, by iteration.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        self.inode = self.offset = 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Rows since the last call."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:
                self.inode, self.offset = inode, 0
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        return parse_rows(whole.decode().splitlines())


def last_bytes(path: Path) -> bytes:
    """The end of a file, which a killed writer may have left without its newline; nothing where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""
