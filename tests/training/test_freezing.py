"""Frozen conv groups: their weights keep every bit, and nothing is computed or kept for them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.loader import Batch
from tests.training.stage_workers import kill_at, run_workers, start_workers
from tests.training.test_worker import job_of, world  # noqa: F401 (a fixture)
from training.checkpoint import iterations_on_disk, read_checkpoint
from training.freezing import frozen_layers, frozen_parameters, training_macs
from training.history import read_history
from training.learner import Learner
from training.parents import Parent
from training.stage_job import StageJob
from training.store import open_store
from training.team import Team
from training.worker import train_stage
from vggcore.initialise import initialise_net
from vggcore.nets import build_net, layer_table
from vggcore.recipe import CheckpointEvery
from vggcore.schedule import Stage
from vggcore.transfer import stage_net, taken_tensors
from vggcore.weights import load_weights, save_weights

FROZEN = ["features.0.weight", "features.0.bias", "features.3.weight", "features.3.bias"]      # groups 1 and 2 of net A


@pytest.fixture
def child(world, tmp_path):  # noqa: F811
    """Makes the job of a net A that starts from another one, in a store of its own, with any settings."""

    def make(name: str, **changes) -> StageJob:
        job = job_of(world, **({"freeze": 2, "max_epochs": 3, "learning_rate": 1e-3} | changes))
        weights = tmp_path / f"parent-{job.stage.head}.safetensors"
        stage = job.stage.model_copy(update={"net": "A"})
        net = build_net(stage.net, classes=3, **stage.net_settings)
        initialise_net(net, "he", width=stage.width, seed=99, name="parent")
        save_weights(net.state_dict(), weights)
        store = open_store(tmp_path / name)
        for part in ("data", "locks"):
            folder = store.root / part
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
            folder.symlink_to(job.store / part)
        store.stage(job.key).mkdir(parents=True)
        tensors = taken_tensors(job.stage, "abc", stage_net(stage, "abc", name="'A'"))
        parent = Parent("1" * 16, "'A'", weights, tensors)
        return dataclasses.replace(job, store=store.root, parent=parent, sample_s=0.0)

    return make


def folder_of(job: StageJob) -> Path:
    return open_store(job.store).stage(job.key)


def last(job: StageJob):
    """The newest checkpoint."""
    return read_checkpoint(folder_of(job), iterations_on_disk(folder_of(job))[-1])


def assert_groups_1_and_2_are_the_parents(job: StageJob) -> None:
    """And that all others have moved."""
    parent, found = load_weights(job.parent.weights), last(job).weights()
    assert found.keys() == parent.keys()
    assert [name for name in sorted(found) if torch.equal(found[name], parent[name])] == sorted(FROZEN)


@pytest.mark.parametrize(
    "changes", [{}, {"optimiser": "adamw"}, {"precision": "bf16"}, {"micro_batch": 2}, {"channels_last": False}]
)
def test_frozen_groups_keep_every_bit_and_have_no_momentum(child, changes):
    job = child("store", max_epochs=1, **changes)

    assert train_stage({"job": job}) is None

    assert_groups_1_and_2_are_the_parents(job)
    state = last(job).optimizer_state()
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"]) == 22 - len(FROZEN)


def test_nothing_is_kept_for_a_backward_pass_below_the_first_group_that_is_trained(child):
    batch = Batch(torch.rand(5, 3, 32, 32), torch.zeros(5).long(), torch.arange(5), np.arange(5), size=5, index=0)

    def kept(freeze: int) -> int:
        learner = Learner(child(f"store-{freeze}", freeze=freeze), 3, Team(torch.device("cpu")), None)
        weights = {weight.untyped_storage().data_ptr() for weight in learner.net.parameters()}
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = learner.losses(batch, 0)
        loss.backward()
        frozen = frozen_parameters(learner.stage)
        assert [name for name, one in learner.net.named_parameters() if one.grad is None] == list(frozen)
        return sum(seen.values())

    assert kept(0) > 1.8 * kept(1) > 1.8 * 1.8 * kept(3) > 0


@pytest.mark.timeout(900)      # nine processes load torch, three at a time
def test_three_workers_leave_frozen_bits_alone_also_when_killed_and_started_again(child, tmp_path):
    whole, killed = child("whole"), child("killed", checkpoint_every=CheckpointEvery(iterations=1))

    run_workers(whole, 3, tmp_path / "run-whole")
    kill_at(killed, 6, start_workers(killed, 3, tmp_path / "run-1"))
    reached = iterations_on_disk(folder_of(killed))[-1]
    run_workers(killed, 3, tmp_path / "run-2")

    assert 6 <= reached < 12
    assert_groups_1_and_2_are_the_parents(whole)
    ours, theirs = last(killed), last(whole)
    assert ours.files == theirs.files       # digests: weights and momentum, bit by bit
    assert [row["train_loss"] for row in read_history(folder_of(killed) / "history.jsonl")] == [
        row["train_loss"] for row in read_history(folder_of(whole) / "history.jsonl")
    ]


def test_random_layers_are_never_frozen(child):
    job = child("store", net="D")       # from net A: conv1_2 and conv2_2 are random

    with pytest.raises(AssertionError, match=r"frozen, but random: .*'features.2.bias'"):
        Learner(job, 3, Team(torch.device("cpu")), None)


@pytest.mark.parametrize(("freeze", "layers"), [(0, 0), (1, 5), (2, 10), (5, 31)])
def test_the_layers_of_frozen_groups_are_the_first_of_net_d(freeze, layers):
    stage, table = Stage.model_construct(net="D", freeze=freeze), layer_table("D", classes=10)

    assert frozen_layers(stage, table) == layers
    assert layers == 0 or table[layers - 1].kind == "maxpool"
    assert len(frozen_parameters(stage)) == 2 * sum(row.kind.startswith("conv") for row in table[:layers])


def test_training_only_the_classifier_costs_a_forward_pass_of_the_convs():
    table = layer_table("D", classes=10)
    convs = sum(row.macs for row in table if row.kind.startswith("conv"))
    fcs = [row.macs for row in table if row.kind.startswith("FC")]

    assert training_macs(Stage.model_construct(net="D", freeze=5), table) == convs + 3 * sum(fcs) - fcs[0]
    assert training_macs(Stage.model_construct(net="D", freeze=0), table) == 3 * (convs + sum(fcs)) - table[0].macs
