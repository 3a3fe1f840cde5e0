"""Labels that the nearest pictures in feature space contradict: whom to ask about first. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 10
MOST_SUSPECTS = 20
MOST_PICTURES = 10_000      # distances grow with the square: 12 s of a core at 3,000 features
BLOCK = 512                 # pictures whose distances to all others are held at a time


@dataclass(frozen=True)
class Suspect:
    """A picture most of whose nearest neighbours have one other label; rows are those of the features."""

    row: int
    label: int            # of most neighbours
    neighbours: int       # how many of them have it
    nearest: int          # row of the nearest of these


def suspected(
    features: Tensor, labels: Tensor, *, classes: int, check: Callable[[], None] = lambda: None
) -> list[Suspect]:
    """The pictures, MOST_SUSPECTS at most, more than half of whose NEIGHBOURS nearest others have one other label.

    features: (n, F), standardised; labels: (n,) int64. Those with most such neighbours come first, of equal ones that which
    is farther from its own class against the other: nearest picture of its own label over nearest of the other's.
    """
    k = min(NEIGHBOURS, len(labels) - 1)
    if k < 1:
        return []
    values = features.float()
    squares = values.square().sum(1)
    found: list[tuple[tuple[float, float, int], Suspect]] = []
    for start in range(0, len(labels), BLOCK):
        check()
        rows = torch.arange(start, min(start + BLOCK, len(labels)))
        distances = (squares[rows, None] + squares[None] - 2 * values[rows] @ values.T).clamp(min=0)
        distances[torch.arange(len(rows)), rows] = torch.inf      # a picture is not its own neighbour
        nearest = distances.topk(k, largest=False).indices
        counts = torch.nn.functional.one_hot(labels[nearest], classes).sum(1)
        counts[torch.arange(len(rows)), labels[rows]] = 0
        most, other = counts.max(1)
        for place in (2 * most > k).nonzero().flatten().tolist():
            row, label = int(rows[place]), int(other[place])
            of_other = torch.where(labels == label, distances[place], torch.inf)
            own = torch.where(labels == labels[row], distances[place], torch.inf)
            ratio = float(own.min() / of_other.min().clamp(min=1e-12))
            suspect = Suspect(row, label, int(most[place]), int(of_other.argmin()))
            found.append(((-suspect.neighbours, -ratio, row), suspect))
    return [suspect for _, suspect in sorted(found, key=lambda pair: pair[0])[:MOST_SUSPECTS]]
