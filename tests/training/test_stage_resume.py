"""Whatever optimiser, rule and rates a stage has: stopped anywhere, killed at any moment, it ends with the same bits."""

import itertools
import json

import pytest
import torch

from pipelines.manifest import read_manifest
from tests.training.stage_workers import kill_at, run_workers, start_workers
from tests.training.test_freezing import child, folder_of, last  # noqa: F401 (a fixture)
from tests.training.test_worker import world  # noqa: F401 (a fixture)
from training.checkpoint import iterations_on_disk
from training.history import read_history
from training.stage_job import StageJob
from training.store import Store, read_json
from training.team import Team
from training.worker import StageTraining, train_stage
from vggcore.recipe import CheckpointEvery, Features

BATCHES = 4                # 24 pictures in batches of 7
STALLS = {"patience": 1, "drops": 2, "learning_rate": 1e-4, "max_epochs": 6}      # val hardly moves: the rate drops

# fmt: off
STAGES = {
    "adamw":                    {"freeze": 0, "optimiser": "adamw", "weight_decay": 0.1},
    "adamw, rates by layer":    {"freeze": 1, "optimiser": "adamw", "layer_decay": 0.5, "decay_biases": False},
    "cosine after a warm-up":   {"freeze": 0, "rule": "cosine", "warmup_epochs": 1, "final_learning_rate": 1e-5},
    "a warm-up, then plateau":  {"freeze": 0, "warmup_epochs": 2, **STALLS},
    "rates by layer that drop": {"freeze": 0, "layer_decay": 0.7, **STALLS},
    "frozen groups":            {"freeze": 3, "decay_biases": False, "weight_decay": 0.1},
    "a linear head":            {"freeze": 1, "head": "linear", "features": Features(groups=(1, 2), pool="both")},
}
# fmt: on


def begin(job: StageJob) -> StageTraining:
    return StageTraining(job, read_manifest(Store(job.store).data(job.fingerprint)), Team(torch.device("cpu")))


def stop_after(job: StageJob, iterations: int) -> None:
    """Trains so many iterations in a start of its own, which then ends with a checkpoint, as after a request to stop."""
    part = begin(job)
    steps: list[int] = []
    while len(steps) < iterations and not part.finished:
        steps += itertools.islice(part.steps(), iterations - len(steps))
        if part.progress.batch == BATCHES and len(steps) < iterations:
            part.end_epoch()
    part.settle()
    part.loader.close()
    part.validation.close()


def told(job: StageJob) -> list[dict[str, object]]:
    """The history without its clocks."""
    rows = read_history(folder_of(job) / "history.jsonl")
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def assert_alike(job: StageJob, other: StageJob) -> None:
    assert last(job).files == last(other).files         # digests: weights and moments, bit by bit
    assert told(job) == told(other)
    ours, theirs = ({**read_json(folder_of(one) / "result.json"), "seconds": 0} for one in (job, other))
    assert ours == theirs


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_stopped_in_the_middle_of_epochs_ends_with_the_same_bits(child, name):  # noqa: F811
    whole, parts = child("whole", **STAGES[name]), child("parts", **STAGES[name])

    assert train_stage({"job": whole}) is None
    for iterations in (1, 4, 2):
        stop_after(parts, iterations)
    assert train_stage({"job": parts}) is None

    assert_alike(parts, whole)
    rates = [row["learning_rate"] for row in told(whole) if "epoch" in row]
    constant = not {"rule", "warmup_epochs", "patience"} & STAGES[name].keys()
    assert (len(set(rates)) == 1) is constant, "the test is to see the rate move"


@pytest.mark.parametrize("name", ["adamw, rates by layer", "frozen groups"])
def test_a_stage_whose_process_was_killed_ends_with_the_same_bits(child, name, tmp_path):  # noqa: F811
    settings = STAGES[name] | {"checkpoint_every": CheckpointEvery(iterations=1)}
    whole, killed = child("whole", **settings), child("killed", **settings)
    assert train_stage({"job": whole}) is None

    kill_at(killed, 5, start_workers(killed, 1, tmp_path / "run"))
    assert iterations_on_disk(folder_of(killed))[-1] >= 5
    (folder_of(killed) / "result.json").unlink(missing_ok=True)      # where the kill came too late
    assert train_stage({"job": killed}) is None

    assert_alike(killed, whole)


def test_the_rates_by_layer_are_kept_by_drops_and_by_checkpoints_without_them(child):  # noqa: F811
    job = child("store", freeze=0, layer_decay=0.5, **STALLS)

    assert train_stage({"job": job}) is None

    state = last(job).optimizer_state()
    rate = told(job)[-1]["learning_rate"]
    factors = [0.5**4 * 0.5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]      # groups 1 to 5, the classifier
    assert [group["lr"] for group in state["param_groups"]] == pytest.approx([rate * factor for factor in factors])
    assert rate < STALLS["learning_rate"]
    assert [len(group["params"]) for group in state["param_groups"]] == [2, 2, 4, 4, 4, 6]


def test_a_checkpoint_from_before_there_were_rates_by_layer_is_taken_up(child):  # noqa: F811
    whole, old = child("whole", freeze=0), child("old", freeze=0)
    assert train_stage({"job": whole}) is None
    stop_after(old, 5)
    path = last(old).folder / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for group in state["param_groups"]:
        del group["factor"]
    torch.save(state, path)
    progress = read_json(last(old).folder / "progress.json")
    del progress["files"]
    (last(old).folder / "progress.json").write_text(json.dumps(progress))

    assert train_stage({"job": old}) is None

    assert last(old).files["model.safetensors"] == last(whole).files["model.safetensors"]
    assert [group["factor"] for group in last(old).optimizer_state()["param_groups"]] == [1.0]


def test_workers_at_different_counts_take_up_each_others_checkpoints(child, tmp_path):  # noqa: F811
    job = child("store", optimiser="adamw", layer_decay=0.5, rule="cosine", warmup_epochs=1)
    stop_after(job, 5)
    run_workers(job, 2, tmp_path / "run")

    alone = child("alone", optimiser="adamw", layer_decay=0.5, rule="cosine", warmup_epochs=1)
    assert train_stage({"job": alone}) is None
    ours, theirs = ([row["train_loss"] for row in told(one)] for one in (job, alone))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert [row["learning_rate"] for row in told(job) if "epoch" in row] == [
        row["learning_rate"] for row in told(alone) if "epoch" in row
    ]
