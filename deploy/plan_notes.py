"""How the figures of a plan are meant, and what is worth knowing of its stages before they start."""

import json
from collections.abc import Iterable, Sequence

from pipelines.plan import share
from training.parents import stage_record
from training.store import Store
from vggcore.recipe_checks import same_features, stored_key
from vggcore.schedule import Stage

WORKER_GIB = 0.9          # a Ray worker with torch and DALI, before the net (650 to 860 MB were measured)


def standing_notes(stages: Sequence[Stage], workers: int) -> list[str]:
    """What is estimated, and for which stages a figure is an upper bound."""
    trained = [stage for stage in stages if stage.fit == "sgd"]
    shares = [largest_share(stage.global_batch, workers) for stage in trained]
    memory = "memory is an estimate"
    if shares:
        memory += f" for {span(shares)} pictures a worker"
        if 0 < trained[0].micro_batch < max(shares):
            memory += f", {trained[0].micro_batch} at a time"
    notes = [f"{memory}; a Ray worker itself takes about {WORKER_GIB} GiB more"]
    steered = [stage.name for stage in trained if stage.rule == "plateau"]
    if steered:
        which = "a stage" if len(steered) == len(stages) else ", ".join(steered)
        notes.append(f"epochs, iterations and operations are at most: the plateau rule may end {which} earlier")
    return notes


def scale_notes(stages: Sequence[Stage], store: Store) -> list[str]:
    """A line for each stage that trains on from a linear layer which was fitted to pictures of another size."""
    named = {stage.name: stage for stage in stages}
    notes = []
    for stage in stages:
        parent = parent_stage(stage, named, store)
        if stage.fit == "logistic" or stage.features is None or parent is None or parent.fit != "logistic":
            continue
        fitted, (low, high) = parent.default_test_scales, stage.scale
        if same_features(stage.features, parent.features) and not any(low <= side <= high for side in fitted):
            notes.append(
                f"{stage.name} takes the linear layer of {parent.name}, fitted at scale {', '.join(map(str, fitted))}, and"
                f" trains at {span((low, high))}: it starts less accurate than at one scale for both"
            )
    return notes


def parent_stage(stage: Stage, named: dict[str, Stage], store: Store) -> Stage | None:
    """The stage that this one starts from, of its own recipe or of the store; None: another start."""
    key = stored_key(stage.init_from)
    if key is not None:
        return Stage.model_validate_json(json.dumps(stage_record(stage, store, key)["stage"]))
    return named.get(stage.init_from or "")


def largest_share(global_batch: int, workers: int) -> int:
    """Pictures an iteration of the worker that has most of them; rank 0 always does or ties."""
    return max(stop - start for start, stop in (share(global_batch, rank, workers) for rank in range(workers)))


def span(numbers: Iterable[int]) -> str:
    """ "8", or "8 to 64"; empty for none."""
    found = sorted(set(numbers))
    return " to ".join(str(number) for number in (found[:1] + found[-1:] if len(found) > 1 else found))
