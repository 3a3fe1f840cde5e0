"""What `vggrow init` does: look at the folder and the machine, choose, check, and only then write."""

import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deploy import starter_files as files
from deploy.machine import Machine, this_machine
from deploy.options import elsewhere
from deploy.starter_lines import Facts, facts_for
from deploy.starter_tables import notes, recipe_tables
from pipelines.folder_look import look_at_folder
from pipelines.sources import is_utf8, printable
from training.published.library import find_weights, list_weights
from training.store import Store, store_around, store_root, store_to_read
from vggcore.errors import DatasetError, RecipeError, StoreError
from vggcore.home_path import at_home
from vggcore.published import PUBLISHED, PublishedWeights

PREFIX = "weights:"


@dataclass(frozen=True)
class Asked:
    """The words of the command."""

    folder: Path
    weights: str | None              # as typed, "weights:NAME"
    pipeline: bool
    out: Path | None
    force: bool
    store: str


@dataclass(frozen=True)
class Written:
    """What init leaves: its files, what it looked at, what is worth knowing, and a better way where there is one."""

    files: tuple[Path, ...]
    looked: str
    notes: tuple[str, ...]
    suggestion: str | None


def init_recipe(asked: Asked, *, machine: Machine | None = None) -> Written:
    """Writes the recipe, and the pipeline file where it is asked for; machine: None is this one.

    Raises DatasetError for pictures that cannot be trained on, RecipeError for words and places that cannot be, StoreError
    for weights that are not there; nothing has been written then.
    """
    root = checked_root(asked)
    recipe = asked.out or Path(f"{files.name_from(root.name)}.toml")
    pipeline = recipe.with_name(f"{recipe.stem}-pipeline.toml") if asked.pipeline else None
    paths = (recipe, *([pipeline] if pipeline else []))
    files.check_places(paths)
    weights = find_published(asked)
    look = look_at_folder(root, skip=store_root(asked.store))
    machine = machine or this_machine()
    written = files.below(root, recipe.parent.absolute())
    facts = facts_for(look, machine, root=written, weights=weights, with_gate=asked.pipeline)
    name = files.name_from(recipe.stem)
    texts = {recipe: files.recipe_text(recipe_tables(facts, name), opening=opening(asked, machine, weights))}
    files.check_recipe_text(texts[recipe], recipe)
    if pipeline:
        texts[pipeline] = files.pipeline_text(facts, name=name, recipe=recipe, store=asked.store, pipeline=pipeline)
        files.check_pipeline_text(texts[pipeline], pipeline, recipe)
    files.check_free(texts, force=asked.force)
    files.write_files(texts)
    return Written(paths, looked(facts), tuple(notes(facts)), None if weights else suggestion(asked))


def checked_root(asked: Asked) -> Path:
    """The pictures' folder, absolute. Raises DatasetError for one that is in a store, or whose name is not UTF-8."""
    root = Path(os.path.abspath(at_home(asked.folder, DatasetError)))  # noqa: PTH100 (keeps links)
    if not is_utf8(str(root)):
        raise DatasetError(f"{printable(root)}: its name is not UTF-8, which a recipe cannot store; rename the folder")
    around = store_around(root)
    if around is None and root == store_root(asked.store) and root.is_dir():
        around = root
    if around is not None:
        what = "is a store" if around == root else f"is inside the store {printable(around)}"
        raise DatasetError(f"{printable(root)}: {what}, expected a folder of pictures; results are kept there: name another")
    return root


def find_published(asked: Asked) -> PublishedWeights | None:
    """The weights that --from names, or None without it. Raises RecipeError for other words, StoreError for none there."""
    if asked.weights is None:
        return None
    name = asked.weights.removeprefix(PREFIX)
    if name == asked.weights or not name:
        raise RecipeError(f"--from: expected weights:NAME, got {asked.weights!r}; `vggrow weights list` prints the names")
    return find_weights(store_to_read(asked.store), name)[0]


def opening(asked: Asked, machine: Machine, weights: PublishedWeights | None) -> list[str]:
    """The comments at the top of the recipe."""
    lines = [
        f"Written by `{typed(asked, asked.weights)}` for a machine with {machine}. Each line has its reason:"
        " change what you know better. Every key: docs/reference/recipe.md."
    ]
    if weights is None:
        lines.append(
            "Of a few thousand pictures, or less, a linear model on published weights usually learns more than any net from"
            f" scratch: `vggrow weights import {PUBLISHED}{elsewhere(asked.store)}`, then `{again(asked, PUBLISHED)}`."
        )
    return lines


def typed(asked: Asked, weights: str | None) -> str:
    """The command as it is typed, without what does not change the recipe."""
    words = ["vggrow", "init", printable(asked.folder)]
    words += ["--from", weights] if weights else []
    words += ["--pipeline"] if asked.pipeline else []
    words += ["--out", printable(asked.out)] if asked.out else []
    return shlex.join(words)


def looked(facts: Facts) -> str:
    """What the choice is made by, in one line."""
    look, sizes = facts.look, facts.look.sizes
    low, middle, high = sizes.shorter
    sides = f"{middle:,} px" if low == high else f"{low:,} to {high:,} px, {middle:,} in the middle"
    splits = ", ".join(f"{number:,} {part}" for part, number in facts.sharing.counts.items())
    return (
        f"{look.pictures:,} pictures in {len(look.counts):,} classes by name ({splits}); {sizes.looked_at:,} headers read:"
        f" shorter sides {sides}; this machine: {facts.machine}"
    )


def suggestion(asked: Asked) -> str | None:
    """The published weights to start from instead, where the store has exactly one set."""
    with suppress(StoreError):
        found = list_weights(Store(store_root(asked.store)))
        if len(found) == 1:
            command = again(asked, found[0].name)
            return f"the store has published weights, which usually learn more from few pictures: {command}"
    return None


def again(asked: Asked, name: str) -> str:
    """The command that writes the recipe anew, from published weights."""
    return f"{typed(asked, f'{PREFIX}{name}')}{elsewhere(asked.store)} --force"
