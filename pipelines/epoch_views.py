"""The views of one epoch by their places, planned some thousands at once."""

from functools import lru_cache

import numpy as np

from pipelines.colour import Colour
from pipelines.manifest import Pictures
from pipelines.plan import Integers, ViewRule, Views, epoch_order, partners, together, views

PLANNED_AT_ONCE = 4096  # views: planning has a fixed cost a call, about as much as 1,000 views
SPANS_KEPT = 8  # DALI plans some batches ahead of the one that is read, which asks for its views again


class EpochViews:
    """An epoch of n pictures has n places; with mixup n more: place n + p is the partner of the view at place p."""

    def __init__(self, rule: ViewRule, pictures: Pictures, colour: Colour, epoch: int) -> None:
        self.rule, self.pictures, self.colour, self.epoch = rule, pictures, colour, epoch
        self.order = epoch_order(rule, epoch, pictures.labels)
        self.span = rule.global_batch * max(PLANNED_AT_ONCE // rule.global_batch, 1)  # a batch lies in one span
        self.planned = lru_cache(maxsize=SPANS_KEPT)(self.plan)

    def plan(self, span: int, partner: bool) -> Views:
        """The views of one span of places, or their partners."""
        positions = np.arange(span * self.span, min((span + 1) * self.span, len(self.order)))
        return (partners if partner else views)(
            self.rule, self.pictures, self.colour, self.epoch, positions, self.order
        )

    def places(self, positions: Integers) -> Integers:
        """What is read for these positions of one batch, (n,): with mixup also their partners, behind them, (2n,)."""
        return np.concatenate([positions, positions + len(self.order)]) if self.rule.mixup else positions

    def rows(self, places: Integers) -> Views:
        """The views at these places of one batch, those of partners behind the others."""
        n = len(self.order)
        own, other = places[places < n], places[places >= n] - n
        parts = []
        for positions, partner in ((own, False), (other, True)):
            if len(positions):
                span = int(positions[0]) // self.span
                parts.append(self.planned(span, partner)[positions - span * self.span])
        return parts[0] if len(parts) == 1 else together(parts)
