"""The documents say what the code does: every command and option, every recipe key and default, links, examples."""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from pydantic import BaseModel

from deploy.cli import vggrow
from deploy.pipeline_file import Pipeline, load_pipeline
from vggcore.recipe import Augment, Data, Evaluate, Features, Net, Recipe, Register, Split, StageTable, Train, parse_recipe
from vggcore.recipe_words import tables_in

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TABLES: dict[str, type[BaseModel]] = {
    "Top level": Recipe,
    "[data]": Data,
    "[data] split": Split,
    "[net]": Net,
    "features": Features,
    "[train]": Train,
    "[augment]": Augment,
    "[[stage]]": StageTable,
    "[evaluate]": Evaluate,
    "[register]": Register,
}
TOML_TABLES = {name: found[0] for name, field in Pipeline.model_fields.items() if (found := tables_in(field.annotation))}
PIPELINE_TABLES: dict[str, type[BaseModel]] = {"The top": Pipeline}
PIPELINE_TABLES |= {f"[{name}]": model for name, model in TOML_TABLES.items()}
KEYS = [("recipe.md", heading, model) for heading, model in TABLES.items()]
KEYS += [("pipeline.md", heading, model) for heading, model in PIPELINE_TABLES.items()]


def commands(group: click.Group = vggrow, words: tuple[str, ...] = ("vggrow",)) -> Iterator[tuple[str, click.Command]]:
    """Every command and group by the words that call it."""
    yield " ".join(words), group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


COMMANDS = dict(commands())
EXECUTABLE = {words: command for words, command in COMMANDS.items() if not isinstance(command, click.Group)}


def long_options(command: click.Command) -> set[str]:
    """Those a user may give, --help apart."""
    found = {name for option in command.params if isinstance(option, click.Option) for name in option.opts}
    return {name for name in found if name.startswith("--")}


def sections(path: Path) -> dict[str, str]:
    """The text below each second-level heading."""
    parts = re.split(r"^## (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {heading.strip(): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table row in a text, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith(("| `", "| -"))]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def code_blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [text for named, text in found if named == language]


def typed_commands() -> list[tuple[str, str]]:
    """(document, line) for each line of a fenced block that calls vggrow."""
    found = []
    for path in DOCUMENTS:
        for block in [text for language in ("", "sh", "console") for text in code_blocks(path, language)]:
            for line in block.splitlines():
                if re.match(r"(\$ )?(\.venv/bin/)?vggrow ", line):
                    found.append((str(path.relative_to(ROOT)), line.removeprefix("$ ").removeprefix(".venv/bin/")))
    return found


@pytest.mark.parametrize("words", COMMANDS)
def test_the_reference_has_each_command_with_exactly_its_options(words):
    section = sections(ROOT / "docs/reference/command-line.md").get(words)

    assert section is not None, f"no heading '## {words}'"
    documented = {name for row in table_rows(section) for name in re.findall(r"--[a-z-]+", row[0])}
    assert documented == long_options(COMMANDS[words])


def test_the_reference_has_no_command_that_is_gone():
    headings = sections(ROOT / "docs/reference/command-line.md")

    assert {heading for heading in headings if heading.startswith("vggrow")} == set(COMMANDS)


@pytest.mark.parametrize("words", EXECUTABLE)
def test_each_commands_help_has_an_example_that_calls_it(words):
    page = EXECUTABLE[words].get_help(click.Context(EXECUTABLE[words], info_name=words))

    _, found, example = page.partition("Example")
    assert found
    assert words in example


def test_examples_in_the_documents_call_commands_and_options_that_exist():
    examples = typed_commands()

    assert len(examples) > 15
    for place, line in examples:
        words = shlex.split(line, comments=True)
        called = max(
            (name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len, default="vggrow"
        )
        assert called in EXECUTABLE or "--version" in words, f"{place}: {line}: no such command"
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= long_options(COMMANDS[called]) | {"--help", "--version"}, f"{place}: {line}"


@pytest.mark.parametrize(("page", "heading", "model"), KEYS)
def test_the_reference_has_each_key_with_its_default_and_choices(page, heading, model):
    written = table_rows(sections(ROOT / "docs/reference" / page)[heading])
    rows = {key.strip("`"): row for row in written for key in row[0].split(", ")}     # keys that stand elsewhere share a row
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    if model is Pipeline:                                  # its tables have sections of their own
        fields = {name: field for name, field in fields.items() if name not in TOML_TABLES}

    assert list(rows) == list(fields)
    for name, field in fields.items():
        _, kind, default, *_ = rows[name]
        if field.is_required():
            assert default == "required", name
        elif isinstance(field.default, BaseModel):
            assert default == "its own defaults", name
        elif field.default in (None, ()):
            assert default == "not given", name
        else:
            found = tomllib.loads(f"value = {default.strip('`')}")["value"]
            wanted = str(field.default) if isinstance(field.default, Path) else field.default
            wanted = list(wanted) if isinstance(wanted, tuple) else wanted
            assert (type(found), found) == (type(wanted), wanted), name
        for choice in () if kind.startswith("as in [") else choices(field.annotation):
            assert f'`"{choice}"`' in kind, f"{name}: {choice} is missing"


def choices(annotation: Any) -> list[str]:
    """The words that a field's Literal, wherever it stands in its type, allows."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) if not isinstance(part, str) for choice in choices(part)]


def test_recipes_and_pipelines_in_the_documents_can_be_read(tmp_path):
    blocks = [(path, text) for path in DOCUMENTS for text in code_blocks(path, "toml")]
    whole = [(path, text) for path, text in blocks if re.match(r"name = ", text)]
    pipelines = [(path, text) for path, text in blocks if text.startswith("# pipeline.toml\n")]

    assert len(whole) >= 2 and pipelines
    for path, text in whole:
        parse_recipe(text, place=str(path), folder=tmp_path)
    for _, text in pipelines:
        (tmp_path / tomllib.loads(text)["recipe"]).touch()
        (tmp_path / "pipeline.toml").write_text(text)
        load_pipeline(tmp_path / "pipeline.toml")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings_that_are_there(path):
    prose = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)

    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{target}: no such file"
        assert there.is_relative_to(ROOT), f"{target}: leads out of the repository"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_document_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")

    for path in ROOT.glob("docs/**/*.md"):
        name = str(path.relative_to(ROOT / "docs"))
        assert name == "README.md" or f"]({name})" in index, f"docs/README.md: {name} is missing"


def test_the_readmes_make_commands_are_targets_of_the_makefile():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = sorted(set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(code_blocks(ROOT / "README.md", "sh")))))

    assert {"run", "test"} <= set(targets)
    assert "<!-- demo output -->" in readme and "<!-- /demo output -->" in readme
    for target in targets:
        dry = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert dry.returncode == 0, dry.stderr
