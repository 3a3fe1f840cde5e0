"""What is done to training crops once DALI has made them: flips, turns, erased rectangles, mixup; exact on every device.

DALI mirrors left and right, exactly, and has no operator that turns each picture of a batch by a number of its own
without interpolating. Here pixels are moved, set to 0, or mixed by three elementwise float32 operations, so that a view
does not depend on the others of its batch.
"""

import numpy as np
import torch

from pipelines.plan import Views


def after_crop(images: torch.Tensor, rows: Views) -> torch.Tensor:
    """Crops (n, 3, crop, crop) as their views, (n,) rows, are to be seen: upside down, turned, erased. May change `images`."""
    return erased(turned(images, rows), rows)


def turned(images: torch.Tensor, rows: Views) -> torch.Tensor:
    """Crops with top and bottom exchanged where the plan has it, then turned counterclockwise by whole quarters."""
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


def erased(images: torch.Tensor, rows: Views) -> torch.Tensor:
    """Crops with their rectangles at 0: the mean that was subtracted, whatever the view's colour shift."""
    if rows.erased is None:
        return images
    top, left, high, wide = torch.from_numpy(rows.erased).to(images.device).T[:, :, None]  # (n, 1) each
    place = torch.arange(images.shape[-1], device=images.device)
    down, across = ((place >= first) & (place < first + length) for first, length in ((top, high), (left, wide)))
    return images.masked_fill_(down[:, None, :, None] & across[:, None, None, :], 0.0)


def mixed(images: torch.Tensor, partners: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """weights * images + (1 - weights) * partners, (n, 3, crop, crop), with a weight, (n,) float32, for each picture."""
    share = weights[:, None, None, None]
    return images * share + partners * (1 - share)
