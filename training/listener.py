"""What may be heard while stages run, by whoever shows or records it."""

from typing import Any

from vggcore.schedule import Stage


class Listener:
    """Hears what happens while stages run; the default hears nothing."""

    def stage_begins(self, stage: Stage, key: str, *, done: bool) -> None:
        """A stage is next; `done`: it has finished before and is passed over."""

    def rows(self, stage: Stage, key: str, rows: list[dict[str, Any]]) -> None:
        """New rows of the stage's history; called every POLL_S, also with no rows."""

    def features(self, stage: Stage, key: str, split: str, done: int, total: int) -> None:
        """How far a logistic stage's features of a split are, pictures; called every POLL_S, also with nothing new."""

    def workers_restarted(self, stage: Stage, key: str, iteration: int) -> None:
        """Workers died and were replaced; training goes on from a checkpoint."""

    def node_leaves(self, stage: Stage, key: str, iteration: int, every_s: float) -> None:
        """A node of the stage is about to be taken away: a checkpoint is on its way, and one more every `every_s`."""

    def checkpoint_passed_over(self, stage: Stage, key: str, words: str) -> None:
        """A broken checkpoint was found, what is wrong with it, and the one before is used."""

    def stage_left_out(self, stage: Stage, key: str, reason: str) -> None:
        """The stage is not started in this call, and why: its parent failed."""

    def stage_ends(self, stage: Stage, key: str, status: str) -> None:
        """The stage is "FINISHED", "KILLED" (by a signal; it can go on) or "FAILED"."""
