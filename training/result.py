"""result.json of an SGD stage: where it ended, and each set of weights it leaves with its digest and figures on val.

    "weights": {"last": {"file": "checkpoints/iteration-96/model.safetensors", "digest": ..., "val_top1_accuracy": ...,
                         "val_loss": ...}, "best on val": ..., "average": ...}
"""

from pathlib import Path
from typing import Any

from training.checkpoint import AVERAGE, WEIGHTS, Progress, checkpoint_folder, file_digest, read_checkpoint
from vggcore.errors import StoreError
from vggcore.recipe import BEST_ON_VAL

Val = tuple[float, float]      # top-1 accuracy (0..1) and mean loss


def result_of(
    folder: Path, progress: Progress, *, ended_by: str | None, average_val: Val | None, device: str
) -> dict[str, Any]:
    """What result.json holds; average_val: of the averaged weights, None where there are none. Raises StoreError."""
    return {
        "checkpoint": f"iteration-{progress.iteration}",
        "best_checkpoint": f"iteration-{progress.best_iteration}",
        "weights": weights_left(folder, progress, average_val),
        "epochs": progress.epoch,
        "iterations": progress.iteration,
        "val_top1_accuracy": progress.val_top1,   # of the last epoch: of the weights that are the result
        "best_val_top1_accuracy": progress.plateau.best,
        "ended_by": ended_by,
        "seconds": round(progress.seconds, 3),
        "world_size": progress.world_size,
        "threads": progress.threads,
        "device": device,
    }


def weights_left(folder: Path, progress: Progress, average_val: Val | None) -> dict[str, Any]:
    """The sets of weights by [register] weights' words; a best checkpoint that was broken since is left out."""
    last, best = progress.iteration, progress.best_iteration
    found = {"last": weights_entry(folder, last, WEIGHTS, (progress.val_top1, progress.val_loss))}
    if (checkpoint_folder(folder, best) / WEIGHTS).exists():
        found[BEST_ON_VAL] = weights_entry(folder, best, WEIGHTS, (progress.plateau.best, progress.best_val_loss))
    if average_val is not None:
        found["average"] = weights_entry(folder, last, AVERAGE, average_val)
    return found


def weights_entry(folder: Path, iteration: int, name: str, val: Val) -> dict[str, Any]:
    """One set of weights; a loss below 0 was not recorded: checkpoints from before there were losses."""
    path = checkpoint_folder(folder, iteration) / name
    top1, loss = val
    return {
        "file": str(path.relative_to(folder)),
        "digest": read_checkpoint(folder, iteration).files.get(name) or file_digest(path),
        "val_top1_accuracy": top1,
        "val_loss": loss if loss >= 0 else None,
    }


def chosen_weights(folder: Path, result: dict[str, Any], which: str) -> dict[str, Any]:
    """A finished stage's weights as weights_left has them; results of before know "last" and "best on val", and no digest.

    Raises StoreError where the stage has no such weights.
    """
    known = result.get("weights")
    if known is None:
        names = {"last": result["checkpoint"], BEST_ON_VAL: result.get("best_checkpoint")}
        files = {name: f"checkpoints/{checkpoint}/{WEIGHTS}" for name, checkpoint in names.items() if checkpoint}
        known = {name: {"file": file, "digest": None} for name, file in files.items() if (folder / file).exists()}
        known.setdefault("last", {"file": files["last"], "digest": None})
    if which not in known:
        raise StoreError(
            f"{folder}: the stage has no weights {which!r}; there are {', '.join(map(repr, sorted(known)))}; choose one of"
            " these by [register] weights"
        )
    return dict(known[which])
