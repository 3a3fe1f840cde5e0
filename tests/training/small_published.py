"""Published weights for tests, written to a store as an import leaves them: a net of the paper's width with He weights."""

from functools import cache

import torch
from torch import Tensor

from training.store import Store
from vggcore.initialise import initialise_net
from vggcore.nets import build_net, conv_names
from vggcore.published import FC_LAYERS, PublishedWeights, weights_digest
from vggcore.recipe import Features, NetName
from vggcore.weights import save_weights
from vggcore.whole_file import write_text

MEAN = (123.68, 116.779, 103.939)


@cache
def published_tensors(net: NetName = "A", *, fc: bool = False, seed: int = 1) -> dict[str, Tensor]:
    """The convs of a net, with small biases that are not 0; with fc its FC layers at crop 32 for five classes too."""
    whole = build_net(net, classes=5, crop=32, head="paper" if fc else "linear", features=Features(groups=(5,)))
    initialise_net(whole, "he", width=1.0, seed=seed, name=net)
    state = {name: tensor for name, tensor in whole.state_dict().items() if fc or name.startswith("features")}
    generator = torch.Generator().manual_seed(seed)
    # The first conv's kernels are for pixels of 0..255: like those of published nets their sums are of the order of 1.
    state["features.0.weight"] = state["features.0.weight"] / 60
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 if name.endswith("bias") else tensor
        for name, tensor in state.items()
    }


def publish(store: Store, name: str = "small/a", *, net: NetName = "A", fc: bool = False, seed: int = 1) -> PublishedWeights:
    """Puts such weights into a store under a name; with fc for five classes at crop 32."""
    tensors = published_tensors(net, fc=fc, seed=seed)
    layers = (*conv_names(net), *(FC_LAYERS if fc else ()))
    classes = tuple(f"class {number}" for number in range(5)) if fc else None
    record = PublishedWeights(
        name=name,
        digest=weights_digest(net=net, layers=layers, tensors=tensors, mean=MEAN, classes=classes),
        net=net,
        layers=layers,
        classes=classes,
        outputs=5 if fc else None,
        crop=32 if fc else None,
        mean=MEAN,
        licence=None,
        origin="made by a test",
        source="test",
        source_digest="0" * 32,
        imported_at="2026-11-29T00:00:00Z",
    )
    folder = store.weights / record.digest
    save_weights(tensors, folder / "model.safetensors")
    write_text(folder / "weights.json", record.model_dump_json())
    return record
