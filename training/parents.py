"""Where a stage's first weights and its mean come from: an earlier stage, a stage of the store, or published weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pipelines.colour import Colour
from training.checkpoint import file_digest
from training.published.library import find_weights, verified_weights
from training.result import chosen_weights
from training.store import Store, read_json
from vggcore.class_order import added_classes
from vggcore.errors import RecipeError, StoreError
from vggcore.recipe import Data
from vggcore.recipe_checks import stored_key, weights_name
from vggcore.schedule import Stage, parent_key
from vggcore.transfer import LayerOrigin, ParentNet, check_given, layer_origins, new_classes, stage_net, taken_tensors


@dataclass(frozen=True)
class Parent:
    """What a stage starts from; it travels to the workers."""

    key: str                     # a stage's key, or "weights:<digest>"
    name: str                    # as messages have it
    weights: Path                # a safetensors file
    tensors: Mapping[str, str]   # the child's tensors that it gives, each with its name in the file
    added: tuple[str, ...] = ()  # the child's last classes, whose rows of the last layer it does not give


def is_done(store: Store, key: str) -> bool:
    """Whether the stage has a result."""
    return (store.stage(key) / "result.json").exists()


def result_weights(store: Store, key: str, which: str = "last") -> Path:
    """The file of a finished stage's weights; which: as [register] weights names them. Raises StoreError."""
    return store.stage(key) / str(result_entry(store, key, which)["file"])


def result_entry(store: Store, key: str, which: str = "last") -> dict[str, Any]:
    """A finished stage's weights with their digest and figures on val, see training.result. Raises StoreError."""
    result = read_json(store.stage(key) / "result.json")
    if result is None:
        raise StoreError(f"{store.stage(key)}: the stage has not finished; train it first")
    return chosen_weights(store.stage(key), result, which)


def weights_digest(store: Store, key: str, which: str) -> str:
    """The digest of a finished stage's weights, 32 hex characters. Raises StoreError."""
    entry = result_entry(store, key, which)
    return str(entry["digest"] or file_digest(store.stage(key) / entry["file"]))


def settle(stages: Sequence[Stage], store: Store, fingerprint: str) -> tuple[Stage, ...]:
    """The stages with what only the store knows: digests of published weights, and whose mean each takes.

    stages: parents first. Where the recipe does not say, a stage takes its parent's mean and deviation when the parent is
    published weights, was trained on other pictures than `fingerprint`, or took its own parent's; else the pictures'. Where
    a parent has the pictures' own mean, "weights" is "data": one stage, one key.
    Raises StoreError for weights or stages that are not there, RecipeError for a deviation that weights do not have.
    """
    settled: dict[str, Stage] = {}
    for stage in stages:
        name, key = weights_name(stage.init_from), stored_key(stage.init_from)
        digest, standardised = None, stage.standardise      # of the weights that it starts from
        if name is not None:
            digest, standardised, brings = find_weights(store, name)[0].digest, False, True
        elif key is not None:
            about = stage_record(stage, store, key)
            brings = about["fingerprint"] != fingerprint or about["stage"].get("mean") == "weights"
            standardised = about["stage"]["standardise"]
        elif stage.init_from is not None:
            parent = settled[stage.init_from]
            brings, standardised = parent.mean == "weights", parent.standardise
        else:
            brings = False
        mean = stage.mean or ("weights" if brings else "data")
        if mean == "weights" and standardised != stage.standardise:
            raise RecipeError(unlike_parent(stage))
        mean = mean if brings else "data"      # of a parent that learned with these pictures' mean the same numbers
        settled[stage.name] = stage.model_copy(update={"mean": mean, "weights_digest": digest})
    return tuple(settled.values())


def unlike_parent(stage: Stage) -> str:
    """What is wrong with `standardise` of a stage that takes its parent's mean and deviation."""
    if weights_name(stage.init_from) is not None:
        return (
            f"stage {stage.name!r}: standardise = true, but {stage.init_from} have their deviation within the first conv;"
            " set standardise = false for this stage"
        )
    here, there = str(stage.standardise).lower(), str(not stage.standardise).lower()
    return (
        f"stage {stage.name!r}: standardise is {here}, expected {there} as in {stage.init_from!r}, whose mean and deviation it"
        f' takes; set standardise = {there} for this stage, or mean = "data"'
    )


def check_named(stages: Sequence[Stage], store: Store) -> None:
    """Refuses parents of the store and published weights that are not there, before a picture is read. Raises StoreError."""
    for stage in stages:
        name, key = weights_name(stage.init_from), stored_key(stage.init_from)
        if name is not None:
            find_weights(store, name)
        elif key is not None:
            stage_record(stage, store, key)


def stage_record(stage: Stage, store: Store, key: str) -> dict[str, Any]:
    """The stage.json of a finished stage that `stage` starts from by its key. Raises StoreError when it is not there."""
    about = read_json(store.stage(key) / "stage.json")
    if about is None or not is_done(store, key):
        what = "is not in" if about is None else "has not finished in"
        raise StoreError(
            f"stage {stage.name!r}: init_from {stage.init_from!r}: that stage {what} store {store.root}; name a finished"
            " one (`vggrow plan` prints keys), or the store that has it by --store"
        )
    return dict(about)


def known_order(stages: Sequence[Stage], store: Store, data: Data) -> tuple[str, ...]:
    """The order of the classes that are known before pictures are read: [data] classes, else those of a stored parent.

    Of several stored parents the one with the most classes; check_parents refuses others that do not fit. () where no
    order is known. Raises StoreError for parents that are absent or unfinished.
    """
    if data.classes is not None:
        return data.classes
    longest: list[str] = []
    for stage in stages:
        key = stored_key(stage.init_from)
        known = stage_record(stage, store, key)["classes"] if key is not None else []
        longest = known if len(known) > len(longest) else longest
    return tuple(longest)


def check_parents(stages: Sequence[Stage], store: Store, classes: Sequence[str]) -> dict[str, list[LayerOrigin]]:
    """Where each layer of each stage's net comes from, by the stage's name; refuses, before anything starts, what cannot be.

    stages: settled. Raises StoreError and RecipeError for parents that are absent, unfinished, know other classes or do
    not fit, and for random layers that would never be trained.
    """
    origins = {}
    for stage in stages:
        parent = parent_net(stage, stages, store, classes)
        taken = taken_tensors(stage, classes, parent) if parent is not None else {}
        added = new_classes(stage, classes, parent) if parent is not None else ()
        if stage.new_rows != "means" and not added:
            raise RecipeError(
                f"stage {stage.name!r}: new_rows has no effect: {stage.init_from!r} gives no last layer that lacks a class;"
                " remove it"
            )
        origins[stage.name] = layer_origins(stage, taken, parent, added)
        check_given(stage, origins[stage.name])
    return origins


def parent_net(stage: Stage, stages: Sequence[Stage], store: Store, classes: Sequence[str]) -> ParentNet | None:
    """The net that a stage starts from; None for random weights. Raises as check_parents."""
    name, key = weights_name(stage.init_from), stored_key(stage.init_from)
    if stage.init_from is None:
        return None
    if name is not None:
        record, path = find_weights(store, stage.weights_digest or name)
        shapes = weight_shapes(path)
        head = "paper" if record.has_fc else None
        return ParentNet(stage.init_from, record.net, head, None, record.classes, shapes, published=True)  # type: ignore[arg-type]
    if key is None:
        return stage_net(next(one for one in stages if one.name == stage.init_from), classes, name=repr(stage.init_from))
    about = stage_record(stage, store, key)
    known = about["classes"]
    if added_classes(known, classes) is None:
        raise RecipeError(
            f"stage {stage.name!r}: init_from {stage.init_from!r} knows the classes {', '.join(known)}, but the pictures"
            f" have {', '.join(classes)}; start from a stage of the same classes in the same order, others after them ([data]"
            " classes sets the order), or without init_from"
        )
    parent = Stage.model_validate_json(json.dumps(about["stage"]))
    return stage_net(parent, known, name=repr(stage.init_from))


def published_ancestor(stage: Stage, stages: Sequence[Stage], store: Store) -> str | None:
    """The published weights, "weights:<name>", that a stage's weights go back to through all its parents; None: none.

    Raises StoreError for a parent of the store whose record cannot be read.
    """
    by_name = {other.name: other.init_from for other in stages}
    source = stage.init_from
    while source is not None and weights_name(source) is None:
        key = stored_key(source)
        source = by_name[source] if key is None else stage_record(stage, store, key)["stage"]["init_from"]
        if key is not None and source is not None and weights_name(source) is None:
            parent = stage_record(stage, store, key)["parent"]      # a name of that stage's own recipe
            source = f"stage:{parent['key']}"
    return source


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file, by its header. Raises StoreError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: not a whole safetensors file ({error}); remove it and import the weights again") from error


def parent_of(
    stage: Stage, stages: Sequence[Stage], keys: Mapping[str, str], store: Store, classes: Sequence[str]
) -> Parent | None:
    """What a stage starts from, on disk; None for random weights. Raises as check_parents, and for an unfinished parent.

    Published weights are read once, to see that they are what the stage's key says.
    """
    key, net = parent_key(stage, keys), parent_net(stage, stages, store, classes)
    if key is None or net is None:
        return None
    weights = verified_weights(store, str(stage.weights_digest))[1] if net.published else result_weights(store, key)
    taken, added = taken_tensors(stage, classes, net), new_classes(stage, classes, net)
    return Parent(key=key, name=net.name, weights=weights, tensors=taken, added=added)


def stage_colour(stage: Stage, keys: Mapping[str, str], store: Store, data: Colour) -> Colour:
    """The colours that a stage's net is trained with: those of the pictures, `data`, or with its parent's mean and deviation.

    The axes of the colour shift are always the pictures'. Raises StoreError where the parent's record is not there.
    """
    if stage.mean != "weights":
        return data
    key = parent_key(stage, keys)
    assert key is not None, "recipe_checks refuses mean = weights without a parent"
    if stage.weights_digest is not None:
        record, _ = find_weights(store, stage.weights_digest)
        return replace(data, mean=np.array(record.mean))
    colour = recorded_colour(store, key)
    return replace(data, mean=colour.mean, deviation=colour.deviation)


def recorded_colour(store: Store, key: str) -> Colour:
    """The colours that a stage of the store was trained with: its own record's, over those of its pictures.

    Stages of before published weights recorded none: theirs are the pictures'. Raises StoreError where nothing is there.
    """
    about = read_json(store.stage(key) / "stage.json")
    if about is None:
        raise StoreError(f"{store.stage(key)}: no stage.json there; name the store that has this stage by --store")
    path = store.data(about["fingerprint"]) / "colour.json"
    found = read_json(path)
    if found is None:
        raise StoreError(f"{path}: no such file; scan the pictures of stage {about['name']!r} again")
    try:
        colour = Colour.from_json(found)
        if about.get("mean") is None:
            return colour
        deviation = about["deviation"] or colour.deviation
        return replace(colour, mean=np.array(about["mean"]), deviation=np.array(deviation))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); scan the pictures again") from error
