"""Paths as people type them: '~' and '~name' are homes of this machine."""

from pathlib import Path

from vggcore.errors import VggrowError


def at_home(path: Path | str, refuse: type[VggrowError], *, place: str = "") -> Path:
    """The path with the home that '~' or '~name' at its beginning stands for.

    Raises `refuse`, its message after `place`, where this machine knows no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise refuse(f"{place}{path}: {user} is no home on this machine; write the path in full") from error
