"""What a recipe would do, before anything starts: stages in order, what is done already, sizes, operations, traffic."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.plan_notes import largest_share, scale_notes, span, standing_notes
from pipelines.manifest import Manifest
from pipelines.plan import batches_per_epoch
from pipelines.sources import counted
from training.checkpoint import room_for_checkpoints
from training.features.batches import BATCH_PIXELS
from training.features.cost import feature_macs
from training.freezing import frozen_layers, usual_macs
from training.losses import check_class_weights
from training.optimise import moments
from training.parents import check_named, check_parents, known_order, settle
from training.store import Store
from vggcore.class_order import spoken_classes
from vggcore.errors import RecipeError
from vggcore.nets import LayerRow, layer_table
from vggcore.recipe import Recipe
from vggcore.recipe_checks import stored_key
from vggcore.schedule import Stage, parent_key, resolve_stages, stage_keys
from vggcore.transfer import LayerOrigin

FLOAT_BYTES = 4
POOL_INDEX_BYTES = 8      # max pooling remembers where each maximum was, as int64
LRN_COPIES = 5            # what torch's LocalResponseNorm keeps for backward, in copies of its output (measured)
CLASSES_OF_THE_PAPER = 1000


@dataclass(frozen=True)
class StagePlan:
    """A stage as it would run; what needs the pictures is None while they have not been scanned."""

    name: str
    net: str
    scale: tuple[int, int]               # of the training views; with test_scales it plays no part
    test_scales: tuple[int, ...] | None  # of a logistic fit: those of its features
    init_from: str | None
    key: str | None
    status: str                          # "done" | "begun" | "to do" | "unknown"
    reason: str                          # why, in a few words
    global_batch: int                    # pictures an iteration; 0: a logistic fit
    max_epochs: int                      # 0: a logistic fit, which sees each picture once
    max_iterations: int | None
    parameters: int
    weights_mb: float                    # 1e6 bytes
    memory_per_worker_gib: float         # weights, gradients, momentum, activations: an estimate
    checkpoints_gib: float               # of disk, at most
    gflop_per_picture: float             # forward and backward of one training view, a multiply-add counting two
    max_pflop: float | None              # over all epochs at most, for the whole stage
    traffic_per_iteration_mb: float      # what each worker sends in one all-reduce of the gradients, 1e6 bytes
    mean: str | None                     # whose mean is subtracted, "data" or "weights"; None: not known yet
    layers: tuple[LayerOrigin, ...]      # where each layer's first weights come from; empty: not known yet


@dataclass(frozen=True)
class Plan:
    """The whole schedule; `notes` say what is assumed or unknown."""

    recipe: str
    workers: int
    classes: int
    train_pictures: int | None
    fingerprint: str | None
    global_batch: int                    # of [train]; a stage may have another
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]


def plan(
    recipe: Recipe,
    manifest: Manifest | None,
    workers: int,
    store: Path,
    *,
    pictures: int | None = None,
    classes: int | None = None,
) -> Plan:
    """The plan of `recipe` on `workers` workers, against what `store` holds; decodes nothing and starts nothing.

    manifest: of the recipe's data if it was scanned; None: sizes are for `classes` classes, else the paper's 1,000 (2 for
    elpv), iterations for `pictures` training pictures where they are given, and whether a stage is done cannot be said.
    Raises RecipeError where both a manifest and numbers in its place are given.
    """
    if manifest is not None and (pictures or classes):
        raise RecipeError("--pictures, --classes: no effect, since the pictures have been scanned into this store; remove them")
    if manifest is not None:
        manifest = manifest.in_order(known_order(resolve_stages(recipe), Store(store), recipe.data))
    classes, notes = classes_known(recipe, manifest, classes)
    stages, origins = with_origins(resolve_stages(recipe), manifest, classes, Store(store))
    pictures = len(manifest.split("train").labels) if manifest else pictures
    keys: dict[str, str] = {}
    if manifest:
        keys = stage_keys(stages, classes=manifest.classes, fingerprint=manifest.fingerprint)
    earlier = earlier_stages(store) if manifest else []
    tables: dict[str, list[LayerRow]] = {}
    rows = []
    for stage in stages:
        shape = f"{stage.net} {stage.net_settings}"
        if shape not in tables:   # scales share a net, and the net's size does not depend on them
            tables[shape] = layer_table(stage.net, classes=classes, **stage.net_settings)
        status, reason = status_of(stage, keys, store, earlier)
        layers = tuple(origins.get(stage.name, ()))
        rows.append(stage_plan(stage, tables[shape], keys.get(stage.name), status, reason, pictures, workers, layers))
    return Plan(
        recipe=recipe.name,
        workers=workers,
        classes=classes,
        train_pictures=pictures,
        fingerprint=manifest.fingerprint if manifest else None,
        global_batch=recipe.train.global_batch,
        stages=tuple(rows),
        notes=tuple(notes + standing_notes(stages, workers) + scale_notes(stages, Store(store)) + [disk_note(rows)]),
    )


def with_origins(
    stages: tuple[Stage, ...], manifest: Manifest | None, classes: int, store: Store
) -> tuple[tuple[Stage, ...], dict[str, list[LayerOrigin]]]:
    """The stages settled, and where each one's layers come from; stages of the store need the pictures' classes for that.

    Raises StoreError and RecipeError for parents that are absent or do not fit, as `vggrow train` would.
    """
    if manifest is None and any(stored_key(stage.init_from) for stage in stages):
        check_named(stages, store)
        return stages, {}
    settled = settle(stages, store, manifest.fingerprint if manifest else "")
    if manifest is not None:
        check_class_weights(settled, manifest.classes, manifest.split("train").labels)
    names = manifest.classes if manifest else tuple(f"class {number}" for number in range(classes))
    return settled, check_parents(settled, store, names)


def classes_known(recipe: Recipe, manifest: Manifest | None, classes: int | None) -> tuple[int, list[str]]:
    """How many classes the nets get, and what has to be said about it; classes: what was asked for, or None."""
    if manifest is not None:
        return len(manifest.classes), []
    scan = "run `vggrow data scan` on this recipe for iterations, operations and what is done already"
    if classes is not None:
        return classes, [f"the pictures have not been scanned into this store yet: {scan}"]
    if recipe.data.source == "elpv":
        return 2, [f"the pictures have not been scanned into this store yet: {scan}"]
    return CLASSES_OF_THE_PAPER, [
        f"the pictures have not been scanned into this store yet, so sizes are for {CLASSES_OF_THE_PAPER:,} classes: {scan}"
    ]


def disk_note(rows: Sequence[StagePlan]) -> str:
    """What the stage with the largest checkpoints takes of the disk."""
    largest = max(rows, key=lambda row: row.checkpoints_gib)
    return f"checkpoints take at most {number(largest.checkpoints_gib)} GiB of disk a stage ({largest.name})"


def stage_plan(
    stage: Stage,
    table: Sequence[LayerRow],
    key: str | None,
    status: str,
    reason: str,
    pictures: int | None,
    workers: int,
    layers: tuple[LayerOrigin, ...],
) -> StagePlan:
    """The row of one stage; `pictures` is the training split's size."""
    parameters = sum(row.parameters for row in table)
    weights = parameters * FLOAT_BYTES
    trained = sum(row.parameters for row in table[frozen_layers(stage, table) :]) * FLOAT_BYTES
    logistic = stage.fit == "logistic"
    flop = 2 * (feature_macs(stage) if logistic else usual_macs(stage, table))
    epochs = 0 if logistic else stage.max_epochs
    return StagePlan(
        name=stage.name,
        net=stage.net,
        scale=stage.scale,
        test_scales=stage.default_test_scales if logistic else None,
        init_from=stage.init_from,
        key=key,
        status=status,
        reason=reason,
        global_batch=0 if logistic else stage.global_batch,
        max_epochs=epochs,
        max_iterations=epochs * batches_per_epoch(pictures, stage.global_batch) if pictures else None,
        parameters=parameters,
        weights_mb=weights / 1e6,
        memory_per_worker_gib=memory_per_worker(stage, table, weights, trained, workers) / 2**30,
        checkpoints_gib=room_for_checkpoints(stage, parameters, trained // FLOAT_BYTES) / 2**30,
        gflop_per_picture=flop / 1e9,
        max_pflop=flop * pictures * max(epochs, 1) / 1e15 if pictures else None,
        traffic_per_iteration_mb=0.0 if logistic else 2 * (workers - 1) / workers * trained / 1e6,   # ring all-reduce
        mean=stage.mean,
        layers=layers,
    )


def memory_per_worker(stage: Stage, table: Sequence[LayerRow], weights: int, trained: int, workers: int) -> float:
    """Bytes: weights; gradients (DDP's buckets are views of them) and moments of those that are trained; what forward
    keeps, and two gradients in flight."""
    if stage.fit == "logistic":
        pixels = max(BATCH_PIXELS["cpu"], max(stage.default_test_scales) ** 2) / stage.crop**2
        return weights + pixels * 2 * max(math.prod(row.output) for row in table) * activation_bytes(stage)
    batch = largest_share(stage.global_batch, workers)
    if stage.micro_batch:
        batch = min(batch, stage.micro_batch)
    widest = max(math.prod(row.output) for row in table) * activation_bytes(stage)
    return weights + (1 + moments(stage)) * trained + batch * (kept_for_backward(table, stage) + 2 * widest)


def kept_for_backward(table: Sequence[LayerRow], stage: Stage) -> int:
    """Bytes that one picture's forward pass keeps: its view, each conv's and FC layer's output, pools and their places.

    ReLU works in place and keeps nothing more. Of frozen layers only what the last one gives is kept. Within a few percent
    of torch's own count (a test compares them).
    """
    size, frozen = activation_bytes(stage), frozen_layers(stage, table)
    kept = (math.prod(table[frozen - 1].output) if frozen else 3 * stage.crop**2) * size
    for row in table[frozen:]:
        values = math.prod(row.output)
        if row.macs:
            kept += values * size
        elif row.kind == "maxpool":
            kept += values * (size + POOL_INDEX_BYTES)
        elif row.kind == "LRN":
            kept += LRN_COPIES * values * size
    return kept


def activation_bytes(stage: Stage) -> int:
    """Bytes of one activation: 2 in bf16, else 4."""
    return 2 if stage.precision == "bf16" else FLOAT_BYTES


def status_of(stage: Stage, keys: dict[str, str], store: Path, earlier: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Whether the stage is done by its key, and why it would run when it is not."""
    if stage.name not in keys:
        return "unknown", "pictures not scanned yet"
    folder = store / "stages" / keys[stage.name]
    if (folder / "result.json").exists():
        return "done", f"stage {keys[stage.name]} is in the store"
    begun = checkpoints(folder)
    if begun:
        return "begun", f"goes on from iteration {begun[-1]}"
    parent = parent_key(stage, keys)
    if parent and not parent.startswith("weights:") and not (store / "stages" / parent / "result.json").exists():
        same = changed_since(stage, earlier)
        return "to do", f"after {stage.init_from}" + (f"; {same}" if same else "")
    return "to do", changed_since(stage, earlier) or "never run"


def checkpoints(folder: Path) -> list[int]:
    """The iterations of the checkpoints in a stage's folder, oldest first."""
    names = (path.name.removeprefix("iteration-") for path in (folder / "checkpoints").glob("iteration-*"))
    return sorted(int(name) for name in names if name.isdigit())


def earlier_stages(store: Path) -> list[dict[str, Any]]:
    """What stage.json holds for each stage of the store, the newest first; those that cannot be read are left out."""
    found = []
    files = sorted((store / "stages").glob("*/stage.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return found


def changed_since(stage: Stage, earlier: Sequence[dict[str, Any]]) -> str:
    """What differs from the newest stage of the same name in the store; empty when there is none of that name."""
    for saved in earlier:
        if saved.get("name") != stage.name:
            continue
        before, now = saved.get("stage", {}), stage.model_dump(mode="json")
        if (before.get("mean") or "data") == (now["mean"] or "data"):      # not chosen yet means the pictures'
            del now["mean"]
        differing = [name for name in now if name in before and before[name] != now[name]]
        if differing:
            changes = ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in differing)
            return f"{changes} (since {saved.get('key')})"
        return f"its pictures, classes or parent changed (since {saved.get('key')})"
    return ""


def plan_text(found: Plan) -> str:
    """The plan for a terminal: a line a stage, a line a net, what is to run in all, and notes."""
    data = f"{found.train_pictures:,} training pictures, " if found.train_pictures is not None else ""
    workers = counted(found.workers, "worker")
    head = f"{found.recipe}: {counted(len(found.stages), 'stage')}, {data}{found.classes:,} classes, {workers}"
    stages = aligned(
        ("stage", "net", "S", "from", "epochs", "iterations", "PFLOP", "status"),
        [stage_cells(stage) for stage in found.stages],
        left=(0, 1, 2, 3, 7),
    )
    sizes = aligned(
        ("net", "parameters", "weights MB", "GiB a worker", "GFLOP a picture", "MB sent an iteration"),
        net_rows(found.stages),
        left=(0,),
    )
    to_run = [stage for stage in found.stages if stage.status != "done"]
    starts = [origin_line(stage) for stage in found.stages if stage.init_from and stage.layers]
    batches = span(stage.global_batch for stage in found.stages if stage.max_epochs)
    batch = f", global batch {batches}" if batches else ""
    lines = [f"{head}{batch}", "", *stages, "", *sizes, ""]
    if starts:
        lines += ["first weights:", *starts, ""]
    if found.train_pictures is not None:
        total = sum(stage.max_pflop or 0 for stage in to_run)
        lines.append(f"{len(to_run)} of {counted(len(found.stages), 'stage')} to run, {number(total)} PFLOP at most")
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def origin_line(stage: StagePlan) -> str:
    """Which layers come from where, and which are random: "  D-72: conv1_1, conv2_1 from 'A-72'; random: conv1_2, fc3".

    Rows of the last layer that a parent with fewer classes lacks: "; fc3 gets a row for class 'fox'".
    """
    taken = [origin.layer for origin in stage.layers if origin.source]
    random = [origin.layer for origin in stage.layers if not origin.source]
    source = next(origin.source for origin in stage.layers if origin.source)
    if not stage.max_epochs:                  # a logistic fit finds its last layer anew, whatever the parent has
        taken, random = [name for name in taken if name != stage.layers[-1].layer], [stage.layers[-1].layer]
    if not random:
        taken = ["all layers"]
    rest = f"; {'random' if stage.max_epochs else 'fitted'}: {', '.join(random)}" if random else ""
    mean = ", with its mean" if stage.mean == "weights" else ""
    grown = next((origin for origin in stage.layers if origin.added), None)
    rows = ""
    if grown is not None:
        number = "a row" if len(grown.added) == 1 else "rows"
        rows = f"; {grown.layer} gets {number} for {spoken_classes(grown.added)}"
    return f"  {stage.name}: {', '.join(taken)} from {source}{mean}{rest}{rows}"


def stage_cells(stage: StagePlan) -> tuple[str, ...]:
    """What differs from stage to stage, as text."""
    low, high = stage.scale
    return (
        stage.name,
        stage.net,
        ", ".join(map(str, stage.test_scales)) if stage.test_scales else str(low) if low == high else f"{low}-{high}",
        stage.init_from or "random",
        f"{stage.max_epochs:,}" if stage.max_epochs else "logistic fit",
        "-" if not stage.max_epochs else "?" if stage.max_iterations is None else f"{stage.max_iterations:,}",
        "?" if stage.max_pflop is None else number(stage.max_pflop),
        f"{stage.status}: {stage.reason}",
    )


def net_rows(stages: Sequence[StagePlan]) -> list[tuple[str, ...]]:
    """A row for all stages of equal sizes and costs; where one net has several, with their names."""
    names: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for stage in stages:
        names.setdefault((stage.net, net_cells(stage)), []).append(stage.name)
    nets = [net for net, _ in names]
    return [
        (net if nets.count(net) == 1 else f"{net}: {', '.join(of)}", *cells) for (net, cells), of in names.items()
    ]


def net_cells(stage: StagePlan) -> tuple[str, ...]:
    """What stages of one net often have in common, as text."""
    return (
        f"{stage.parameters:,}",
        number(stage.weights_mb),
        number(stage.memory_per_worker_gib),
        number(stage.gflop_per_picture),
        number(stage.traffic_per_iteration_mb),
    )


def aligned(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """The lines of a table, columns in `left` to the left and the others to the right."""
    table = [titles, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def layer_text(rows: Sequence[LayerRow]) -> str:
    """A net's layers for a terminal: name, kind, output, parameters and multiply-adds, totals in the last line."""
    total = ("", "", "", f"{sum(row.parameters for row in rows):,}", f"{sum(row.macs for row in rows):,}")
    table = [
        (row.name, row.kind, "x".join(map(str, row.output)), f"{row.parameters:,}", f"{row.macs:,}") for row in rows
    ]
    return "\n".join(aligned(("layer", "kind", "output", "parameters", "MACs"), [*table, total], left=(0, 1, 2)))


def number(value: float) -> str:
    """Three significant digits in plain notation: 0.0123, 4.56, 789, 12,300."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
