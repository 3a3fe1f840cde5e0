"""Bare Ray Train, as one writes it from Ray's own tutorial: what `vggrow bench recovery` puts beside `vggrow train`.

    python -m training.bare_ray_train FOLDER --workers N --threads T --every N      FOLDER holds stage.json

The stage's net on one batch in memory with plain torch; checkpoints by ray.train.report. No pictures, no store, no MLflow.
It says what it does as our workers do, in FOLDER/history.jsonl and starts.jsonl, so that one watcher reads both.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch.nn.functional import cross_entropy

from training.history import HistoryWriter
from vggcore.initialise import initialise_net
from vggcore.nets import build_net
from vggcore.schedule import Stage

CLASSES = 10
MAX_FAILURES = 3


def train(config: dict[str, Any]) -> None:
    """A worker: config has `folder` (str), and `every`, iterations between checkpoints. Never ends by itself."""
    folder = Path(config["folder"])
    stage = Stage.model_validate_json((folder / "stage.json").read_text())
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    net = build_net(stage.net, classes=CLASSES, **stage.net_settings).train()
    initialise_net(net, stage.initialise, width=stage.width, seed=stage.seed, name=stage.net)
    if stage.channels_last:
        net.to(memory_format=cast(Any, torch.channels_last))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=stage.learning_rate, momentum=stage.momentum, weight_decay=stage.weight_decay
    )
    done = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            state = torch.load(Path(saved) / "state.pt", weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["iteration"]
    model = ray.train.torch.prepare_model(net)
    size = max(1, stage.global_batch // world_size)
    images, labels = torch.randn(size, 3, stage.crop, stage.crop), torch.randint(CLASSES, (size,))
    if stage.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    history = HistoryWriter(folder / "history.jsonl", lambda: None)
    if rank == 0:
        with (folder / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": done}) + "\n")
    for iteration in itertools.count(done + 1):
        net.set_draws(stage.seed, iteration, torch.arange(size))
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.precision == "bf16"):
            logits = model(images)
        loss = cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if rank == 0:
            history.add({"iteration": iteration})
        if iteration % config["every"] == 0:
            with tempfile.TemporaryDirectory() as part:
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
                if rank == 0:
                    torch.save(state, Path(part) / "state.pt")
                saved_here = Checkpoint.from_directory(part) if rank == 0 else None
                ray.train.report({"iteration": iteration}, checkpoint=saved_here)


def main() -> None:
    """Runs until it is killed; the same words typed again go on from the newest checkpoint that Ray knows of."""
    parser = argparse.ArgumentParser(description="Bare Ray Train beside vggrow train.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    words = parser.parse_args()
    ray.init(address="local")
    TorchTrainer(
        train,
        train_loop_config={"folder": str(words.folder), "every": words.every},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=words.workers, resources_per_worker={"CPU": words.threads}),
        run_config=RunConfig(
            name="bare", storage_path=str(words.folder / "ray"), failure_config=FailureConfig(max_failures=MAX_FAILURES)
        ),
    ).fit()


if __name__ == "__main__":
    main()
