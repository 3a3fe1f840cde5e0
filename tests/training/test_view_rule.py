"""What a stage says of its views reaches training, validation and test."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from pipelines.loader import TestLoader
from pipelines.plan import ViewRule
from tests.training.test_worker import job_of, training, world  # noqa: F401 (a fixture)
from training.evaluate import evaluate_weights
from training.stage_job import view_rule

OTHER = {
    "seed": 4, "net": "D", "scale": (36, 48), "crop": 48, "flip": False, "colour": 0.2, "global_batch": 5,
    "view": "whole", "flip_vertical": True, "quarter_turns": True, "area": (0.2, 1.0), "aspect": (0.5, 2.0),
    "mixup": 0.3, "erase": 0.4, "balance": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(ViewRule)])
def test_each_setting_of_views_is_the_stages(world, name):  # noqa: F811
    plain, other = job_of(world).stage, job_of(world, **{name: OTHER[name]}).stage

    assert getattr(view_rule(plain), name) == getattr(plain, name) != OTHER[name]
    assert getattr(view_rule(other), name) == OTHER[name]


def test_a_stage_of_whole_views_is_validated_and_tested_on_whole_views(world):  # noqa: F811
    manifest = world[2]
    part = training(world, view="whole", scale=(32, 32))
    loaders = [
        TestLoader(manifest.split("val"), manifest.colour, standardise=True, device="cpu", threads=1, view=view)
        for view in ("whole", "crop")
    ]

    whole, crop = (next(loader.centre(32, 32, 64))[0] for loader in loaders)

    images, _ = next(part.validation.share_of_val())
    assert torch.equal(images, whole) and not torch.equal(images, crop)
    found = [
        evaluate_weights(
            part.learner.net.state_dict(), stage, manifest.split("val"), manifest.colour,
            classes=len(manifest.classes), protocol="centre", scales=(32,), device="cpu", threads=1,
        )
        for stage in (part.stage, job_of(world, scale=(32, 32)).stage)
    ]  # fmt: skip
    with torch.inference_mode():
        expected = [torch.softmax(part.learner.net.eval()(views), dim=1).numpy() for views in (whole, crop)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-4
