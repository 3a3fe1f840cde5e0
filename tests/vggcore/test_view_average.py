"""Which views of a test picture are averaged, and that they are the mirrored and turned pictures."""

import pytest
import torch

from vggcore.schedule import Stage
from vggcore.view_average import effective_views, turn, turned_views

PICTURE = torch.tensor([[0, 1, 2], [3, 4, 5]])[None, None]      # (1, 1, 2, 3): unlike all that it is turned into

# fmt: off
EXPECTED = {
    (False, 0): [[0, 1, 2], [3, 4, 5]],
    (True, 0):  [[2, 1, 0], [5, 4, 3]],
    (True, 2):  [[3, 4, 5], [0, 1, 2]],      # top to bottom
    (False, 2): [[5, 4, 3], [2, 1, 0]],
    (False, 1): [[2, 5], [1, 4], [0, 3]],    # counter-clockwise
    (True, 1):  [[0, 3], [1, 4], [2, 5]],
    (False, 3): [[3, 0], [4, 1], [5, 2]],
    (True, 3):  [[5, 2], [4, 1], [3, 0]],
}
# fmt: on


def stage(**settings) -> Stage:
    return Stage.model_construct(**({"head": "paper"} | settings))


@pytest.mark.parametrize("turned", EXPECTED)
def test_a_view_is_mirrored_and_then_turned(turned):
    assert turn(PICTURE, turned)[0, 0].tolist() == EXPECTED[turned]


def test_turns_are_all_eight_views_and_flips_two_or_four():
    upright, both = stage(), stage(flip_vertical=True)

    assert turned_views("none", "centre", both) == ((False, 0),)
    assert turned_views("none", "dense", both) == ((False, 0), (True, 0))
    assert turned_views("flips", "centre", upright) == turned_views("flips", "dense", upright) == ((False, 0), (True, 0))
    assert set(turned_views("flips", "centre", both)) == {(False, 0), (True, 0), (False, 2), (True, 2)}
    assert set(turned_views("turns", "dense", upright)) == set(EXPECTED) and len(turned_views("turns", "centre", both)) == 8


def test_views_that_add_nothing_are_no_views():
    assert effective_views("flips", "dense", stage()) == "none"
    assert effective_views("flips", "dense", stage(flip_vertical=True)) == "flips"
    assert effective_views("flips", "centre", stage()) == "flips"
    assert effective_views("turns", "centre", stage(head="linear", flip_vertical=True)) == "none"
