"""What `vggrow init` writes: the recipe's text and a pipeline file's, each read back by its own reader before it is written."""

import json
import os
import re
import tempfile
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.pipeline_file import load_pipeline
from deploy.starter_lines import Facts, Setting, Table
from deploy.starter_rules import UNEVEN
from pipelines.sources import is_utf8, printable
from training.store import DEFAULT_STORE, store_root
from vggcore.errors import RecipeError
from vggcore.recipe import GATE, parse_recipe
from vggcore.whole_file import check_target, write_text

WIDTH = 120          # of a line
LEAST_COLUMN = 28    # where reasons begin
MOST_COLUMN = 44


def recipe_text(tables: Sequence[Table], *, opening: Sequence[str]) -> str:
    """TOML: `opening` as comments, then each key with its reason behind it."""
    parts = ["\n".join(f"# {words}" for line in opening for words in textwrap.wrap(line, WIDTH - 2))]
    for table in tables:
        lines = [table.heading] if table.heading else []
        lines += [line for setting in table.settings for line in setting_lines(setting)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def setting_lines(setting: Setting) -> list[str]:
    """ "key = value   # reason", the reason on further lines where it is long, above a long value."""
    line = f"{setting.key} = {toml(setting.value)}"
    if not setting.reason:
        return [line]
    column = LEAST_COLUMN if len(line) < LEAST_COLUMN - 1 else MOST_COLUMN
    if len(line) > column - 2:
        return [*(f"# {words}" for words in textwrap.wrap(setting.reason, WIDTH - 2)), line]
    reason = textwrap.wrap(setting.reason, WIDTH - column - 2)
    return [f"{line:<{column}}# {reason[0]}", *(f"{'':<{column}}# {words}" for words in reason[1:])]


def toml(value: Any) -> str:
    """A value as TOML has it; a mapping as an inline table."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)


def pipeline_text(facts: Facts, *, name: str, recipe: Path, store: str, pipeline: Path) -> str:
    """A pipeline file that retrains the recipe weekly, in the store named by `store`; paths count from the file's folder."""
    counts = list(facts.look.counts.values())
    uneven = max(counts) > UNEVEN * min(counts)
    metric = "classes differ in number: the mean of their recalls" if uneven else "classes are about equally large"
    gate = facts.sharing.counts.get(GATE, 0)
    opening = [f"`vggrow retrain {pipeline.name}` trains {recipe.name} again when pictures have come."]
    if gate:
        opening.append("A model that is shown to be better on the gate split becomes champion (docs/explanation/gate.md).")
    else:
        opening.append("Without a folder gate/ beside train/ each new model waits for a person (docs/explanation/gate.md).")
    there = "must be there and hold files before pictures are read: an unmounted share is no lost data"
    warm = '"champion" starts from the champion\'s weights: worth it where training is long'
    tables = [
        Table("", (Setting("name", name, "names its records"), Setting("recipe", recipe.name, "from this file's folder"))),
        Table("[watch]", (Setting("folders", (str(facts.look.root),), there),)),
        Table(
            "[timetable]",
            (
                Setting("cron", "30 2 * * 1", f"Mondays, 02:30, for `vggrow timetable run {pipeline.name}`"),
                Setting("time_zone", "UTC", "or such as Europe/Berlin"),
            ),
        ),
        Table("[start]", (Setting("warm", "scratch", warm),)),
        Table("[gate]", (Setting("metric", "balanced" if uneven else "top1", f"{metric}; {gate:,} pictures decide"),)),
    ]
    if store != DEFAULT_STORE or recipe.parent.absolute() != Path.cwd():
        place = below(store_root(store), pipeline.parent.absolute())
        tables.append(Table("[run]", (Setting("store", place, "where everything is kept"),)))
    return recipe_text(tables, opening=opening)


def below(path: Path, folder: Path) -> str:
    """An absolute path as a file in `folder` names it: relative below that folder, else in full."""
    inside = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
    return str(path) if inside.startswith("~") else inside      # which a recipe takes for a home


def check_recipe_text(text: str, path: Path) -> None:
    """Raises RecipeError where the text is not a valid recipe."""
    parse_recipe(text, place=str(path), folder=path.parent)


def check_pipeline_text(text: str, path: Path, recipe: Path) -> None:
    """Raises RecipeError where the text is not a valid pipeline file; tried in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / recipe.name).touch()
        (Path(folder) / path.name).write_text(text, encoding="utf-8")
        load_pipeline(Path(folder) / path.name)


def check_places(paths: Iterable[Path]) -> None:
    """Raises RecipeError for a place where no file can be, StoreError for one that the system refuses."""
    for path in paths:
        if not is_utf8(str(path)):
            raise RecipeError(f"{printable(path)}: its name is not UTF-8; name another file by --out")
        if os.path.isdir(path):  # noqa: PTH112 (a name too long is no folder, and no error yet)
            raise RecipeError(f"{path}: is a folder, expected a file's name, such as --out {path / 'recipe.toml'}")
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise RecipeError(f"{path}: {above} is a file, expected a folder; name another place by --out")
        check_target(path)


def check_free(texts: Mapping[Path, str], *, force: bool) -> None:
    """Raises RecipeError for a file that exists with another text, unless forced."""
    for path, text in texts.items():
        if os.path.lexists(path) and not force and not stands_there(path, text):
            raise RecipeError(
                f"{path}: exists already, and was left as it is; name another file by --out, or overwrite it by --force"
            )


def stands_there(path: Path, text: str) -> bool:
    """Whether the file has this very text: a command that was killed between two files can be repeated."""
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def write_files(texts: Mapping[Path, str]) -> None:
    """Writes each text in order, each whole or not at all."""
    for path, text in texts.items():
        write_text(path, text)


def name_from(words: str) -> str:
    """A recipe's name from a folder's or file's: letters, digits, '.', '_' and '-', a letter or digit first."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", words).lstrip("._-").rstrip("-")[:100] or "pictures"
