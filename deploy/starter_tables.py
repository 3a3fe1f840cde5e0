"""The tables of a starter recipe: each key with its value and the reason for it."""

from collections.abc import Sequence

from deploy import starter_rules as rules
from deploy.starter import Scratch, choose_scales, micro_batch
from deploy.starter_lines import (
    FLIP,
    UPSIDE_DOWN,
    Facts,
    Setting,
    Table,
    about,
    data_table,
    precision_setting,
    register_table,
    stages_evaluated,
)
from vggcore.published import PublishedWeights
from vggcore.recipe import GATE


def recipe_tables(facts: Facts, name: str) -> list[Table]:
    """The whole recipe."""
    top = (
        Setting("name", name, "also the name of the registered model"),
        Setting("seed", 1, "first weights and views follow from it"),
    )
    if facts.weights is not None:
        return [Table("", top), *from_weights(facts, facts.weights)]
    return [Table("", top), *(papers_way(facts) if facts.scratch.is_papers else from_scratch(facts))]


def from_scratch(facts: Facts) -> list[Table]:
    """A small net, or two, by what helped on small sets."""
    names = scratch_names(facts.scratch)
    return [
        data_table(facts, HE_STANDARDISE),
        Table("[net]", (*linear_head(), *small_net(facts))),
        Table("[augment]", augment_settings(facts)),
        Table("[train]", train_settings(facts)),
        *(Table("[[stage]]", scratch_stage(facts, names, place)) for place in range(len(names))),
        *([Table("[evaluate]", stages_evaluated(names))] if len(names) > 1 else []),
        register_table(facts, names),
    ]


def from_weights(facts: Facts, weights: PublishedWeights) -> list[Table]:
    """A linear stage on published weights, and before it a small net from scratch where that is cheap.

    The linear stage is the last: of stages that are equal on val the later is registered.
    """
    scratch = facts.scratch
    cheap = scratch.hours <= rules.CHEAP_HOURS and not scratch.is_papers and len(scratch.nets) == 1
    names = [*(scratch_names(scratch) if cheap else []), f"{weights.net}-linear"]
    return [
        data_table(facts, Setting("standardise", False, "published weights have no deviation to divide by")),
        Table("[net]", (Setting("head", "linear", "conv groups, pooled over all places, then one linear layer"),)),
        Table("[train]", train_settings(facts) if cheap else (precision_setting(facts),)),
        *([Table("[[stage]]", beside_weights(facts, names))] if cheap else []),
        Table("[[stage]]", linear_stage(facts, weights, names[-1])),
        *([Table("[evaluate]", stages_evaluated(names))] if cheap else []),
        register_table(facts, names),
    ]


def beside_weights(facts: Facts, names: Sequence[str]) -> tuple[Setting, ...]:
    """A small net from scratch with all its settings in its own table; the same stage as without --from, by its key."""
    first, *own = scratch_stage(facts, names, 0)
    views = augment_settings(facts)
    augment = {setting.key: setting.value for setting in views}
    reason = "; ".join(setting.reason for setting in views[1:])
    return (
        first._replace(reason="a small net from scratch, to compare with"),
        *own,
        *linear_head()[1:],
        *small_net(facts),
        HE_STANDARDISE,
        Setting("augment", augment, reason),
    )


def papers_way(facts: Facts) -> list[Table]:
    """Net A, D from it, then D at a jittered scale, as in the paper."""
    machine, scratch = facts.machine, facts.scratch
    names = ("A-256", "D-256", "D-256-512")
    passes = micro_batch(machine, facts.precision, scratch.size)
    held = f"pictures a forward pass: {machine.gpu_gib:.0f} GiB do not hold the whole batch"
    train = (
        Setting("global_batch", scratch.size.batch, "the paper's (Sec. 3.1)"),
        *([Setting("micro_batch", passes, held)] if passes else []),
        Setting("learning_rate", 1e-2, "the paper's; divided by 10 when val stops improving (Sec. 3.1)"),
        Setting("max_epochs", rules.PAPER_EPOCHS, f"the paper's (Sec. 3.1); {about(scratch.hours)} for all stages at most"),
        precision_setting(facts),
    )
    stages = (
        (
            Setting("name", names[0], "the paper's first net: shallow enough to learn from random weights"),
            Setting("net", "A", "11 layers"),
            Setting("scale", 256, "shorter side S; crops of 224 from it (Sec. 3.1)"),
        ),
        (
            Setting("name", names[1], "the paper's VGG-16"),
            Setting("net", "D", "16 layers"),
            Setting("scale", 256, "as A"),
            Setting("init_from", names[0], "its first four convs and FC layers (Sec. 3.1)"),
        ),
        (
            Setting("name", names[2], "the paper's best single net (Table 4)"),
            Setting("net", "D", "16 layers"),
            Setting("scale", (256, 512), "S drawn for each view: scale jittering (Sec. 3.1)"),
            Setting("init_from", names[1], "all layers"),
            Setting("learning_rate", 1e-3, "on trained weights (Sec. 3.1)"),
        ),
    )
    return [
        data_table(facts, None),
        Table(
            "[net]",
            (
                Setting("width", scratch.size.width, f"the paper's: {facts.sharing.train:,} pictures in train, and a GPU"),
                Setting("crop", scratch.crop, "the paper's (Sec. 2.1)"),
                Setting("initialise", "he", "from the paper's deviation of 0.01 nets may not start to learn"),
            ),
        ),
        Table("[augment]", (FLIP, UPSIDE_DOWN)),
        Table("[train]", train),
        *(Table("[[stage]]", stage) for stage in stages),
        Table("[evaluate]", (*stages_evaluated(names), Setting("protocol", "dense", "whole pictures (Sec. 3.2)"))),
        register_table(facts, names),
    ]


HE_STANDARDISE = Setting("standardise", True, "narrow nets with He weights learn sooner")


def linear_head() -> tuple[Setting, ...]:
    """A net's head that averages over places."""
    return (
        Setting("head", "linear", "one layer after average pooling: as good as three FC layers on small sets"),
        Setting("features", {"groups": (5,), "pool": "average"}, "the whole net's output, averaged over places"),
    )


def small_net(facts: Facts) -> tuple[Setting, ...]:
    """Width, crop and first weights of a small net."""
    scratch, side = facts.scratch, facts.look.sizes.shorter[1]
    width = f"for {facts.sharing.train:,} pictures in train"
    if scratch.size is rules.SIZES[0]:
        width += "; twice as wide was no better on 1,557"
    if scratch.size is not scratch.by_count:
        width = f"wider ({scratch.by_count.width:g}) suits {facts.sharing.train:,} pictures, but takes too long on this machine"
    crop = f"larger ones did not help small sets; the median shorter side is {side:,} px"
    if scratch.crop < scratch.size.crop:
        crop = f"pictures are small: the median shorter side is {side:,} px"
    return (
        Setting("width", scratch.size.width, width),
        Setting("crop", scratch.crop, crop),
        Setting("initialise", "he", "narrow nets hardly learn from the paper's deviation of 0.01"),
    )


def augment_settings(facts: Facts) -> tuple[Setting, ...]:
    """What views are, and how they differ."""
    sizes, crop = facts.look.sizes, facts.scratch.crop
    low, _, high = sizes.aspect
    shape = f"width / height is {low:.2f} to {high:.2f}"
    if facts.scratch.whole:
        whole = f"{shape}, nearly the same: whole pictures at {crop} x {crop}. Small objects in large pictures want crops"
        return (Setting("view", "whole", whole), FLIP, UPSIDE_DOWN)
    return (Setting("view", "crop", f"{shape}: squeezing would distort, so random crops"), FLIP, UPSIDE_DOWN)


def train_settings(facts: Facts) -> tuple[Setting, ...]:
    """The optimiser of a small net."""
    scratch = facts.scratch
    iterations = -(-facts.sharing.train // scratch.size.batch)
    epochs = f"for {rules.ITERATIONS:,} iterations, but {rules.FEWEST_EPOCHS} to {rules.MOST_EPOCHS} epochs"
    warmup = max(1, round(rules.WARMUP_SHARE * scratch.epochs))
    return (
        Setting("global_batch", scratch.size.batch, f"{iterations:,} iterations an epoch"),
        Setting("learning_rate", rules.LEARNING_RATE, "SGD with the paper's momentum and weight decay (Sec. 3.1)"),
        Setting("rule", "cosine", "down to 0 by the last epoch, known beforehand: val is too small here to steer by"),
        Setting("warmup_epochs", warmup, f"{rules.WARMUP_SHARE:.0%} of the epochs"),
        Setting("max_epochs", scratch.epochs, f"{epochs}; {about(scratch.hours)} on this machine"),
        Setting("label_smoothing", rules.LABEL_SMOOTHING, "helped on small sets"),
        precision_setting(facts),
    )


def scratch_names(scratch: Scratch) -> list[str]:
    """A-64, D-64: net and crop."""
    return [f"{net}-{scratch.crop}" for net in scratch.nets]


def scratch_stage(facts: Facts, names: Sequence[str], place: int) -> tuple[Setting, ...]:
    """One stage of a small net's schedule."""
    scratch = facts.scratch
    net = scratch.nets[place]
    settings = [
        Setting("name", names[place], "net and crop"),
        Setting("net", net, "from so many pictures on it may pay" if place else "deeper ones were no better on small sets"),
    ]
    if not scratch.whole:
        side = round(scratch.crop * rules.PAPER_SCALE)
        settings.append(Setting("scale", side, "shorter side to crop as in the paper, 256 to 224 (Sec. 3.1)"))
    if place:
        settings.append(Setting("init_from", names[place - 1], "deeper nets start from A (Sec. 3.1)"))
    return tuple(settings)


def linear_stage(facts: Facts, weights: PublishedWeights, name: str) -> tuple[Setting, ...]:
    """The linear stage on published weights."""
    chosen = choose_scales(facts.look, facts.machine, facts.precision)
    scales = f"shorter sides of whole pictures; {about(chosen.hours)} on this machine"
    features = {"groups": rules.GROUPS, "pool": "both", "scales": chosen.scales}
    return (
        Setting("name", name, "one layer on published features: the best on small sets by far"),
        Setting("net", weights.net, f"that of {weights.name}"),
        Setting("init_from", f"weights:{weights.name}", f"{weights.licence or 'its licence is not known'}"),
        Setting("features", features, scales + (f"; {chosen.why}" if chosen.why else "")),
        Setting("fit", "logistic", "exact; its penalty is chosen on val"),
    )


def notes(facts: Facts) -> list[str]:
    """What is worth knowing before training: classes that are small in test, sides too small, a machine too slow."""
    sharing, found = facts.sharing, list(facts.look.notes)
    tests = sharing.counts["test"]
    if tests < rules.TOO_FEW_IN_TEST:
        points = 196 * (0.8 * 0.2 / tests) ** 0.5
        found.append(f"only {tests:,} pictures in test: an accuracy near 80 % is known to ± {points:.0f} points")
    if GATE in sharing.counts and sharing.counts[GATE] < rules.TOO_FEW_IN_TEST:
        found.append(f"{sharing.counts[GATE]:,} pictures in the gate split: only large gains can be shown on so few")
    scratch = facts.scratch
    if scratch.size is not scratch.by_count and facts.weights is None:
        limit = rules.SCRATCH_HOURS["gpu" if facts.machine.gpu else "cpu"]
        found.append(
            f"for {sharing.train:,} training pictures width {scratch.by_count.width:g} and crop {scratch.by_count.crop} suit"
            f" best but would take more than {limit:g} h on this machine; width {scratch.size.width:g} was chosen"
        )
    return found
