"""The stages a recipe stands for, every setting resolved, and the keys they are known by for ever."""

from collections.abc import Mapping, Sequence

from vggcore.digest import digest
from vggcore.recipe import (
    BEST_ON_VAL,
    AllReduce,
    CheckpointEvery,
    Frozen,
    Head,
    Initialise,
    NetName,
    Precision,
    Recipe,
    stored_key,
)

KEY_FORMAT = 1        # rises when the meaning of a setting changes, so that old results are not taken for new ones

# What a stage has but its key leaves out: names, and settings that cannot change a weight.
EXEMPT = frozenset({"name", "init_from", "micro_batch", "checkpoint_every"})

# Settings that came after format 1; the default is what all stages did before. With it, a stage keeps its old key.
LATER = frozenset({"all_reduce"})


class Stage(Frozen):
    """One training run of the schedule with everything that can change a weight; the parent counts by its own key."""

    name: str
    net: NetName
    scale: tuple[int, int]        # shorter side S, drawn per view from [low, high]; (256, 256) is a fixed S
    init_from: str | None         # an earlier stage's name, or "stage:<key>" of the store; None: random weights
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

    def key(self, *, classes: Sequence[str], fingerprint: str, parent_key: str | None) -> str:
        """16 hex characters: same key, same result (bit by bit at equal workers, threads and device model)."""
        settings = {name: value for name, value in self.model_dump(mode="json").items() if name not in EXEMPT}
        for name in LATER:
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
    def default_test_scales(self) -> tuple[int, ...]:
        """Sec. 4.2: {S-d, S, S+d} for a fixed S, {low, middle, high} for a range; d is 32 at the paper's crop of 224.

        At other crops d = round(crop/7) (ours); no test scale is below the crop.
        """
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
    train = recipe.train
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
    stages = []
    for table in (tables[name] for name in ordered):
        own = {
            field: getattr(table, field) if getattr(table, field) is not None else getattr(train, field)
            for field in ("learning_rate", "drops", "patience", "max_epochs")
        }
        stages.append(
            Stage(
                name=table.name,
                net=table.net,
                scale=table.scale,
                init_from=table.init_from,
                seed=recipe.seed,
                **recipe.net.model_dump(exclude={"initialise"}),
                initialise=table.initialise or recipe.net.initialise,
                standardise=recipe.data.standardise,
                **recipe.augment.model_dump(),
                **train.model_dump(exclude={*own, "checkpoint_every"}),
                **own,
                checkpoint_every=CheckpointEvery.parse(train.checkpoint_every),
            )
        )
    return tuple(stages)


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
