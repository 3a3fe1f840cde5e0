"""The last layer's rows for classes that a stage's parent does not know, set from what the parent's net sees of them."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.loader import TestLoader
from pipelines.manifest import Pictures, read_manifest
from training.stage_job import StageJob
from training.store import Store
from vggcore.nets import Vgg
from vggcore.new_rows import mean_rows
from vggcore.transfer import last_layer

MOST_NEW = 64        # pictures of each new class, and
MOST_OLD = 2048      # of all old ones together, that the means are taken of: less than a third of an epoch's work
BATCH_PIXELS = 2**22     # pixels a forward pass, as in training.evaluate


def set_new_rows(net: Vgg, job: StageJob, device: torch.device) -> None:
    """Sets the rows of the last layer of `net` that its parent did not give, in place; see vggcore.new_rows.

    The same in every worker: the means are of the same pictures, centre crops as in validation, in one order. Raises
    DatasetError for a picture that cannot be read any more.
    """
    assert job.parent is not None and job.parent.added
    old = len(job.classes) - len(job.parent.added)
    layer = net.get_submodule(last_layer(job.stage))
    assert isinstance(layer, nn.Linear)
    pictures = chosen(read_manifest(Store(job.store).data(job.fingerprint)).in_order(job.classes).split("train"), old)
    weight, bias = (values.detach()[:old].double().cpu() for values in (layer.weight, layer.bias))
    sums, counts = torch.zeros(len(job.classes), layer.in_features, dtype=torch.float64), np.bincount(pictures.labels)
    for inputs, labels in layer_inputs(net, layer, job, pictures, device):
        sums.index_add_(0, labels, inputs)
    some = int(counts[:old].sum())
    own = float((weight * sums[:old]).sum() + bias @ torch.from_numpy(counts[:old]).double()) / some
    means = sums[old:] / torch.from_numpy(counts[old:, None])
    rows, biases = mean_rows(weight, bias, centre=sums[:old].sum(0) / some, own=own, means=means)
    with torch.no_grad():
        layer.weight[old:].copy_(rows)
        layer.bias[old:].copy_(biases)


def chosen(train: Pictures, old: int) -> Pictures:
    """The pictures that means are taken of, those first whose content's digest is lowest; old: how many classes are old."""
    order = np.argsort(train.contents.astype(str), kind="stable")
    labels = train.labels[order]
    rows: list[NDArray[np.int64]] = [order[labels < old][:MOST_OLD]]
    rows += [order[labels == label][:MOST_NEW] for label in range(old, int(labels.max()) + 1)]
    return train.some(np.sort(np.concatenate(rows)))


@torch.inference_mode()
def layer_inputs(
    net: Vgg, layer: nn.Linear, job: StageJob, pictures: Pictures, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `layer` sees of each picture, (n, F) float64, and labels (n,), on the CPU, batch by batch; without dropout."""
    stage, seen = job.stage, []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().cpu()))
    loader = TestLoader(
        pictures, job.colour, standardise=stage.standardise, device=str(device), threads=job.threads, view=stage.view
    )
    net.eval()
    try:
        for images, labels, _ in loader.centre(stage.middle_scale, stage.crop, max(1, BATCH_PIXELS // stage.crop**2)):
            net(images)
            yield seen.pop(), labels.cpu()
    finally:
        hook.remove()
        loader.close()
