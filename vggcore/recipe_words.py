"""What is wrong with a file of settings, in one line of our words: the place as it stands in the TOML, expected, got."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vggcore.recipe_checks import nearest

LONGEST = 60      # characters of a value that a message repeats

# What pydantic's complaints are in plain words, by their type; {} are of the complaint's own context.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "path_type": "a path in quotes",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "{le} or less",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', a letter or digit first",
}
NAMES = '["one", "two"]'
LISTS = {"groups": "[3, 4]", "scales": "[96, 160]", "folders": '["pictures"]', "env": '["HOME"]'}
TABLES = {
    "features": "{ groups = [3, 4] }",
    "augment": "{ flip = false }",
    "split": "{ val = 0.15, test = 0.15 }",
    "data": '{ root = "pictures" }',
}


def complaints(error: ValidationError, tables: dict[str, Any], model: type[BaseModel]) -> str:
    """All that is wrong with `tables`, read as `model`, each said once."""
    return "; ".join(dict.fromkeys(describe(detail, tables, model) for detail in error.errors()))


def describe(detail: ErrorDetails, tables: dict[str, Any], model: type[BaseModel]) -> str:
    """One pydantic complaint about `tables`, read as `model`: the place, then what was expected and found."""
    at = tuple(part for part in detail["loc"] if isinstance(part, int) or "[" not in part)     # without members of unions
    if detail["type"] == "extra_forbidden":
        return f"{place_name(at[:-1], tables)}unknown key {str(at[-1])!r}{nearest(str(at[-1]), known_keys(at[:-1], model))}"
    if detail["type"] == "missing":
        name = f"[{at[-1]}]" if at == ("data",) else at[-1]
        return f"{place_name(at[:-1], tables)}{name} is missing"
    place = place_name(at, tables)
    if detail["type"] == "value_error":
        return place + str(detail["ctx"]["error"])
    return f"{place}expected {expected(detail, at)}, got {shown(detail['input'])}"


def expected(detail: ErrorDetails, at: tuple[int | str, ...]) -> str:
    """What a complaint wants at this place."""
    kind, name = detail["type"], str(next((part for part in reversed(at) if isinstance(part, str)), ""))
    if kind == "tuple_type":
        return "[[stage]] tables" if at == ("stage",) else f"a list such as {LISTS.get(name, NAMES)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"a table such as {TABLES[name]}" if name in TABLES else "a table of keys"
    if kind in EXPECTED:
        return EXPECTED[kind].format(**{key: spelt(value) for key, value in detail.get("ctx", {}).items()})
    return detail["msg"].removeprefix("Input should be ")


def spelt(value: Any) -> str:
    """A bound as people write it: 100,000 rather than 100000."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def shown(value: Any) -> str:
    """A value for a message, much as TOML has it; long ones are cut."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"a table of {', '.join(map(repr, value))}"[:LONGEST] if value else "an empty table"
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST:
        return "a number of many digits"       # Python refuses to write the longest ones
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def place_name(at: tuple[int | str, ...], tables: dict[str, Any]) -> str:
    """Where in the TOML: "[train] patience: ", "stage 'D-256' scale: "; empty at the top."""
    if at[:1] == ("stage",) and len(at) > 1 and isinstance(at[1], int):
        table = tables["stage"][at[1]]
        name = table.get("name") if isinstance(table, dict) else None
        first, rest = (f"stage {name!r}" if isinstance(name, str) else f"[[stage]] number {at[1] + 1}"), at[2:]
    elif at and isinstance(at[0], str) and isinstance(tables.get(at[0]), dict):
        first, rest = f"[{at[0]}]", at[1:]
    else:
        first, rest = "", at
    inner = ".".join(str(part) for part in rest if isinstance(part, str))
    return f"{first} {inner}".strip() + ": " if first or inner else ""


def known_keys(at: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """The keys that the table at this place of a file read as `model` may have, as they are written."""
    for part in at:
        if isinstance(part, str):
            field = next(one for name, one in model.model_fields.items() if part in (name, one.alias))
            model = table_of(field.annotation)
    return [field.alias or name for name, field in model.model_fields.items()]


def table_of(annotation: Any) -> type[BaseModel]:
    """The one table in a key's type, which may be optional, or many of it: Features | None, tuple[StageTable, ...]."""
    found = tables_in(annotation)
    assert len(found) == 1, f"{annotation} has {len(found)} kinds of table"
    return found[0]


def tables_in(annotation: Any) -> list[type[BaseModel]]:
    """All tables in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for part in get_args(annotation) for table in tables_in(part)]
