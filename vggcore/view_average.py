"""The mirrored and turned views of a test picture over which posteriors are averaged, by [evaluate] views. Pure."""

import torch
from torch import Tensor

from vggcore.recipe import TestViews
from vggcore.schedule import Stage

Turned = tuple[bool, int]      # whether a view is mirrored left to right, and then its quarter turns, 0 to 3

PLAIN: Turned = (False, 0)
MIRRORED: Turned = (True, 0)
UPSIDE_DOWN: tuple[Turned, ...] = ((True, 2), (False, 2))      # mirrored top to bottom, and both ways
ALL: tuple[Turned, ...] = tuple((mirrored, turns) for turns in range(4) for mirrored in (False, True))


def effective_views(views: TestViews, protocol: str, stage: Stage) -> TestViews:
    """What `views` comes to: "none" for linear heads, whose features have a flip of their own, and where nothing is added."""
    if stage.head == "linear":
        return "none"
    return views if turned_views(views, protocol, stage) != turned_views("none", protocol, stage) else "none"


def turned_views(views: TestViews, protocol: str, stage: Stage) -> tuple[Turned, ...]:
    """The views of a picture, each once; "dense" has its mirror image anyway (Sec. 3.2).

    "flips": mirrored, and with flip_vertical in training also top to bottom; "turns": all eight flips and quarter turns.
    """
    if views == "turns":
        return ALL
    if views == "flips" or protocol == "dense":
        return (PLAIN, MIRRORED, *(UPSIDE_DOWN if views == "flips" and stage.flip_vertical else ()))
    return (PLAIN,)


def turn(images: Tensor, turned: Turned) -> Tensor:
    """images (N, C, H, W) mirrored and turned counter-clockwise; H and W change places with an odd number of turns."""
    mirrored, turns = turned
    return torch.rot90(images.flip(3) if mirrored else images, turns, (2, 3))
