"""Where a stage's first weights come from: an earlier stage of its schedule, or any finished stage of the store by its key."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from training.store import Store, read_json
from vggcore.errors import RecipeError, StoreError
from vggcore.recipe import NetName, stored_key
from vggcore.schedule import Stage, parent_key


def is_done(store: Store, key: str) -> bool:
    """Whether the stage has a result."""
    return (store.stage(key) / "result.json").exists()


def result_weights(store: Store, key: str) -> Path:
    """The file of a finished stage's weights. Raises StoreError when the stage has not finished."""
    result = read_json(store.stage(key) / "result.json")
    if result is None:
        raise StoreError(f"{store.stage(key)}: the stage has not finished; train it first")
    return store.stage(key) / "checkpoints" / str(result["checkpoint"]) / "model.safetensors"


def parent_weights(
    stage: Stage, stages: Sequence[Stage], keys: Mapping[str, str], store: Store
) -> tuple[NetName, Path] | None:
    """The parent's net and its weights; None for random weights. Raises StoreError when the parent has not finished."""
    key = parent_key(stage, keys)
    if key is None:
        return None
    nets = {other.name: other.net for other in stages}
    if stage.init_from in nets:
        return nets[stage.init_from], result_weights(store, key)
    return read_json(store.stage(key) / "stage.json")["stage"]["net"], result_weights(store, key)


def check_stored_parents(stages: Sequence[Stage], store: Store, classes: Sequence[str]) -> None:
    """Refuses, before anything starts, parents named by key that the store does not have, or that know other classes.

    Raises StoreError, RecipeError. Shapes are compared when the weights are copied (vggcore.initialise).
    """
    for stage in stages:
        key = stored_key(stage.init_from)
        if key is None:
            continue
        about = read_json(store.stage(key) / "stage.json")
        if about is None or not is_done(store, key):
            what = "is not in" if about is None else "has not finished in"
            raise StoreError(
                f"stage {stage.name!r}: init_from {stage.init_from!r}: that stage {what} store {store.root}; name a finished"
                " one (`vggrow plan` prints keys), or the store that has it by --store"
            )
        known = about["classes"]
        if known != list(classes):
            raise RecipeError(
                f"stage {stage.name!r}: init_from {stage.init_from!r} knows the classes {', '.join(known)}, but the pictures"
                f" have {', '.join(classes)}; start from a stage of the same classes, or without init_from"
            )
