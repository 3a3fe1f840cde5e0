"""A stage with more classes than its parent: old rows are the parent's, new ones come of real pictures, the same each time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.loader import TestLoader
from pipelines.manifest import Manifest, Pictures
from pipelines.scan import scan
from tests.pipelines.photo_folders import make_photo_folder
from training.learner import Learner
from training.new_rows import MOST_NEW, MOST_OLD, chosen
from training.parents import Parent
from training.stage_job import StageJob
from training.store import open_store
from training.team import Team
from vggcore.errors import DatasetError
from vggcore.initialise import initialise_net
from vggcore.nets import build_net
from vggcore.new_rows import mean_rows
from vggcore.recipe import parse_recipe
from vggcore.schedule import resolve_stages
from vggcore.transfer import new_classes, stage_net, taken_tensors
from vggcore.weights import save_weights

RECIPE = """
name = "photos"
seed = 3
[data]
root = "{root}"
standardise = true
[net]
head = "compact"
width = 0.0625
crop = 32
dropout = 0.5
[[stage]]
name = "A-36"
net = "A"
scale = 36
init_from = "stage:0123456789abcdef"
"""
CLASSES = ("flower", "cat", "coffee")      # the parent knew the first two, in this order
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[StageJob, Manifest, dict[str, torch.Tensor]]:
    """A job of a stage that starts from a parent of two classes, the pictures, and the parent's weights."""
    folder = tmp_path_factory.mktemp("world")
    root = make_photo_folder(folder / "photos", per_class=8, split=True, size=(40, 60))
    recipe = parse_recipe(RECIPE.format(root=root), place="photos.toml", folder=folder)
    store = open_store(folder / "store")
    manifest = scan(recipe.data, store.root, threads=1).in_order(CLASSES[:2])
    (stage,) = resolve_stages(recipe)
    net = build_net(stage.net, classes=2, **stage.net_settings)
    initialise_net(net, "he", width=stage.width, seed=9, name="parent")
    save_weights(net.state_dict(), folder / "parent.safetensors")
    parent = stage_net(stage, CLASSES[:2], name="'parent'")
    tensors, added = taken_tensors(stage, CLASSES, parent), new_classes(stage, CLASSES, parent)
    job = StageJob(
        stage=stage, key="0" * 16, store=store.root, fingerprint=manifest.fingerprint, classes=manifest.classes,
        parent=Parent("0123456789abcdef", "'parent'", folder / "parent.safetensors", tensors, added),
        colour=manifest.colour, lock="stage-test", fence=1, nonce="", device="cpu", threads=1,
    )  # fmt: skip
    return job, manifest, {name: tensor.clone() for name, tensor in net.state_dict().items()}


def learnt(job: StageJob) -> dict[str, torch.Tensor]:
    return Learner(job, 3, Team(CPU), None).net.state_dict()


def test_new_rows_are_made_of_the_mean_features_of_the_pictures_and_old_ones_are_the_parents(world):
    job, manifest, parents = world
    net = build_net("A", classes=2, **job.stage.net_settings | {"dropout": 0.0})
    net.load_state_dict(parents)
    loader = TestLoader(manifest.split("train"), job.colour, standardise=True, device="cpu", threads=1)
    features, labels = [], []
    with torch.no_grad():
        for images, its, _ in loader.centre(36, 32, 5):
            features.append(net.eval().classifier[:-1](net.avgpool(net.features(images)).flatten(1)).double())
            labels.append(its)
    loader.close()
    seen, label = torch.cat(features), torch.cat(labels)
    weight, bias = parents["classifier.4.weight"].double(), parents["classifier.4.bias"].double()
    own = (seen[label < 2] @ weight.T + bias).gather(1, label[label < 2][:, None]).mean()

    found, again = learnt(job), learnt(job)

    assert job.parent.added == ("coffee",) and job.classes == CLASSES
    row, its_bias = mean_rows(
        weight, bias, centre=seen[label < 2].mean(0), own=float(own), means=seen[label == 2].mean(0)[None]
    )
    assert torch.equal(found["classifier.4.weight"][:2], parents["classifier.4.weight"])
    torch.testing.assert_close(found["classifier.4.weight"][2:], row.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["classifier.4.bias"][2:], its_bias.float(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_random_rows_are_those_of_the_stages_own_first_weights(world):
    job, _, parents = world
    random = replace(job, stage=job.stage.model_copy(update={"new_rows": "random"}))
    plain = build_net("A", classes=3, **job.stage.net_settings)
    initialise_net(plain, "paper", width=job.stage.width, seed=job.stage.seed, name="A")

    found = learnt(random)

    assert torch.equal(found["classifier.4.weight"][:2], parents["classifier.4.weight"])
    assert torch.equal(found["classifier.4.weight"][2:], plain.state_dict()["classifier.4.weight"][2:])


def test_of_many_pictures_few_are_looked_at_chosen_by_content():
    number = 5000
    labels = np.arange(number) % 4
    contents = np.array([f"{7919 * place % 5003:032x}" for place in range(number)], object)
    paths = np.array([f"{place}.png" for place in range(number)], object)
    pictures = Pictures(Path("/"), paths, labels, np.ones(number, np.int64), np.ones(number, np.int64), contents)

    found, shuffled = chosen(pictures, 3), chosen(pictures.some(np.arange(number)[::-1]), 3)

    assert [int((found.labels < 3).sum()), int((found.labels == 3).sum())] == [MOST_OLD, MOST_NEW]
    assert sorted(found.contents[found.labels == 3]) == sorted(contents[labels == 3])[:MOST_NEW]
    assert set(found.paths) == set(shuffled.paths)


def test_a_picture_that_breaks_meanwhile_is_named(world, tmp_path):
    job, manifest, _ = world
    path = manifest.root / manifest.split("train").paths[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    try:
        with pytest.raises(DatasetError, match=path.name):
            learnt(job)
    finally:
        path.write_bytes(whole)
