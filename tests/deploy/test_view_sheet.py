"""The sheet of training views: what the net sees, with all that the recipe adds to it."""

import io

import numpy as np
from PIL import Image

from deploy.line import batch_titles, view_sheet
from pipelines.loader import TrainLoader
from tests.training.test_worker import job_of, world  # noqa: F401 (a fixture)
from training.stage_job import view_rule

EVERYTHING = {
    "area": (0.2, 1.0), "flip_vertical": True, "quarter_turns": True, "mixup": 0.4, "erase": 1.0, "balance": 0.5
}  # fmt: skip


def test_a_sheet_shows_mixed_turned_and_erased_views_with_both_classes_and_their_shares(world):  # noqa: F811
    manifest = world[2]
    plain, other = (job_of(world, **changes).stage for changes in ({}, EVERYTHING))
    loader = TrainLoader(
        manifest.split("train"), manifest.colour, view_rule(other),
        standardise=False, rank=0, world_size=1, device="cpu", threads=1,
    )  # fmt: skip

    sheets = [np.asarray(Image.open(io.BytesIO(view_sheet(stage, manifest, manifest.colour)))) for stage in (plain, other)]
    batch = next(loader.epoch(0))
    titles = batch_titles(batch, manifest.classes)

    loader.close()
    assert sheets[0].shape == sheets[1].shape and not np.array_equal(*sheets)
    one, two = (manifest.classes[int(labels[0])] for labels in (batch.labels, batch.partner_labels))
    assert len(titles) == 7 and titles[0] == f"{100 * float(batch.mix[0]):.0f} % {one} + {two}"
