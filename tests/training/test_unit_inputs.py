"""A linear head's layer learns the same whatever the size of what it sees, and is stored as it is."""

import dataclasses

import pytest
import torch

from tests.training.test_freezing import child, folder_of, last  # noqa: F401 (a fixture)
from tests.training.test_worker import world  # noqa: F401 (a fixture)
from training.history import read_history
from training.learner import Learner
from training.stage_job import StageJob
from training.team import Team
from training.unit_inputs import KEPT
from training.worker import train_stage
from vggcore.recipe import Features
from vggcore.weights import load_weights, save_weights

HEAD = {"head": "linear", "features": Features(groups=(1,), pool="both"), "freeze": 1, "learning_rate": 1e-2}
CONVS, LAYER = ("features.0.weight", "features.0.bias"), "classifier.0.weight"
TIMES = 2.0**9        # what Keras' convs see of pictures is about so much larger than what torchvision's see


def louder(job: StageJob) -> StageJob:
    """The same function with inputs of the layer TIMES as large: from a parent of its own."""
    assert job.parent is not None
    tensors = load_weights(job.parent.weights)
    for name in CONVS:
        tensors[name] = tensors[name] * TIMES
    tensors[LAYER] = tensors[LAYER] / TIMES
    path = folder_of(job) / "louder.safetensors"
    save_weights(tensors, path)
    return dataclasses.replace(job, parent=dataclasses.replace(job.parent, weights=path))


def losses(job: StageJob) -> list[float]:
    return [row["train_loss"] for row in read_history(folder_of(job) / "history.jsonl")]


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_fitted_layer_on_inputs_500_times_as_large_learns_the_same_bits(child, optimiser):  # noqa: F811
    quiet, loud = child("quiet", **HEAD, optimiser=optimiser), louder(child("loud", **HEAD, optimiser=optimiser))

    assert train_stage({"job": quiet}) is None and train_stage({"job": loud}) is None

    assert losses(loud) == losses(quiet) and len(set(losses(quiet))) > 3
    ours, theirs = last(quiet).weights(), last(loud).weights()
    assert torch.equal(ours[LAYER], theirs[LAYER] * TIMES)
    assert not torch.equal(ours[LAYER], load_weights(quiet.parent.weights)[LAYER])


def test_a_random_layer_begins_as_one_whose_inputs_are_near_1(child):  # noqa: F811
    begun = {}
    for name in ("quiet", "loud"):
        job = child(name, **HEAD)
        job = louder(job) if name == "loud" else job
        tensors = {own: theirs for own, theirs in job.parent.tensors.items() if own in CONVS}
        job = dataclasses.replace(job, parent=dataclasses.replace(job.parent, tensors=tensors))
        begun[name] = Learner(job, 3, Team(torch.device("cpu")), None).net.state_dict()[LAYER]

    assert torch.equal(begun["quiet"], begun["loud"] * TIMES)


def test_a_net_with_the_papers_head_or_from_random_weights_is_trained_as_ever(child):  # noqa: F811
    paper, alone = child("paper"), dataclasses.replace(child("alone", **HEAD | {"freeze": 0}), parent=None)

    for job in (paper, alone):
        learner = Learner(job, 3, Team(torch.device("cpu")), None)
        assert learner.unit_inputs is None
        assert all(KEPT not in group for group in learner.optimizer.param_groups)
