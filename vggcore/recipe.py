"""The recipe: one TOML file that says what is trained, read once into frozen models and refused at once when wrong."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from vggcore.errors import RecipeError

NetName = Literal["A", "A-LRN", "B", "C", "D", "E"]
Head = Literal["paper", "compact"]
Initialise = Literal["paper", "glorot", "he"]
Precision = Literal["fp32", "tf32", "bf16"]
AllReduce = Literal["fp32", "bf16"]
SplitRule = Literal["folder", "hash", "stratified", "group"]
Protocol = Literal["centre", "dense"]

BEST_ON_VAL = "best on val"
SPLITS = ("train", "val", "test")   # train learns, val alone steers, test is reported
GATE = "gate"                        # a fourth one, where a recipe asks for it: it alone decides promotions

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def array(value: Any) -> Any:
    """A TOML array as a tuple, which cannot change any more."""
    return tuple(value) if isinstance(value, list) else value


def scale_range(value: Any) -> Any:
    """A training scale as written in TOML, 256 or [256, 512], as (low, high)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return tuple(value)
    raise ValueError(f"found {value!r}, wanted a number of pixels, or two as [low, high]")


ScaleRange = Annotated[tuple[Count, Count], BeforeValidator(scale_range)]


class Frozen(BaseModel):
    """A table of settings: no unknown key, no change after reading, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CheckpointEvery(Frozen):
    """How often a stage writes a checkpoint within an epoch: by time or by iterations, whichever was asked for."""

    seconds: float | None = None
    iterations: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """'5min', '30s', '2h' or '500 iterations'; ValueError for anything else."""
        found = re.fullmatch(r"(\d+)\s*(s|min|h|iterations?)", text.strip())
        if not found or int(found[1]) == 0:
            raise ValueError(f"found {text!r}, wanted a time such as '5min', '30s' or '2h', or '500 iterations'")
        number, unit = int(found[1]), found[2]
        if unit.startswith("iteration"):
            return cls(iterations=number)
        return cls(seconds=float(number * {"s": 1, "min": 60, "h": 3600}[unit]))


class Split(Frozen):
    """How pictures are shared among train, val, test and, where it is asked for, the gate.

    by: "folder" (train/ val/ test/ above the class folders), "hash" (by content digest: a pure function of the picture),
    "stratified" (exact shares in every class, remembered in the store) or "group" (whole groups, named by a regular
    expression on the path, by the hash of the group's name). Not given: "folder" where those folders exist, else "hash".
    gate: the share from which the gate list is chosen, once for these pictures in this store; from then on the list rules,
    whatever stands here. With by = "folder" a folder gate/ beside the others is the gate.
    """

    val: Share = 0.15
    test: Share = 0.15
    gate: Annotated[Share, Field(exclude_if=lambda share: share == 0)] = 0.0   # unset it is in no dump: old digests hold
    by: SplitRule | None = None
    group: str | None = None

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.val + self.test + self.gate >= 1:
            shares = f"val {self.val} and test {self.test}"
            if self.gate:
                shares = f"val {self.val}, test {self.test} and gate {self.gate}"
            raise ValueError(f"{shares} leave nothing to train on; their sum must be below 1")
        if self.by == "group" and self.group is None:
            raise ValueError('by = "group" needs group = "<regular expression on the path>"')
        if self.group is not None:
            if self.by != "group":
                raise ValueError('group has no effect without by = "group"; set it, or remove group')
            try:
                re.compile(self.group)
            except re.error as error:
                raise ValueError(f"group {self.group!r} is no regular expression: {error}") from error
        if self.by == "folder" and self.model_fields_set & {"val", "test"}:
            raise ValueError('val and test have no effect with by = "folder": the folders decide; remove them')
        if self.by == "folder" and self.gate:
            raise ValueError('gate has no effect with by = "folder": a folder gate/ beside train/ decides; remove it')
        if self.gate and not self.test:
            raise ValueError(f"gate {self.gate} needs test above 0: the gate is chosen from pictures that no model learnt from")
        return self


class Data(Frozen):
    """Where the pictures are and how they are read."""

    root: Annotated[Path, Field(strict=False)] | None = None
    source: Literal["elpv"] | None = None
    labels: Literal["certain", "all"] = "certain"   # elpv: defect probability 0 or 1 only, or all by the threshold
    threshold: Share = 0.5                          # elpv, labels = "all": defective when the probability is above it
    standardise: bool = False                       # also divide by the training set's deviation (not the paper's)
    split: Split = Split()
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.001

    @model_validator(mode="after")
    def check(self) -> Self:
        if (self.root is None) == (self.source is None):
            raise ValueError('needs one of root = "<folder>" and source = "elpv"')
        if self.source is None and self.model_fields_set & {"labels", "threshold"}:
            raise ValueError('labels and threshold have no effect without source = "elpv"; remove them')
        if self.labels == "certain" and "threshold" in self.model_fields_set:
            raise ValueError('threshold has no effect with labels = "certain"; remove it, or set labels = "all"')
        if self.source == "elpv" and self.split.by == "folder":
            raise ValueError('split.by = "folder" cannot be: elpv has no train, val and test folders; use "stratified"')
        return self


class Net(Frozen):
    """What every stage's net has in common: head, width, crop, dropout, first weights."""

    head: Head = "paper"
    width: Annotated[float, Field(gt=0, le=4)] = 1.0     # scales conv channels and hidden FC units
    crop: Annotated[int, Field(ge=32)] = 224             # pixels; a multiple of 32, for the five poolings
    dropout: Share = 0.5
    initialise: Initialise = "paper"

    @field_validator("crop")
    @classmethod
    def crop_is_a_multiple_of_32(cls, crop: int) -> int:
        if crop % 32:
            raise ValueError(f"found {crop}, wanted a multiple of 32: five 2x2 poolings halve it five times")
        return crop


class Train(Frozen):
    """The optimiser and the learning-rate rule (Sec. 3.1); a [[stage]] may have its own rate, patience and epochs."""

    global_batch: Count = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    learning_rate: Positive = 1e-2
    drops: Annotated[int, Field(ge=0)] = 3
    patience: Count = 5
    max_epochs: Count = 74
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: bool = False
    all_reduce: AllReduce = "fp32"                       # what gradients travel in between workers
    micro_batch: Annotated[int, Field(ge=0)] = 0         # pictures a forward pass; 0: the worker's whole share
    checkpoint_every: str = "5min"

    @field_validator("checkpoint_every")
    @classmethod
    def checkpoint_every_parses(cls, text: str) -> str:
        CheckpointEvery.parse(text)
        return text


class Augment(Frozen):
    """What changes from view to view besides the crop."""

    flip: bool = True
    colour: Annotated[float, Field(ge=0)] = 0.1          # deviation of the three colour strengths (Sec. 3.1)


class StageTable(Frozen):
    """A [[stage]] as written: a net, a training scale, where its weights come from, what differs from [net] and [train]."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    net: NetName
    scale: ScaleRange
    init_from: str | None = None
    initialise: Initialise | None = None                 # of the layers that init_from does not give
    learning_rate: Positive | None = None
    drops: Annotated[int, Field(ge=0)] | None = None
    patience: Count | None = None
    max_epochs: Count | None = None


class Evaluate(Frozen):
    """What is measured on the test split once the stages are done; no part of any stage's key."""

    stages: Annotated[tuple[str, ...], BeforeValidator(array)] | None = None     # not given: the last stage
    protocol: Protocol = "dense"
    scales: Annotated[tuple[Count, ...], BeforeValidator(array)] | None = None   # test scales Q; not given: Sec. 3.2, 4.2


class Register(Frozen):
    """Which result becomes a version of the registered model, and the first champion's floor on test top-1 accuracy."""

    stage: str | None = None                             # a stage's name, or "best on val"; not given: the last stage
    floor: Share = 0.0


# Sec. 3.1 and 4: A, A-LRN and B at 256; C, D and E at 256, then 384, then jittered, every deeper net from A.
# fmt: off
PAPER_SCHEDULE = (
    StageTable(name="A-256",     net="A",     scale=(256, 256)),
    StageTable(name="A-LRN-256", net="A-LRN", scale=(256, 256)),
    StageTable(name="B-256",     net="B",     scale=(256, 256), init_from="A-256"),
    StageTable(name="C-256",     net="C",     scale=(256, 256), init_from="A-256"),
    StageTable(name="C-384",     net="C",     scale=(384, 384), init_from="C-256", learning_rate=1e-3),
    StageTable(name="C-256-512", net="C",     scale=(256, 512), init_from="C-384", learning_rate=1e-3),
    StageTable(name="D-256",     net="D",     scale=(256, 256), init_from="A-256"),
    StageTable(name="D-384",     net="D",     scale=(384, 384), init_from="D-256", learning_rate=1e-3),
    StageTable(name="D-256-512", net="D",     scale=(256, 512), init_from="D-384", learning_rate=1e-3),
    StageTable(name="E-256",     net="E",     scale=(256, 256), init_from="A-256"),
    StageTable(name="E-384",     net="E",     scale=(384, 384), init_from="E-256", learning_rate=1e-3),
    StageTable(name="E-256-512", net="E",     scale=(256, 512), init_from="E-384", learning_rate=1e-3),
)
# fmt: on


class Recipe(Frozen):
    """A whole recipe, checked: every stage has its parent before it, every name that is used exists."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]   # also the registered model's
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    net: Net = Net()
    train: Train = Train()
    augment: Augment = Augment()
    schedule: Literal["paper"] | None = None
    stage: Annotated[tuple[StageTable, ...], BeforeValidator(array)] = ()
    evaluate: Evaluate = Evaluate()
    register_: Register = Field(default=Register(), alias="register")

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.schedule is not None and self.stage:
            raise ValueError('schedule = "paper" takes the place of [[stage]] tables; keep one of the two')
        if not self.stages:
            raise ValueError('needs [[stage]] tables, or schedule = "paper"')
        check_stages(self.stages, crop=self.net.crop)
        names = [stage.name for stage in self.stages]
        for name in self.evaluate.stages or ():
            if name not in names:
                raise ValueError(f"[evaluate] stages: no stage {name!r}{nearest(name, names)}")
        low = self.net.crop
        for scale in self.evaluate.scales or ():
            if scale < low:
                raise ValueError(f"[evaluate] scales: {scale} is below the crop, {low}; a net needs its crop at least")
        wanted = self.register_.stage
        if wanted not in (None, BEST_ON_VAL, *names):
            raise ValueError(f"[register] stage: no stage {wanted!r}{nearest(str(wanted), [*names, BEST_ON_VAL])}")
        return self

    @property
    def stages(self) -> tuple[StageTable, ...]:
        """The schedule as tables, `schedule = "paper"` expanded."""
        return PAPER_SCHEDULE if self.schedule == "paper" else self.stage


def stored_key(init_from: str | None) -> str | None:
    """The key in an init_from such as "stage:3f0c6a52b1d94e77", a finished stage of the store; None for anything else."""
    found = re.fullmatch(r"stage:([0-9a-f]{16})", init_from or "")
    return found[1] if found else None


def check_stages(stages: tuple[StageTable, ...], *, crop: int) -> None:
    """ValueError for two stages of one name, an absent parent, a cycle, a scale below the crop, first weights never used."""
    parents: dict[str, str | None] = {}
    nets: dict[str | None, NetName] = {}
    for stage in stages:
        if stage.name in parents:
            raise ValueError(f"stage {stage.name!r} stands twice; each needs its own name")
        parents[stage.name], nets[stage.name] = stage.init_from, stage.net
    for stage in stages:
        low, high = stage.scale
        if not crop <= low <= high:
            raise ValueError(
                f"stage {stage.name!r}: scale is {list(stage.scale)}, but needs {crop} <= low <= high;"
                f" a {crop}x{crop} crop must fit in the shorter side"
            )
        if stage.init_from is not None and stage.init_from not in parents and stored_key(stage.init_from) is None:
            hint = nearest(stage.init_from, list(parents))
            raise ValueError(f"stage {stage.name!r}: init_from names {stage.init_from!r}, which is no stage here{hint}")
        if stage.initialise is not None and nets.get(stage.init_from) == stage.net:
            raise ValueError(
                f"stage {stage.name!r}: initialise has no effect: {stage.init_from!r} is a net {stage.net} too and gives every"
                " layer; remove it, or init_from"
            )
        seen = [stage.name]
        while (parent := parents[seen[-1]]) is not None and parent in parents:
            if parent in seen:
                circle = " from ".join([*seen[seen.index(parent) :], parent])
                raise ValueError(f"stages start from each other in a circle: {circle}; one must start without init_from")
            seen.append(parent)


def nearest(word: str, known: list[str]) -> str:
    """The hint '; did you mean ...?' with the known word nearest to `word`, else the list of the known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(map(repr, known))}"


def read_words(path: Path, what: str) -> str:
    """The text of a file that is to be `what`, such as "a recipe". Raises RecipeError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as {what}: {error}") from error


def parse_toml(text: str, *, place: str) -> dict[str, Any]:
    """TOML's tables. Raises RecipeError, with the place."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{place}: not TOML: {error}") from error


def load_recipe(path: Path) -> Recipe:
    """Reads and checks the recipe at `path`; a relative [data] root counts from the recipe's own folder.

    Raises RecipeError, one line that names the file, the place, what was found and what was wanted.
    """
    return parse_recipe(read_words(path, "a recipe"), place=str(path), folder=path.parent)


def parse_recipe(text: str, *, place: str, folder: Path) -> Recipe:
    """As load_recipe, from the TOML text itself; `place` is what an error names, `folder` what [data] root counts from."""
    tables = parse_toml(text, place=place)
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        raise RecipeError(f"{place}: {'; '.join(describe(detail, tables) for detail in error.errors())}") from error
    if recipe.data.root is None:
        return recipe
    root = (folder / recipe.data.root.expanduser()).absolute()
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": root})})


def describe(detail: ErrorDetails, tables: dict[str, Any]) -> str:
    """One pydantic complaint in our words: the place as it stands in the TOML, then what was found and wanted."""
    at = tuple(part for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = known_keys(at[:-1])
        return f"{place_name(at[:-1], tables)}unknown key {str(at[-1])!r}{nearest(str(at[-1]), known)}"
    if detail["type"] == "missing":
        name = f"[{at[-1]}]" if at == ("data",) else at[-1]
        return f"{place_name(at[:-1], tables)}{name} is missing"
    place = place_name(at, tables)
    if detail["type"] == "value_error":
        return place + str(detail["ctx"]["error"])
    if detail["type"] == "string_pattern_mismatch":
        return f"{place}found {detail['input']!r}, wanted letters, digits, '.', '_' and '-', a letter or digit first"
    wanted = detail["msg"].removeprefix("Input should be ")
    return f"{place}found {detail['input']!r}, wanted {wanted}"


def place_name(at: tuple[int | str, ...], tables: dict[str, Any]) -> str:
    """Where in the TOML: "[train] patience: ", "stage 'D-256' scale: "; empty at the top."""
    if at[:1] == ("stage",) and len(at) > 1 and isinstance(at[1], int):
        table = tables["stage"][at[1]]
        name = table.get("name") if isinstance(table, dict) else None
        first, rest = (f"stage {name!r}" if name else f"[[stage]] number {at[1] + 1}"), at[2:]
    elif at and isinstance(at[0], str) and isinstance(tables.get(at[0]), dict):
        first, rest = f"[{at[0]}]", at[1:]
    else:
        first, rest = "", at
    inner = ".".join(str(part) for part in rest if isinstance(part, str))
    return f"{first} {inner}".strip() + ": " if first or inner else ""


def known_keys(at: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at this place may have."""
    model: Any = Recipe
    for part in at:
        if isinstance(part, int):
            continue
        field = model.model_fields["register_" if part == "register" else part]
        model = StageTable if part == "stage" else field.annotation
    return ["register" if name == "register_" else name for name in model.model_fields]
