"""The stages a recipe stands for, every setting resolved, and the keys they are known by for ever."""

from collections.abc import Mapping, Sequence
from typing import Any

from vggcore.digest import digest
from vggcore.recipe import (
    BEST_ON_VAL,
    AllReduce,
    CheckpointEvery,
    ClassWeights,
    Features,
    Fit,
    Frozen,
    Head,
    Initialise,
    MeanOf,
    NetName,
    NewRows,
    Optimiser,
    Precision,
    Recipe,
    Rule,
    StageTable,
    View,
    stored_key,
)
from vggcore.recipe_checks import stage_settings, weights_name

KEY_FORMAT = 1        # rises when the meaning of a setting changes, so that old results are not taken for new ones

# What a stage has but its key leaves out: names, and settings that cannot change a weight.
# The digest of published weights counts as the parent's key.
EXEMPT = frozenset({"name", "init_from", "weights_digest", "micro_batch", "checkpoint_every"})

# Settings that came after format 1; the default is what all stages did before. With it, a stage keeps its old key.
LATER = frozenset(
    {
        *("all_reduce", "features", "mean", "fit", "freeze", "new_rows", "layer_decay"),
        *("view", "flip_vertical", "quarter_turns", "area", "aspect", "mixup", "erase"),
        *("optimiser", "decay_biases", "rule", "warmup_epochs", "final_learning_rate"),
        *("label_smoothing", "balance", "class_weights", "average"),
    }
)

# All that can change the one layer that a logistic fit trains; the others come from the parent.
LOGISTIC = frozenset({"net", "head", "features", "width", "standardise", "mean", "fit", "precision", "class_weights"})


class Stage(Frozen):
    """One training run of the schedule with everything that can change a weight; the parent counts by its own key."""

    name: str
    net: NetName
    scale: tuple[int, int]        # shorter side S, drawn per view from [low, high]; (256, 256) is a fixed S
    init_from: str | None         # an earlier stage's name, "stage:<key>" or "weights:<name>"; None: random weights
    seed: int
    head: Head
    width: float
    crop: int
    dropout: float
    initialise: Initialise
    standardise: bool
    flip: bool
    colour: float
    global_batch: int
    momentum: float
    weight_decay: float
    learning_rate: float
    drops: int
    patience: int
    max_epochs: int
    precision: Precision
    channels_last: bool
    compile: bool
    micro_batch: int
    checkpoint_every: CheckpointEvery
    all_reduce: AllReduce = "fp32"
    features: Features | None = None      # of a linear head; its scales are resolved
    weights_digest: str | None = None     # of the published weights that init_from names; None: not looked up, or none
    mean: MeanOf | None = None            # whose mean and deviation; None: not chosen yet (training.parents), or "data"
    fit: Fit = "sgd"
    freeze: int = 0
    new_rows: NewRows = "means"           # first weights of the last layer for classes that the parent lacks
    layer_decay: float = 1.0
    view: View = "crop"
    flip_vertical: bool = False
    quarter_turns: bool = False
    area: tuple[float, float] | None = None
    aspect: tuple[float, float] | None = None
    mixup: float = 0.0
    erase: float = 0.0
    optimiser: Optimiser = "sgd"
    decay_biases: bool = True
    rule: Rule = "plateau"
    warmup_epochs: int = 0
    final_learning_rate: float = 0.0
    label_smoothing: float = 0.0
    balance: float = 0.0
    class_weights: ClassWeights | None = None
    average: int = 0

    def key(self, *, classes: Sequence[str], fingerprint: str, parent_key: str | None) -> str:
        """16 hex characters: same key, same result (bit by bit at equal workers, threads and device model)."""
        settings = {name: value for name, value in self.model_dump(mode="json").items() if name not in EXEMPT}
        if self.fit == "logistic":
            settings = {name: settings[name] for name in LOGISTIC}
        if self.mean == "data":
            settings["mean"] = None
        for name in LATER & settings.keys():
            if settings[name] == type(self).model_fields[name].default:
                del settings[name]
        return digest(
            {
                "format": KEY_FORMAT,
                "settings": settings,
                "classes": list(classes),
                "fingerprint": fingerprint,
                "parent": parent_key,
            },
            hex_characters=16,
        )

    @property
    def net_settings(self) -> dict[str, Any]:
        """What nets.build_net wants besides the net and its classes."""
        names = ("head", "features", "width", "crop", "dropout")
        return {name: getattr(self, name) for name in names}

    @property
    def default_test_scales(self) -> tuple[int, ...]:
        """Sec. 4.2: {S-d, S, S+d} for a fixed S, {low, middle, high} for a range; d is 32 at the paper's crop of 224.

        At other crops d = round(crop/7) (ours); no test scale is below the crop. Those of a linear head are its own.
        """
        if self.features is not None:
            assert self.features.scales is not None, "resolved by recipe_checks"
            return self.features.scales
        low, high = self.scale
        if low != high:
            return (low, self.middle_scale, high)
        d = round(self.crop / 7)
        return tuple(sorted({max(low - d, self.crop), low, low + d}))

    @property
    def middle_scale(self) -> int:
        """The test scale of a single-scale test, Q = S or 0.5 (low + high) (Sec. 3.2, 4.1); also what val is read at."""
        return sum(self.scale) // 2


def resolve_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The recipe's stages in an order in which each comes after its parent, otherwise as written."""
    tables = {table.name: table for table in recipe.stages}
    ordered: list[str] = []

    def place(name: str) -> None:
        parent = tables[name].init_from
        if parent in tables:
            place(parent)
        if name not in ordered:
            ordered.append(name)

    for name in tables:
        place(name)
    return tuple(resolve_stage(recipe, tables[name]) for name in ordered)


def resolve_stage(recipe: Recipe, table: StageTable) -> Stage:
    """One stage; whose mean it takes, and the digest of published weights, are looked up by training.parents.settle."""
    settings = stage_settings(recipe, table)
    settings["checkpoint_every"] = CheckpointEvery.parse(settings["checkpoint_every"])
    return Stage(name=table.name, init_from=table.init_from, seed=recipe.seed, **settings)


def stage_keys(stages: Sequence[Stage], *, classes: Sequence[str], fingerprint: str) -> dict[str, str]:
    """Each stage's key by its name; `stages` in resolve_stages' order, parents first."""
    keys: dict[str, str] = {}
    for stage in stages:
        keys[stage.name] = stage.key(classes=classes, fingerprint=fingerprint, parent_key=parent_key(stage, keys))
    return keys


def parent_key(stage: Stage, keys: Mapping[str, str]) -> str | None:
    """The key of the stage whose weights this one starts from, by `keys` of its own schedule; None: random weights."""
    if stage.init_from is None:
        return None
    if weights_name(stage.init_from) is not None:
        assert stage.weights_digest is not None, f"{stage.init_from} has not been looked up"
        return f"weights:{stage.weights_digest}"
    return stored_key(stage.init_from) or keys[stage.init_from]


def schedule_key(recipe_name: str, keys: dict[str, str]) -> str:
    """16 hex characters for a recipe's whole schedule: its name and its stages' keys in order."""
    return digest({"name": recipe_name, "stages": list(keys.items())}, hex_characters=16)


def evaluated_stages(recipe: Recipe) -> tuple[str, ...]:
    """The stages that are measured on test: those of [evaluate], the last one by default, and what may be registered."""
    stages = [stage.name for stage in resolve_stages(recipe)]
    wanted = set(recipe.evaluate.stages or stages[-1:])
    if recipe.register_.stage != BEST_ON_VAL:
        wanted.add(recipe.register_.stage or stages[-1])
    return tuple(name for name in stages if name in wanted)
