"""Workers' shares put together are the whole batch: the pictures and the dropout masks of a stage, bit by bit."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipelines.loader import TrainLoader
from tests.training.test_worker import training, world  # noqa: F401 (a fixture)
from training.stage_job import view_rule
from training.worker import StageTraining
from vggcore.nets import HashedDropout

EPOCHS = 2      # of 24 pictures in batches of 7: the last, of 3, leaves the fourth of four workers without a picture


def masks_of(part: StageTraining) -> list[Tensor]:
    """Fills itself with the mask of every dropout that training goes through, (n, units) bool, True where kept."""
    seen: list[Tensor] = []

    def keep(module: HashedDropout, inputs: tuple[Tensor, ...]) -> None:
        seen.append(module.forward(torch.ones_like(inputs[0])) > 0)

    for module in part.learner.net.modules():
        if isinstance(module, HashedDropout):
            module.register_forward_pre_hook(keep)
    return seen


def trained(world, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor, list[Tensor]]]:  # noqa: F811
    """(images, labels, rows, masks) of every iteration as worker `rank` trains it, through the stage's own code."""
    part = training(world)
    manifest = world[2]
    masks = masks_of(part)
    part.learner.model.train()
    loader = TrainLoader(
        manifest.split("train"), manifest.colour, view_rule(part.stage), standardise=part.stage.standardise,
        rank=rank, world_size=world_size, device="cpu", threads=1,
    )   # fmt: skip
    for epoch in range(EPOCHS):
        for batch in loader.epoch(epoch):
            masks.clear()
            part.learner.add_gradient(batch, part.progress.iteration)
            part.progress = replace(part.progress, iteration=part.progress.iteration + 1)
            mine = [mask[: len(batch.labels)] for mask in masks]      # a worker without pictures runs one zero image
            yield batch.images, batch.labels, batch.rows, mine
    loader.close()


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_the_shares_of_2_3_and_4_workers_are_the_pictures_and_the_dropout_masks_of_one_bit_by_bit(world, workers):  # noqa: F811
    alone = list(trained(world, 0, 1))

    shares = list(zip(*(trained(world, rank, workers) for rank in range(workers)), strict=True))

    assert len(shares) == len(alone) == EPOCHS * 4
    for (images, labels, rows, masks), parts in zip(alone, shares, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
        assert torch.equal(torch.cat([part[2] for part in parts]), rows)
        assert len(masks) == 2 and all(0.4 < mask.float().mean() < 0.6 for mask in masks)
        for layer, mask in enumerate(masks):
            assert torch.equal(torch.cat([part[3][layer] for part in parts]), mask)
