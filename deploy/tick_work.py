"""What a tick works with, the same from its first step to its last, and the champion as its records hold it."""

import datetime
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlflow import MlflowClient
from rich.console import Console

from deploy.gate import GateRules
from deploy.notify import Outbox
from deploy.pipeline_file import Pipeline
from deploy.registry import TOP1_TAG
from deploy.signals import Signals
from deploy.ticks import Tick, Ticks
from training.store import Store
from vggcore.recipe import Recipe


@dataclass(frozen=True)
class Work:
    """What a tick works with, the same from its first step to its last."""

    pipeline: Pipeline
    recipe: Recipe
    recipe_text: str
    rules: GateRules
    store: Store
    tracking: str
    client: MlflowClient
    secret: bytes | None
    accept: str | None               # a person's reason to train although the data got worse
    clock: Callable[[], datetime.datetime]
    signals: Signals
    console: Console
    first_wait_s: float

    @property
    def rule_facts(self) -> dict[str, Any]:
        """The gate rules, and who decides about new classes, as records hold them."""
        return {**asdict(self.rules), "new_classes": self.pipeline.gate.new_classes}

    @property
    def ticks(self) -> Ticks:
        """The pipeline's records."""
        return Ticks.of(self.store, self.pipeline.name)

    @property
    def outbox(self) -> Outbox:
        """What the webhook is told."""
        return Outbox(self.store.root / "retraining" / self.pipeline.name / "notifications")

    def write(self, tick: Tick, step: str, facts: Mapping[str, Any]) -> Tick:
        """Records a step of a tick; a signal that came meanwhile ends the call here."""
        found = self.ticks.write(tick.number, step, self.clock(), facts)
        self.signals.check()
        return found


def champion_json(champion: Any) -> dict[str, Any] | None:
    """A champion's version and its test top-1 accuracy, for the history."""
    if champion is None:
        return None
    top1 = champion.tags.get(TOP1_TAG)
    return {"version": str(champion.version), "test_top1_accuracy": None if top1 is None else float(top1)}
