"""A worker's part of an iteration: whatever the micro-batches and the workers, the same gradient."""

import dataclasses
import json
import os
import shutil
import signal
import socket
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.loader import Batch
from pipelines.plan import epoch_order
from pipelines.scan import scan
from tests.pipelines.photo_folders import make_photo_folder
from training.checkpoint import iterations_on_disk
from training.history import read_history
from training.listener import Listener
from training.parents import is_done
from training.picture_log import PictureLog, pictures_that_count
from training.run import train_schedule
from training.stage_job import StageJob, Superseded, prove_same_world, view_rule
from training.stop_switch import Interrupted
from training.store import Store, open_store
from training.team import Team
from training.where import Where, check_where
from training.worker import StageTraining
from vggcore.errors import DatasetError, DeviceError, RecipeError, StoreError, VggrowError
from vggcore.recipe import Recipe, parse_recipe
from vggcore.schedule import Stage, resolve_stages, stage_keys

RECIPE = """
name = "photos"
seed = 3
[data]
root = "{root}"
standardise = true
[net]
width = 0.0625
crop = 32
dropout = 0.5
initialise = "he"
[train]
global_batch = 7
max_epochs = 2
[[stage]]
name = "A-36"
net = "A"
scale = 36
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A scanned folder of photos: (recipe, store, manifest)."""
    folder = tmp_path_factory.mktemp("world")
    root = make_photo_folder(folder / "photos", per_class=8, split=True, size=(40, 60))
    recipe = parse_recipe(RECIPE.format(root=root), place="photos.toml", folder=folder)
    store = open_store(folder / "store")
    return recipe, store, scan(recipe.data, store.root, threads=1)


def job_of(world, **changes) -> StageJob:
    recipe, store, manifest = world
    (stage,) = resolve_stages(recipe)
    stage = stage.model_copy(update=changes)
    (store.locks / "stage-test.nonce").write_text("here")
    (store.locks / "stage-test.fence").write_text("1\n")
    return StageJob(
        stage=stage,
        key="0" * 16,
        store=store.root,
        fingerprint=manifest.fingerprint,
        classes=manifest.classes,
        parent=None,
        colour=manifest.colour,
        lock="stage-test",
        fence=1,
        nonce="here",
        device="cpu",
        threads=1,
    )


def training(world, **changes) -> StageTraining:
    return StageTraining(job_of(world, **changes), world[2], Team(torch.device("cpu")))


def gradients(part: StageTraining) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in part.learner.net.parameters()])


def share_of(batch: Batch, start: int, stop: int) -> Batch:
    return dataclasses.replace(
        batch, images=batch.images[start:stop], labels=batch.labels[start:stop], rows=batch.rows[start:stop]
    )


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(world, micro_batch):
    whole, parts = training(world), training(world, micro_batch=micro_batch)
    batch = next(whole.loader.epoch(0))

    losses = [float(part.learner.add_gradient(batch, 0)) for part in (whole, parts)]

    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-6)


def test_workers_shares_add_up_to_the_gradient_of_the_whole_batch_also_where_one_has_no_picture(world):
    whole, worker = training(world), training(world)
    batch = next(whole.loader.epoch(0))
    whole.learner.add_gradient(batch, 0)

    for start, stop in ((0, 4), (4, 7), (7, 7)):
        worker.learner.add_gradient(share_of(batch, start, stop), 0)

    torch.testing.assert_close(gradients(worker), gradients(whole), rtol=1e-4, atol=1e-6)


def test_the_last_short_batch_is_a_mean_over_its_own_pictures(world):
    part = training(world)
    *_, last = part.loader.epoch(0)
    assert (last.size, len(last.labels)) == (3, 3)      # 24 pictures in batches of 7

    part.learner.model.train()
    loss_sum = part.learner.add_gradient(last, 0)
    scaled = gradients(part)
    part.learner.optimizer.zero_grad()
    logits_loss = part.learner.losses(last, 0)
    (logits_loss / 3).backward()

    assert loss_sum == pytest.approx(float(logits_loss.detach()), rel=1e-6)
    torch.testing.assert_close(scaled, gradients(part), rtol=1e-5, atol=1e-7)


def test_a_worker_that_sees_another_store_or_other_pictures_says_so(world, tmp_path):
    manifest, job = world[2], job_of(world)

    with pytest.raises(StoreError, match="a worker does not see the store that the driver sees"):
        prove_same_world(dataclasses.replace(job, nonce="elsewhere"), manifest)
    shutil.copytree(manifest.root, tmp_path / "photos")
    moved = dataclasses.replace(manifest, root=tmp_path / "photos")
    prove_same_world(job, moved)
    (tmp_path / "photos" / manifest.split("train").paths[0]).write_bytes(b"something else")
    with pytest.raises(DatasetError, match="a worker finds other content than the scan did"):
        prove_same_world(job, moved)


def test_an_orphan_writes_neither_checkpoint_nor_history(world):
    part = training(world)
    (world[1].locks / "stage-test.fence").write_text("2\n")

    with pytest.raises(Superseded):
        part.checkpoint()

    assert iterations_on_disk(part.folder) == []


def test_a_diverging_loss_stops_the_stage_names_the_iteration_and_keeps_the_last_good_weights(world, tmp_path):
    recipe, _, manifest = world
    store = open_store(tmp_path / "store")
    shutil.copytree(Store(world[1].root).data(manifest.fingerprint), store.data(manifest.fingerprint))
    stages, keys = schedule_of(recipe, manifest, learning_rate=1e6)

    with pytest.raises(Exception, match=r"iteration \d+ \(epoch 1\) is (nan|inf) for \d pictures, 'train/.*kept: lower"):
        train_schedule(stages, keys, manifest, Where(store), Listener())

    folder = store.stage(keys["A-36"])
    assert "ERROR ends: stage 'A-36': the loss at iteration" in (folder / "logs" / "worker-0.log").read_text()
    assert "ERROR FAILED: stage 'A-36': the loss" in (folder / "logs" / "conductor.log").read_text()
    (iteration,) = iterations_on_disk(folder)
    assert iteration == max(row["iteration"] for row in read_history(folder / "history.jsonl"))
    assert not is_done(store, keys["A-36"])


def test_a_loss_that_is_not_a_number_names_the_partners_that_mixup_added(world):
    part = training(world, mixup=0.4)
    batch = next(part.loader.epoch(0))
    lone = dataclasses.replace(batch, images=batch.images * torch.tensor([float("nan")] + [1.0] * 6)[:, None, None, None])

    problem = str(part.no_number(lone, 1, float("nan")))

    part.loader.close()
    assert "nan for 2 pictures" in problem
    for place in (batch.pictures[0], batch.partners[0]):
        assert repr(str(part.train.paths[place])) in problem


def test_the_logs_of_a_stage_tell_each_epoch_and_checkpoint_once_and_its_machine_was_sampled(world, tmp_path):
    recipe, _, manifest = world
    store = open_store(tmp_path / "store")
    shutil.copytree(Store(world[1].root).data(manifest.fingerprint), store.data(manifest.fingerprint))
    stages, keys = schedule_of(recipe, manifest)

    train_schedule(stages, keys, manifest, Where(store), Listener())

    folder = store.stage(keys["A-36"])
    conductor, worker = ((folder / "logs" / f"{who}.log").read_text() for who in ("conductor", "worker-0"))
    assert f"INFO A-36 ({keys['A-36']}) begins: --workers 1" in conductor and f"torch {version('torch')}" in conductor
    assert "workers have begun: world size 1" in conductor and conductor.splitlines()[-1].endswith("INFO FINISHED")
    assert "from iteration 0 (epoch 1 of at most 2), random weights, on cpu, 1 threads" in worker
    assert [worker.count(f"INFO epoch {epoch} of at most 2: iteration {4 * epoch}, train loss") for epoch in (1, 2)] == [1, 1]
    assert "INFO checkpoint of iteration 4 written in" in worker and "INFO finished by iteration 8" in worker
    assert len(worker.splitlines()) < 10 and " train_loss" not in worker      # no line an iteration
    assert [json.loads(line)["step"] for line in (folder / f"system-{socket.gethostname()}.jsonl").open()] == [0]


def schedule_of(recipe: Recipe, manifest, **changes) -> tuple[tuple[Stage, ...], dict[str, str]]:
    stages = tuple(stage.model_copy(update=changes) for stage in resolve_stages(recipe))
    return stages, stage_keys(stages, classes=manifest.classes, fingerprint=manifest.fingerprint)


def test_a_signal_between_two_stages_is_no_finished_schedule(world, tmp_path):
    recipe, _, manifest = world
    store = open_store(tmp_path / "store")
    shutil.copytree(Store(world[1].root).data(manifest.fingerprint), store.data(manifest.fingerprint))
    (stage,), _ = schedule_of(recipe, manifest, max_epochs=1)
    stages = (stage, stage.model_copy(update={"name": "B-36", "net": "B", "init_from": stage.name}))
    keys = stage_keys(stages, classes=manifest.classes, fingerprint=manifest.fingerprint)

    class Signals(Listener):
        """Sends ours, a real one, as soon as the first stage has ended."""

        def stage_ends(self, stage, key, status):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train_schedule(stages, keys, manifest, Where(store), Signals())

    assert is_done(store, keys["A-36"]) and not store.stage(keys["B-36"]).exists()


def test_the_parents_layers_are_the_childs_first_weights(world, tmp_path):
    manifest, store = world[2], open_store(tmp_path / "store")
    shutil.copytree(Store(world[1].root).data(manifest.fingerprint), store.data(manifest.fingerprint))
    more = '[[stage]]\nname = "B-36"\nnet = "B"\nscale = 36\ninit_from = "A-36"\nlearning_rate = 1e-30\nmax_epochs = 1\n'
    text = RECIPE.format(root=manifest.root) + more
    stages = resolve_stages(parse_recipe(text, place="x", folder=Path()))
    keys = stage_keys(stages, classes=manifest.classes, fingerprint=manifest.fingerprint)

    train_schedule(stages, keys, manifest, Where(store), Listener())

    a, b = (result_state(store, keys[name]) for name in ("A-36", "B-36"))
    for ours, theirs in (("features.0", "features.0"), ("features.5", "features.3"), ("features.10", "features.6")):
        assert torch.equal(b[f"{ours}.weight"], a[f"{theirs}.weight"])      # conv1_1, conv2_1, conv3_1 by place in group
    assert torch.equal(b["classifier.6.weight"], a["classifier.6.weight"])


def result_state(store: Store, key: str) -> dict[str, torch.Tensor]:
    from vggcore.weights import load_weights

    checkpoint = json.loads((store.stage(key) / "result.json").read_text())["checkpoint"]
    return load_weights(store.stage(key) / "checkpoints" / checkpoint / "model.safetensors")


def test_what_cannot_work_is_said_before_anything_starts(world):
    recipe, store, manifest = world
    stages, _ = schedule_of(recipe, manifest)

    with pytest.raises(RecipeError, match="--workers 8 is more than global_batch 7: a worker would have no picture"):
        check_where(Where(store, workers=8), stages)
    with pytest.raises(DeviceError, match='"tf32" needs a GPU'):
        check_where(Where(store), [stages[0].model_copy(update={"precision": "tf32"})])


def test_validation_is_the_same_from_memory_as_from_the_pictures(world):
    part = training(world)

    first = part.validation.measure(part.learner, lambda: False)
    assert part.validation.views is not None
    again = part.validation.measure(part.learner, lambda: False)

    assert first == again
    assert first[0] in np.arange(0, 7) / 6       # 6 pictures in val


def test_the_picture_log_has_every_picture_once_an_epoch_and_counts_what_was_trained_again_once(world, tmp_path):
    recipe, _, manifest = world
    store = open_store(tmp_path / "store")
    shutil.copytree(Store(world[1].root).data(manifest.fingerprint), store.data(manifest.fingerprint))
    stages, keys = schedule_of(recipe, manifest, max_epochs=2)
    folder = store.stage(keys["A-36"])

    train_schedule(stages, keys, manifest, Where(store, log_pictures=True), Listener())
    first = pictures_that_count(folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints")                 # all is trained again, by a second start
    train_schedule(stages, keys, manifest, Where(store, log_pictures=True), Listener())
    with (folder / "pictures" / "rank-0.jsonl").open("a") as file:
        file.write('{"start": 3, "iteration": 1, "pict')     # cut short by a kill
    third = PictureLog(folder, rank=0, start=3)
    third.add(8, np.array([5, 6, 7]))                        # a start after it is not glued to what was cut
    third.close()

    assert pictures_that_count(folder) == first | {8: [5, 6, 7]}
    assert len(first) == 8 and len((folder / "pictures" / "rank-0.jsonl").read_text().splitlines()) == 18
    for epoch in (0, 1):
        seen = [picture for iteration in range(4 * epoch + 1, 4 * epoch + 5) for picture in first[iteration]]
        assert sorted(seen) == list(range(24))
    assert first[1] != first[5]                           # each epoch in an order of its own


def test_a_stop_during_validation_keeps_the_epoch_and_validates_again(world, tmp_path):
    part = training(world)
    told = iter([True])

    stopped = part.validation.measure(part.learner, lambda: next(told))

    assert stopped is None
    assert part.validation.measure(part.learner, lambda: False) is not None


def test_a_picture_that_breaks_ends_the_epoch_at_its_batch_and_is_named(world):
    part = training(world)
    part.folder.mkdir(parents=True, exist_ok=True)
    second = epoch_order(view_rule(part.stage), 0, part.train.labels)[part.stage.global_batch]
    broken = part.train.root / str(part.train.paths[second])
    kept = broken.rename(broken.with_name("kept"))

    try:
        outcome = part.train_epoch()
    finally:
        kept.rename(broken)
        part.loader.close()

    assert isinstance(outcome, VggrowError) and broken.name in str(outcome)
    assert part.progress.batch == 1, "the batch before it was trained, itself and all later ones not"
