"""What a kill campaign writes down: every kill, every run, and what they are measured against."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Life:
    """How long the parts of an undisturbed command took, in seconds."""

    before_workers: float    # until its workers were there
    workers_start: float     # from then until the first iteration
    training: float          # validation and checkpoints among it
    after: float             # evaluation, package, registration

    @property
    def whole(self) -> float:
        """From its start to its end."""
        return self.before_workers + self.workers_start + self.training + self.after


@dataclass
class Kill:
    """One kill, as it was found and as the run went on from it."""

    kind: str                          # "worker", "driver" or "both"
    second: float                      # since the run's first command began
    command: int                       # the how manieth command of the run it hit, from 1
    iteration: int                     # reached, as the journal had it (half a second old at most)
    phase: str                         # "start" (or restart of workers), "training", "end" (of the stage and after)
    writing: bool                      # a checkpoint was being written
    resumed_from: int | None = None    # iteration; None: nothing was left to train

    def words(self) -> str:
        """In a line of a log."""
        where = f"{self.phase}{', writing a checkpoint' if self.writing else ''}, iteration {self.iteration}"
        return f"{self.kind} at {self.second:.1f} s ({where}, on from {self.resumed_from})"


@dataclass
class Run:
    """One store from its first command to its result."""

    workers: int
    kills: list[Kill]
    commands: int = 0                  # how often the command was typed
    gave_up: int = 0                   # of these: ended with exit 2 since workers died too often
    too_busy: int = 0                  # of these: ended with exit 2 since Ray did not start within its 30 s
    seconds: float = 0.0
    differs: tuple[str, ...] = ()      # what was not as in the undisturbed run

    @property
    def equal(self) -> bool:
        """Whether it ended like the run that nobody disturbed."""
        return not self.differs

    def words(self) -> str:
        """In a line of a log."""
        verdict = "equal" if self.equal else f"NOT EQUAL in {', '.join(self.differs)}"
        return (
            f"{'; '.join(kill.words() for kill in self.kills)}; {self.seconds:.0f} s, {self.commands} commands,"
            f" of which {self.gave_up} gave up and {self.too_busy} found no room for Ray: {verdict}"
        )


@dataclass
class Campaign:
    """All runs at one number of workers."""

    workers: int
    seed: int
    iterations: int
    undisturbed: Life
    runs: list[Run]

    @property
    def kills(self) -> list[Kill]:
        """Those of all runs."""
        return [kill for run in self.runs for kill in run.kills]

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self) | {"equal": [run.equal for run in self.runs]}
