"""A stage's net and optimiser in one worker, and the gradient of an iteration: the same whatever the number of workers."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipelines.loader import Batch
from training.checkpoint import Checkpoint
from training.freezing import freeze, frozen_parameters
from training.losses import loss_sum, picture_losses
from training.memory import keep_memory
from training.new_rows import set_new_rows
from training.optimise import check_layouts, load_moments, make_optimizer, set_learning_rate
from training.stage_job import StageJob
from training.team import Team
from training.unit_inputs import UnitInputs, wants_unit_inputs
from vggcore.initialise import initialise_net
from vggcore.nets import Vgg, build_net
from vggcore.schedule import Stage
from vggcore.transfer import copy_tensors
from vggcore.weights import load_weights


def set_up_torch(job: StageJob) -> None:
    """Threads and the numeric choices that the stage's key stands for."""
    torch.set_num_threads(job.threads)
    keep_memory()
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    tf32 = job.stage.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


class Learner:
    """The net, the same net as it is called in training (`model`: compiled, averaged over workers), and its optimiser."""

    def __init__(
        self, job: StageJob, classes: int, team: Team, checkpoint: Checkpoint | None, class_factors: Tensor | None = None
    ) -> None:
        """Builds both and gives them the checkpoint's state, or the stage's first weights.

        class_factors: of the losses, see losses.factors_by_class.
        """
        self.stage, self.team = job.stage, team
        stage = job.stage
        self.net = build_net(stage.net, classes=classes, **stage.net_settings)
        if checkpoint is None:
            first_weights(self.net, job)
        else:
            self.net.load_state_dict(checkpoint.weights())
        self.net.to(team.device)
        if checkpoint is None and job.parent is not None and job.parent.added and stage.new_rows == "means":
            set_new_rows(self.net, job, team.device)
        self.unit_inputs = UnitInputs.measured(self.net, job, team) if checkpoint is None and wants_unit_inputs(job) else None
        if self.unit_inputs is not None:
            self.unit_inputs.shrink_random_rows(job)
        self.net.to(memory_format=torch.channels_last if stage.channels_last else torch.contiguous_format)
        freeze(self.net, stage)      # before DDP, which exchanges the gradients of what is trained alone
        self.optimizer = make_optimizer(self.net.named_parameters(), stage)
        if checkpoint is not None:
            load_moments(self.optimizer, checkpoint.optimizer_state())
            self.unit_inputs = UnitInputs.kept(self.net, job, self.optimizer)
        elif self.unit_inputs is not None:
            self.unit_inputs.keep(self.optimizer)
        self.class_factors = class_factors.to(team.device) if class_factors is not None else None
        self.checked = False       # the layouts of what the optimiser walks over, at the first update
        self.model = self.parallel_model()

    def parallel_model(self) -> torch.nn.Module:
        """The net as it is called in training: compiled if asked, gradients averaged over the workers."""
        # static shapes: a graph for the full batch and one for an epoch's last, short one, each compiled once
        model = cast(torch.nn.Module, torch.compile(self.net, dynamic=False)) if self.stage.compile else self.net
        if self.team.world_size == 1:
            return model
        devices = [self.team.device] if self.team.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        if self.stage.all_reduce == "bf16":
            model.register_comm_hook(None, bf16_compress_hook)
        self.warm_up(model)
        return model

    def warm_up(self, model: torch.nn.Module) -> None:
        """Two passes whose gradients are thrown away, so that a resumed run sums gradients in the same order.

        DDP regroups its buckets after its first backward: without this, from three workers on the first iteration
        after a start differs in the last bits from the same iteration in the middle of a run (measured, DESIGN 5).
        """
        model.train()
        for _ in range(2):
            images = torch.zeros(1, 3, self.stage.crop, self.stage.crop, device=self.team.device)
            self.net.set_draws(self.stage.seed, 0, torch.zeros(1, dtype=torch.int64, device=self.team.device))
            model(self.laid_out(images)).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def laid_out(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in the memory layout that the stage's convolutions want."""
        return images.contiguous(memory_format=torch.channels_last) if self.stage.channels_last else images

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        return torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.stage.precision == "bf16")

    def add_gradient(self, batch: Batch | None, iteration: int) -> Tensor:
        """Adds this worker's part of the gradient of the global batch's mean loss; its sum of losses, () float64.

        iteration: updates before this one; it decides the dropout masks. DDP averages over workers, so each part is the
        sum of losses over world_size / global size. A worker without pictures runs one zero image with its loss times 0,
        to take part in the collectives.
        """
        device = self.team.device
        if batch is None or len(batch.labels) == 0:
            images = torch.zeros(1, 3, self.stage.crop, self.stage.crop, device=device)
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            blank = Batch(images, zero, zero, np.zeros(1, np.int64), size=1, index=0)
            torch.autograd.backward(self.losses(blank, iteration) * 0.0)
            return torch.zeros((), dtype=torch.float64, device=device)
        micro = self.stage.micro_batch or len(batch.labels)
        starts = range(0, len(batch.labels), micro)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in starts:
            with self.exchange(start == starts[-1]):
                loss = self.losses(some_of(batch, slice(start, start + micro)), iteration)
                torch.autograd.backward(loss * (self.team.world_size / batch.size))
            total += loss.detach().double()
        return total

    def exchange(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged once an iteration, with the last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def losses(self, batch: Batch, iteration: int) -> Tensor:
        """The sum of the pictures' losses, a float32 scalar."""
        self.net.set_draws(self.stage.seed, iteration, batch.rows)
        with self.autocast():
            logits = self.model(self.laid_out(batch.images))
        return loss_sum(logits.float(), batch, self.stage, self.class_factors)

    @torch.inference_mode()
    def each_loss(self, batch: Batch, iteration: int) -> Tensor:
        """The loss of each picture of a batch with training's masks, (n,) float32; no other worker takes part."""
        self.net.set_draws(self.stage.seed, iteration, batch.rows)
        with self.autocast():
            logits = self.net(self.laid_out(batch.images))
        return picture_losses(logits.float(), batch, self.stage, self.class_factors)

    def update(self, learning_rate: float) -> None:
        """One step of the optimiser at the classifier's rate, by the gradient that has come together."""
        if not self.checked:
            check_layouts(self.optimizer)
            self.checked = True
        set_learning_rate(self.optimizer, learning_rate)
        with self.unit_inputs.applied() if self.unit_inputs is not None else nullcontext():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def some_of(batch: Batch, part: slice) -> Batch:
    """Some of a batch's pictures."""
    columns = {name: getattr(batch, name) for name in ("images", "labels", "rows", "mix", "partner_labels")}
    return replace(batch, **{name: column[part] for name, column in columns.items() if column is not None})


def first_weights(net: Vgg, job: StageJob) -> None:
    """Random weights, and over them what the parent gives."""
    stage: Stage = job.stage
    initialise_net(net, stage.initialise, width=stage.width, seed=stage.seed, name=stage.net)
    if job.parent is not None:
        copy_tensors(net, load_weights(job.parent.weights), job.parent.tensors)
        random = set(frozen_parameters(stage)) - job.parent.tensors.keys()
        assert not random, f"frozen, but random: {sorted(random)}"      # refused by training.parents
