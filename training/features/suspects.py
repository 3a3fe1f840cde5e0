"""suspects.json: pictures of train and val whose labels their neighbours in feature space contradict.

    {"pictures": 1890, "neighbours": 10, "suspects": [{"path": ..., "content": ..., "class": ..., "neighbours_class": ...,
     "neighbours": 9, "nearest": <path>}, ...]}
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.manifest import Pictures
from vggcore.logistic import Standardised
from vggcore.neighbours import MOST_PICTURES, NEIGHBOURS, suspected
from vggcore.whole_file import write_json

FILE = "suspects.json"


def write_suspects(
    folder: Path,
    splits: Sequence[tuple[Pictures, NDArray[np.float32]]],
    classes: Sequence[str],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Looks for suspected labels among the pictures of these splits, each with its features, and writes the list.

    Beyond MOST_PICTURES nothing is looked for: the list is None. Raises StoreError where it cannot be written.
    """
    paths, contents, labels = (
        np.concatenate([getattr(pictures, name) for pictures, _ in splits]) for name in ("paths", "contents", "labels")
    )
    found: list[dict[str, Any]] | None = None
    if len(labels) <= MOST_PICTURES:
        values = torch.from_numpy(np.concatenate([values for _, values in splits]))
        known = torch.from_numpy(labels)
        found = [
            {
                "path": str(paths[one.row]),
                "content": str(contents[one.row]),
                "class": classes[labels[one.row]],
                "neighbours_class": classes[one.label],
                "neighbours": one.neighbours,
                "nearest": str(paths[one.nearest]),
            }
            for one in suspected(Standardised.of(values).apply(values), known, classes=len(classes), check=check)
        ]
    write_json(folder / FILE, {"pictures": len(labels), "neighbours": min(NEIGHBOURS, len(labels) - 1), "suspects": found})
