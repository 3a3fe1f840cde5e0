"""Suspected labels: those that the nearest pictures contradict."""

import torch

from vggcore.neighbours import MOST_SUSPECTS, NEIGHBOURS, suspected


def clouds(n: int = 60, wrong: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Three well separated clouds; the rows in `wrong` have the next cloud's label."""
    labels = torch.arange(n) % 3
    features = 20.0 * torch.eye(3)[labels] + torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    labels[list(wrong)] = (labels[list(wrong)] + 1) % 3
    return features, labels


def test_a_wrong_label_among_right_ones_is_found_with_what_its_neighbours_have() -> None:
    features, labels = clouds(wrong=(7, 30))

    found = suspected(features, labels, classes=3)

    assert sorted(one.row for one in found) == [7, 30]
    for one in found:
        assert one.label == one.row % 3 and one.neighbours >= NEIGHBOURS - 1
        assert labels[one.nearest] == one.label and one.nearest != one.row


def test_pictures_with_the_labels_of_their_neighbours_are_left_alone() -> None:
    assert suspected(*clouds(), classes=3) == []


def test_the_least_doubtful_come_first_and_the_list_has_an_end() -> None:
    features, labels = clouds(300, wrong=tuple(range(0, 100, 4)))
    features[8] = 20.0 * torch.eye(3)[2] + 0.01      # in the very middle of the cloud of another label than its own, 0

    found = suspected(features, labels, classes=3)

    assert len(found) == MOST_SUSPECTS
    assert [one.neighbours for one in found] == sorted((one.neighbours for one in found), reverse=True)


def test_a_copy_with_another_label_is_the_nearest_there_is() -> None:
    features, labels = clouds(wrong=(9,))
    features[9] = features[12]

    (found,) = suspected(features, labels, classes=3)

    assert (found.row, found.nearest) == (9, 12)


def test_fewer_pictures_than_neighbours_are_no_error() -> None:
    features, labels = clouds(6)

    assert suspected(features, labels, classes=3) == []
    assert suspected(features[:1], labels[:1], classes=3) == []


def test_blocks_change_nothing(monkeypatch) -> None:
    features, labels = clouds(100, wrong=(3, 50, 98))
    whole = suspected(features, labels, classes=3)
    monkeypatch.setattr("vggcore.neighbours.BLOCK", 7)

    assert suspected(features, labels, classes=3) == whole
