"""How many Ray Train workers a stage is to have: a number, or as many as there is room for between two numbers."""

import re

WorkerCount = int | tuple[int, int]      # as Ray's ScalingConfig has it: N, or (lowest, highest)


def read_workers(text: str) -> WorkerCount:
    """'4' as 4 and '1:3' as (1, 3). ValueError for anything else, and where the range is none."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if low < 1 or (found and found[2] and low >= high):
        raise ValueError(f"found {text}, wanted a number of at least 1, or MIN:MAX such as '1:3'")
    return (low, high) if found and found[2] else low


def most(workers: WorkerCount) -> int:
    """The highest number of workers."""
    return workers if isinstance(workers, int) else workers[1]


def fewest(workers: WorkerCount) -> int:
    """The lowest number of workers."""
    return workers if isinstance(workers, int) else workers[0]


def workers_text(workers: WorkerCount) -> str:
    """As it is written: '4' or '1:3'."""
    return str(workers) if isinstance(workers, int) else f"{workers[0]}:{workers[1]}"
