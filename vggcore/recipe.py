"""The recipe: one TOML file that says what is trained, read once into frozen models and refused at once when wrong."""

import itertools
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vggcore.errors import RecipeError
from vggcore.home_path import at_home
from vggcore.recipe_checks import LARGEST_SIDE, check_recipe
from vggcore.recipe_checks import nearest as nearest
from vggcore.recipe_checks import stored_key as stored_key
from vggcore.recipe_words import complaints, shown

NetName = Literal["A", "A-LRN", "B", "C", "D", "E"]
Head = Literal["paper", "compact", "linear"]
Pool = Literal["average", "maximum", "both"]
View = Literal["crop", "whole"]
Rule = Literal["plateau", "cosine"]
Optimiser = Literal["sgd", "adamw"]
Fit = Literal["sgd", "logistic"]
MeanOf = Literal["data", "weights"]
NewRows = Literal["means", "random"]
Initialise = Literal["paper", "glorot", "he"]
Precision = Literal["fp32", "tf32", "bf16"]
AllReduce = Literal["fp32", "bf16"]
SplitRule = Literal["folder", "hash", "stratified", "group"]
Protocol = Literal["centre", "dense"]
TestProtocol = Literal["centre", "dense", "pooled"]      # "pooled": of linear heads, and theirs alone
TestViews = Literal["none", "flips", "turns"]
ResultWeights = Literal["last", "best on val", "average"]

BEST_ON_VAL = "best on val"
SPLITS = ("train", "val", "test")   # train learns, val alone steers, test is reported
GATE = "gate"                        # a fourth one, where a recipe asks for it: it alone decides promotions

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
LARGEST_COUNT = 10**9       # far above any number of pictures, epochs or iterations that a stage can live to see
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountOrNone = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]       # 0: none
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Crop = Annotated[int, Field(ge=32, le=LARGEST_SIDE)]
Group = Annotated[int, Field(ge=1, le=5)]        # a conv group of Table 1
Factor = Annotated[float, Field(gt=0, le=1)]
ClassWeights = Literal["balanced"] | dict[str, Positive]
LEAST_FACTOR, MOST_FACTOR = 1e-6, 1e6      # of a class's loss: beyond them float32 loses the other classes' gradients


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


ScaleRange = Annotated[tuple[Side, Side], BeforeValidator(scale_range)]


def ascending(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, ValueError unless there are some and each is larger than the one before."""
    if not values or any(low >= high for low, high in itertools.pairwise(values)):
        raise ValueError(f"found {list(values)}, expected one or more, each larger than the one before")
    return values


def each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, ValueError unless there are some and none stands twice."""
    if not values or len(set(values)) < len(values):
        raise ValueError(f"expected one or more, each once, got {list(values)}; remove the key, or what stands twice")
    return values


def interval(values: tuple[float, float]) -> tuple[float, float]:
    """(low, high), ValueError unless 0.01 <= low <= high <= 100."""
    if not 0.01 <= values[0] <= values[1] <= 100:
        raise ValueError(f"found {list(values)}, expected [low, high] with 0.01 <= low <= high <= 100")
    return values


def interval_written(value: Any) -> tuple[float, float]:
    """[low, high] as written in TOML, as a tuple."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(part) in (int, float) for part in value):
        raise ValueError(f"expected [low, high], two numbers, got {shown(value)}")
    return interval((value[0], value[1]))


def class_factors(value: Any) -> Any:
    """Factors on the losses of classes as written in TOML: "balanced", "none" or a table."""
    if value in ("balanced", "none"):
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError(f'expected "balanced", "none" or a table such as {{ cat = 1.0, dog = 2.5 }}, got {shown(value)}')
    for name, factor in value.items():
        if type(factor) not in (int, float) or not LEAST_FACTOR <= factor <= MOST_FACTOR:
            raise ValueError(f"expected a number from {LEAST_FACTOR:g} to {MOST_FACTOR:g} for {name!r}, got {shown(factor)}")
    return value


def area_range(value: Any) -> Any:
    """Shares of the picture as written in TOML, [low, high], as a tuple; "none" as it is."""
    if value == "none":
        return value
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(share) in (int, float) for share in value):
        raise ValueError(f'found {value!r}, expected [low, high], shares of the picture, or "none"')
    low, high = interval((value[0], value[1]))
    if high > 1:
        raise ValueError(f"found {list(value)}, expected shares of the picture, at most 1")
    return (low, high)


# "none": a shared table's are not for this stage
ClassWeightsWritten = Annotated[Literal["balanced", "none"] | dict[str, Positive], BeforeValidator(class_factors)]
Groups = Annotated[tuple[Group, ...], BeforeValidator(array), AfterValidator(ascending)]
Scales = Annotated[tuple[Side, ...], BeforeValidator(array), AfterValidator(ascending)]
TestScales = Annotated[tuple[Side, ...], BeforeValidator(array), AfterValidator(each_once)]
Names = Annotated[tuple[str, ...], BeforeValidator(array), AfterValidator(each_once)]
Area = Annotated[tuple[float, float] | Literal["none"], BeforeValidator(area_range)]
Interval = Annotated[tuple[float, float], BeforeValidator(interval_written)]


class Frozen(BaseModel):
    """A table of settings: no unknown key, no change after reading, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class CheckpointEvery(Frozen):
    """How often a stage writes a checkpoint within an epoch: by time or by iterations, whichever was asked for."""

    seconds: float | None = None
    iterations: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """'5min', '30s', '2h' or '500 iterations'; ValueError for anything else."""
        found = re.fullmatch(r"(\d{1,9})\s*(s|min|h|iterations?)", text.strip())
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
    # The order of known classes; others are appended, sorted. Not given: the order of init_from = "stage:<key>", or sorted.
    classes: Annotated[
        tuple[str, ...] | None, BeforeValidator(array), Field(exclude_if=lambda names: names is None)
    ] = None   # unset it is in no dump: old digests hold
    standardise: bool = False                       # also divide by the training set's deviation (not the paper's)
    split: Split = Split()
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.001

    @field_validator("classes")
    @classmethod
    def classes_stand_once(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        twice = sorted({name for name in names or () if (names or ()).count(name) > 1})
        if names == () or twice:
            found = f"{twice[0]!r} twice" if twice else "no name"
            raise ValueError(f"expected each class once, got {found}; remove it, or the key")
        return names

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


class Features(Frozen):
    """What a linear head sees: outputs of conv groups, pooled over all places of whole pictures.

    Each group's output is taken after its max pool. With several scales the pooled values of all are concatenated; with
    flip they are the mean of those of the picture and of its mirror image.
    """

    groups: Groups = (3, 4)       # best on val, alone or with 5, in the trials on solar cells (docs/benchmarks/transfer.md)
    pool: Pool = "both"           # over places: the average, the maximum, or both one after the other
    scales: Scales | None = None  # shorter sides Q, pixels; not given: the stage's scale
    flip: bool = False


class Net(Frozen):
    """What every stage's net has in common unless a stage says otherwise: head, width, crop, dropout, first weights."""

    head: Head = "paper"
    features: Features | None = None                     # of head = "linear"
    width: Annotated[float, Field(gt=0, le=4)] = 1.0     # scales conv channels and hidden FC units
    crop: Crop = 224             # pixels; a multiple of 32, for the five poolings
    dropout: Share = 0.5
    initialise: Initialise = "paper"

    @field_validator("crop")
    @classmethod
    def crop_is_a_multiple_of_32(cls, crop: int) -> int:
        return multiple_of_32(crop)


def multiple_of_32(crop: int) -> int:
    """A crop's side in pixels, ValueError unless five poolings can halve it."""
    if crop % 32:
        raise ValueError(f"found {crop}, wanted a multiple of 32: five 2x2 poolings halve it five times")
    return crop


class Train(Frozen):
    """The optimiser and the learning-rate rule (Sec. 3.1 by default); a [[stage]] may have its own."""

    global_batch: Count = 256
    optimiser: Optimiser = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of "sgd"
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_biases: bool = True                            # the paper's way; false: biases have no weight decay
    learning_rate: Positive = 1e-2
    layer_decay: Factor = 1.0                            # rate of a conv group relative to the group above it
    rule: Rule = "plateau"
    warmup_epochs: CountOrNone = 0       # the rate rises linearly from 0 in these
    drops: CountOrNone = 3               # of "plateau"
    patience: Count = 5                                  # of "plateau"
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0   # of "cosine": where it ends
    max_epochs: Count = 74
    label_smoothing: Share = 0.0
    balance: Annotated[float, Field(ge=0, le=1)] = 0.0   # 0: classes as they come; 1: each class equally often
    class_weights: ClassWeightsWritten | None = None            # factors on the losses; their mean over train is 1
    average: CountOrNone = 0             # epochs at the end whose weights are averaged; 0: none
    precision: Precision = "fp32"
    channels_last: bool = True
    compile: bool = False
    all_reduce: AllReduce = "fp32"                       # what gradients travel in between workers
    micro_batch: CountOrNone = 0         # pictures a forward pass; 0: the worker's whole share
    checkpoint_every: str = "5min"

    @field_validator("checkpoint_every")
    @classmethod
    def checkpoint_every_parses(cls, text: str) -> str:
        CheckpointEvery.parse(text)
        return text


class Augment(Frozen):
    """What changes from view to view; a [[stage]] may have its own. The paper has crops, flips and colours (Sec. 3.1)."""

    view: View = "crop"                                  # "whole": the picture resized to crop x crop, aspect not kept
    flip: bool = True
    flip_vertical: bool = False
    quarter_turns: bool = False
    area: Area | None = None                             # share of the picture that a crop covers (Szegedy et al. 2015)
    aspect: Interval | None = None                       # of these crops, width to height; not given: 3/4 to 4/3
    colour: Annotated[float, Field(ge=0, le=100)] = 0.1         # deviation of the three colour strengths (Sec. 3.1)
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0   # alpha of Beta(alpha, alpha) (Zhang et al. 2018); 0: off
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0     # probability of a rectangle at the mean (Zhong et al. 2020)


class StageTable(Frozen):
    """A [[stage]] as written: a net, a training scale, where its weights come from, and what differs from other tables."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    net: NetName
    scale: ScaleRange | None = None                      # not with view = "whole", area or features.scales
    init_from: str | None = None                         # a stage's name, "stage:<key>" or "weights:<name>"
    mean: MeanOf | None = None                           # whose mean is subtracted; not given: see docs/reference/recipe.md
    fit: Fit = "sgd"
    freeze: CountOrNone = 0        # conv groups from the bottom that keep their weights
    new_rows: NewRows | None = None                      # of classes that init_from = "stage:<key>" lacks; not given: "means"
    # of [net] and [data]
    head: Head | None = None
    features: Features | None = None
    width: Annotated[float, Field(gt=0, le=4)] | None = None
    crop: Crop | None = None
    dropout: Share | None = None
    initialise: Initialise | None = None                 # of the layers that init_from does not give
    standardise: bool | None = None
    # of [augment]: the keys that differ
    augment: Augment | None = None
    # of [train]
    global_batch: Count | None = None
    optimiser: Optimiser | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    decay_biases: bool | None = None
    learning_rate: Positive | None = None
    layer_decay: Factor | None = None
    rule: Rule | None = None
    warmup_epochs: CountOrNone | None = None
    drops: CountOrNone | None = None
    patience: Count | None = None
    final_learning_rate: Annotated[float, Field(ge=0)] | None = None
    max_epochs: Count | None = None
    label_smoothing: Share | None = None
    balance: Annotated[float, Field(ge=0, le=1)] | None = None
    class_weights: ClassWeightsWritten | None = None
    average: CountOrNone | None = None
    precision: Precision | None = None

    @field_validator("crop")
    @classmethod
    def crop_is_a_multiple_of_32(cls, crop: int | None) -> int | None:
        return None if crop is None else multiple_of_32(crop)


class Evaluate(Frozen):
    """What is measured on the test split once the stages are done; no part of any stage's key."""

    stages: Names | None = None                          # not given: the last stage
    protocol: Protocol = "dense"                         # linear heads have a protocol of their own, whole pictures
    scales: TestScales | None = None                     # test scales Q; not given: Sec. 3.2, 4.2
    views: TestViews = "none"                            # mirrored ("flips") and turned views, posteriors averaged


class Register(Frozen):
    """Which result becomes a version of the registered model, and the first champion's floor on test top-1 accuracy."""

    stage: str | None = None                             # a stage's name, or "best on val"; not given: the last stage
    weights: ResultWeights = "last"                      # which of the stage's weights
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
        check_recipe(self)
        return self

    @property
    def stages(self) -> tuple[StageTable, ...]:
        """The schedule as tables, `schedule = "paper"` expanded."""
        return PAPER_SCHEDULE if self.schedule == "paper" else self.stage


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
    except (ValueError, RecursionError) as error:      # ValueError: also a number of more digits than Python reads
        raise RecipeError(f"{place}: not TOML: {str(error).partition(chr(10))[0]}") from error


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
        raise RecipeError(f"{place}: {complaints(error, tables, Recipe)}") from error
    if recipe.data.root is None:
        return recipe
    root = (folder / at_home(recipe.data.root, RecipeError, place=f"{place}: [data] root ")).absolute()
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": root})})
