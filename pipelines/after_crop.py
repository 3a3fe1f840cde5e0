"""What is done to training crops once DALI has made them: pure movement of data, exact on every device.

DALI mirrors left and right, exactly, and has no operator that turns each picture of a batch by a number of its own
without interpolating.
"""

import numpy as np
import torch

from pipelines.plan import Views


def after_crop(images: torch.Tensor, rows: Views) -> torch.Tensor:
    """Crops (n, 3, crop, crop) as their views, (n,) rows, are to be seen: upside down, turned. May change `images`."""
    return turned(images, rows)


def turned(images: torch.Tensor, rows: Views) -> torch.Tensor:
    """Crops with top and bottom exchanged where the plan says so, then turned counterclockwise by whole quarters."""
    if rows.upside_down is None and rows.turns is None:
        return images
    none = np.zeros(len(rows), np.int64)
    upside_down = none if rows.upside_down is None else rows.upside_down
    quarters = none if rows.turns is None else rows.turns
    for down, turns in ((down, turns) for down in (0, 1) for turns in range(4) if down or turns):
        places = np.flatnonzero((upside_down == down) & (quarters == turns))
        if len(places):
            here = torch.from_numpy(places).to(images.device)
            some = images[here]  # a copy
            images[here] = torch.rot90(some.flip(2) if down else some, turns, (2, 3))
    return images
