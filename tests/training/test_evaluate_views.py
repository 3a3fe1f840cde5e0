"""Posteriors averaged over mirrored and turned views, and the questions that evaluations stand under."""

import numpy as np
import pytest
import torch

from pipelines.loader import TestLoader
from tests.training.test_worker import job_of, training, world  # noqa: F401 (a fixture)
from training.evaluate import evaluate_stage, evaluate_weights
from training.store import open_store
from vggcore.dense import dense_posteriors
from vggcore.digest import digest
from vggcore.weights import save_weights


@pytest.mark.parametrize(
    ("views", "vertical", "number"), [("none", True, 1), ("flips", False, 2), ("flips", True, 4), ("turns", True, 8)]
)
@torch.inference_mode()
def test_posteriors_are_averaged_over_the_views(world, views, vertical, number):  # noqa: F811
    part, manifest = training(world, flip_vertical=vertical), world[2]
    net, pictures = part.learner.net.eval(), manifest.split("val")
    loader = TestLoader(pictures, manifest.colour, standardise=True, device="cpu", threads=1)

    def found(protocol: str) -> np.ndarray:
        return evaluate_weights(
            net.state_dict(), part.stage, pictures, manifest.colour, classes=3, protocol=protocol, scales=(36,), views=views,
            device="cpu", threads=1,
        )  # fmt: skip

    def turned(images: torch.Tensor) -> list[torch.Tensor]:
        flipped = [images, images.flip(3), images.flip(2), images.flip(2, 3)]
        lying = [one.transpose(2, 3) for one in flipped]
        return (flipped + lying)[:number]

    (crops, _, _), = loader.centre(36, 32, 64)
    expected = torch.stack([torch.softmax(net(one), 1) for one in turned(crops)]).mean(0)
    np.testing.assert_allclose(found("centre"), expected.numpy(), atol=1e-6)
    dense = found("dense")
    for images, _, rows in loader.whole(36, 64):
        both = turned(images) if number > 1 else [images, images.flip(3)]      # dense has its mirror image anyway
        expected = torch.stack([dense_posteriors(net, one) for one in both]).mean(0)
        np.testing.assert_allclose(dense[rows.tolist()], expected.numpy(), atol=1e-6)
    assert number == 1 or np.abs(found("centre") - torch.softmax(net(crops), 1).numpy()).max() > 1e-5


def test_old_questions_keep_their_digests_and_other_views_and_weights_are_other_questions(world, tmp_path):  # noqa: F811
    part, manifest, store = training(world, flip_vertical=True), world[2], open_store(tmp_path / "store")
    store.stage("k" * 16).mkdir(parents=True)
    store.data(manifest.fingerprint).parent.mkdir(exist_ok=True)
    store.data(manifest.fingerprint).symlink_to(world[1].data(manifest.fingerprint))
    (store.stage("k" * 16) / "stage.json").write_text(f'{{"fingerprint": "{manifest.fingerprint}"}}')
    save_weights(part.learner.net.state_dict(), tmp_path / "w")

    def asked(**changes) -> str:
        arguments = {"protocol": "centre", "scales": (36,), "split": "val"} | changes
        return evaluate_stage(store, part.stage, "k" * 16, tmp_path / "w", manifest, **arguments).folder.name

    usual = {"protocol": "centre", "scales": [36], "split": "val", "fingerprint": manifest.fingerprint}
    assert asked() == asked(views="none") == digest(usual, hex_characters=16)
    assert asked(views="flips") == digest(usual | {"views": "flips"}, hex_characters=16)
    assert asked(weights_digest="f" * 32) == digest(usual | {"weights": "f" * 32}, hex_characters=16)
    upright = part.stage.model_copy(update={"flip_vertical": False})
    part.stage = upright
    assert asked(protocol="dense", views="flips") == asked(protocol="dense")      # dense has its mirror image anyway
