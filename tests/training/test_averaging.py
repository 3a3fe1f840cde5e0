"""The average of a stage's last weights: right wherever val ends the stage, exact after any stop, and measured on val."""

import json
import random

import pytest
import torch

from tests.training.stage_workers import kill_at, start_workers
from tests.training.test_freezing import FROZEN, child, folder_of, last  # noqa: F401 (a fixture)
from tests.training.test_stage_resume import assert_alike, begin, stop_after
from tests.training.test_worker import world  # noqa: F401 (a fixture)
from training.averaging import WeightAverage, most_sums, possible_ends
from training.checkpoint import AVERAGE, SUMS, read_checkpoint, room_for_checkpoints
from training.learning_rate import steers
from training.optimise import Plateau, ended_by
from training.parents import result_entry, result_weights, weights_digest
from training.stage_run import check_space
from training.store import Store, read_json
from training.worker import train_stage
from vggcore.errors import StoreError
from vggcore.recipe import CheckpointEvery
from vggcore.schedule import Stage
from vggcore.weights import load_weights


def train_on(stage: Stage, curve: list[float]) -> tuple[WeightAverage, int, int]:
    """The average of a stage with one weight, which is the epoch's number; how many epochs there were; most sums at once."""
    average, plateau, epochs, most = WeightAverage(), Plateau.start(stage), 0, 0
    while ended_by(plateau, epochs=epochs, max_epochs=stage.max_epochs) is None:
        plateau = plateau.after(epochs, curve[epochs], steers=steers(stage, epochs))
        epochs += 1
        average.add({"w": torch.tensor([float(epochs)])}, epochs, stage, plateau)
        average = WeightAverage.read(average.tensors(), average.mean)      # as through a checkpoint
        most = max(most, len(average.sums))
    return average, epochs, most


def test_the_average_is_over_the_last_epochs_whatever_the_curve_on_val_rule_and_settings():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, ended = random.Random(seed), set()
    for _ in range(600):
        stage = Stage.model_construct(
            rule=draw.choice(["plateau", "plateau", "cosine"]),
            learning_rate=0.1,
            drops=draw.randrange(3),
            patience=draw.randrange(1, 5),
            warmup_epochs=draw.choice([0, 0, 1, 3]),
            max_epochs=draw.randrange(4, 25),
            average=draw.randrange(1, 8),
        )
        average, epochs, most = train_on(stage, [draw.random() * draw.random() for _ in range(25)])

        number = min(stage.average, epochs)
        expected = sum(range(epochs - number + 1, epochs + 1)) / number
        assert average.mean is not None and average.mean["w"].item() == pytest.approx(expected, rel=1e-6), stage
        assert average.sums == {} and most <= most_sums(stage), stage
        ended.add((stage.rule, epochs < stage.max_epochs, epochs < stage.average))
    assert len(ended) >= 4


def test_a_stage_keeps_no_sum_before_its_last_epochs_can_have_begun():
    stage = Stage.model_construct(rule="cosine", max_epochs=10, average=3)
    plateau = Plateau(0.1, drops_left=3, patience=5)

    assert [possible_ends(stage, plateau, epochs) for epochs in range(1, 11)] == [[]] * 7 + [[10]] * 3


AVERAGED = {"average": 2, "max_epochs": 4, "freeze": 1, "checkpoint_every": CheckpointEvery(iterations=1)}


def test_the_average_is_that_of_the_last_epochs_checkpoints_and_is_measured_on_val(child):  # noqa: F811
    job = child("store", **(AVERAGED | {"checkpoint_every": CheckpointEvery(seconds=600)}))

    assert train_stage({"job": job}) is None

    folder, store = folder_of(job), Store(job.store)
    one, other = (read_checkpoint(folder, iteration).weights() for iteration in (12, 16))
    weights = read_json(folder / "result.json")["weights"]
    assert weights.keys() == {"last", "best on val", "average"}
    averaged = load_weights(result_weights(store, job.key, "average"))
    for name, tensor in averaged.items():
        assert torch.equal(tensor, ((one[name].double() + other[name].double()) / 2).float())
    assert [name for name in sorted(averaged) if torch.equal(averaged[name], last(job).weights()[name])] == sorted(FROZEN[:2])
    assert last(job).files.keys() == {"model.safetensors", "optimizer.pt", AVERAGE}
    assert weights["average"]["digest"] == last(job).files[AVERAGE] != weights["last"]["digest"]

    part = begin(job)
    part.learner.net.load_state_dict(averaged)
    assert part.validation.measure(part.learner, lambda: False) == (
        weights["average"]["val_top1_accuracy"],
        weights["average"]["val_loss"],
    )
    assert result_weights(store, job.key) == last(job).folder / "model.safetensors"
    best = result_entry(store, job.key, "best on val")
    assert best["val_top1_accuracy"] == read_json(folder / "result.json")["best_val_top1_accuracy"]


@pytest.mark.parametrize("rule", [{"rule": "cosine"}, {"patience": 1, "drops": 2, "max_epochs": 8, "average": 3}])
def test_a_stage_that_is_stopped_at_any_point_ends_with_the_same_average(child, rule):  # noqa: F811
    whole, parts = child("whole", **(AVERAGED | rule)), child("parts", **(AVERAGED | rule))

    assert train_stage({"job": whole}) is None
    for iterations in (6, 3, 3, 2):
        stop_after(parts, iterations)
    (last(parts).folder / "unrelated").touch()
    assert train_stage({"job": parts}) is None
    (folder_of(parts) / "result.json").unlink()                 # killed between the last checkpoint and the result
    assert train_stage({"job": parts}) is None

    assert_alike(parts, whole)


def test_a_stage_with_an_average_that_was_killed_ends_with_the_same_average(child, tmp_path):  # noqa: F811
    whole, killed = child("whole", **AVERAGED), child("killed", **AVERAGED)
    assert train_stage({"job": whole}) is None

    kill_at(killed, 13, start_workers(killed, 1, tmp_path / "run"))
    (folder_of(killed) / "result.json").unlink(missing_ok=True)
    assert train_stage({"job": killed}) is None

    assert_alike(killed, whole)


def test_a_broken_file_of_sums_is_a_broken_checkpoint(child):  # noqa: F811
    job = child("store", **AVERAGED)
    stop_after(job, 14)
    assert SUMS in last(job).files

    (last(job).folder / SUMS).write_bytes(b"cut")

    assert "is not what was written" in str(last(job).problem())


def test_weights_that_a_stage_does_not_have_are_named(child):  # noqa: F811
    job = child("store", max_epochs=1)
    assert train_stage({"job": job}) is None

    with pytest.raises(StoreError, match="no weights 'average'; there are 'best on val', 'last'"):
        result_weights(Store(job.store), job.key, "average")
    path = folder_of(job) / "result.json"
    before = {name: value for name, value in read_json(path).items() if name != "weights"}
    path.write_text(json.dumps(before))                         # a stage from before weights were listed
    assert weights_digest(Store(job.store), job.key, "best on val") == last(job).files["model.safetensors"]


def test_the_room_for_checkpoints_counts_moments_and_sums(tmp_path):
    def room(**settings) -> float:
        stage = Stage.model_construct(**({"momentum": 0.9, "patience": 5} | settings))
        return room_for_checkpoints(stage, 1000, settings.pop("trained", 1000)) / 4 / 1000

    assert (room(), room(optimiser="adamw"), room(momentum=0.0)) == (8, 12, 4)      # bytes of each parameter
    assert (room(average=5, rule="cosine"), room(average=5), room(average=7)) == (16, 24, 64)
    size = {"net": "D", "head": "paper", "width": 4.0, "crop": 224, "dropout": 0.5, "momentum": 0.9}
    huge = Stage.model_construct(name="D", **size, average=1000, patience=1)
    with pytest.raises(StoreError, match=r"GiB free, but stage 'D' needs [\d.]+ GiB for its checkpoints"):
        check_space(huge, 1000, tmp_path / "stage")
