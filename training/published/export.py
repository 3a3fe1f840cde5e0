"""Published weights for other programs: files in torchvision's, Keras' and our own layout."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from training.published.layouts import KERAS, LAYOUTS, TORCHVISION, Convention, from_rgb_levels
from training.published.readers import OWN_KEY, first_line, needs
from vggcore.errors import StoreError, WeightsError
from vggcore.nets import FC_NAMES, STRIDE, conv_names
from vggcore.published import FC_LAYERS, PublishedWeights, mean_text
from vggcore.whole_file import check_target, whole_file

Format = Literal["vggrow", "torchvision", "keras"]
FORMATS: tuple[Format, ...] = get_args(Format)
ENDINGS: dict[Format, tuple[str, ...]] = {
    "vggrow": (".safetensors",),
    "torchvision": (".pth", ".safetensors"),
    "keras": (".h5", ".safetensors"),
}


def check_export(record: PublishedWeights, file: Path, format: Format) -> None:
    """Raises WeightsError where the weights cannot be written in this format, StoreError where the file is there already."""
    if file.suffix not in ENDINGS[format]:
        raise WeightsError(f"{file}: expected a name that ends in {' or '.join(ENDINGS[format])} for --format {format}")
    if not os.path.isdir(file.absolute().parent):  # noqa: PTH112 (a name too long is no folder, and no error yet)
        raise StoreError(f"{file}: its folder does not exist; make it, or name another")
    if os.path.lexists(file):
        raise StoreError(f"{file}: exists already; name another file, or remove it first")
    check_target(file)
    if record.net == "A-LRN" and format != "vggrow":
        whose = "Keras'" if format == "keras" else "torchvision's"
        raise WeightsError(f"{record.name}: net A-LRN cannot be written in {whose} layout; use --format vggrow")
    if file.suffix == ".pth" and record.mean != TORCHVISION.mean:
        raise WeightsError(
            f"{file}: the weights' mean is {mean_text(record.mean)}, which a .pth file cannot hold and torchvision's"
            f" preprocessing does not subtract ({mean_text(TORCHVISION.mean)}); name a .safetensors file"
        )


def export_weights(record: PublishedWeights, tensors: dict[str, Tensor], file: Path, *, format: Format) -> str:
    """Writes the file, whole or not at all; says how a net with it takes pictures. Raises as check_export, StoreError."""
    check_export(record, file, format)
    convention = convention_for(record, format)
    layout = LAYOUTS["torchvision" if format == "vggrow" else format]
    modules = conv_names(record.net) | dict(zip(FC_LAYERS, FC_NAMES["paper"], strict=True))
    side = (record.crop or 0) // STRIDE
    found: dict[str, Tensor] = {}
    for name, slot in layout.names(record.net, False).items():
        layer, part = slot
        if layer in record.layers:
            tensor = tensors[f"{modules[layer]}.{part}"]
            if slot == ("conv1_1", "weight"):
                tensor = from_rgb_levels(tensor.double(), convention).to(torch.float32)
            found[name] = layout.into(slot, tensor, side).contiguous()
    about = json.dumps(
        {
            "name": record.name, "net": record.net, "classes": record.classes, "licence": record.licence,
            "origin": record.origin, "bgr": convention.bgr, "mean": convention.mean, "deviation": convention.deviation,
            "digest": record.digest if format == "vggrow" else None,
        }
    )  # fmt: skip
    write = {".safetensors": write_safetensors, ".pth": write_pytorch, ".h5": write_keras}[file.suffix]
    if write is write_keras:
        needs("h5py", file)
    write_whole(write, found, about, file)
    return how_to_use(convention)


Write = Callable[[dict[str, Tensor], str, Path], None]


def write_whole(write: Write, tensors: dict[str, Tensor], about: str, file: Path) -> None:
    """Writes the file, whole or not at all. Raises StoreError where it cannot be written, whatever the library raises then."""
    try:
        with whole_file(file) as unfinished:
            write(tensors, about, unfinished)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{file}: cannot be written ({why(error)}); make room, or name a file elsewhere") from error


def why(error: BaseException) -> str:
    """What the system said, where the error or one before it has its number; else the library's first line."""
    cause: BaseException | None = error
    while cause is not None:
        number = getattr(cause, "errno", None)
        if number:
            return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return first_line(str(error))


def convention_for(record: PublishedWeights, format: Format) -> Convention:
    """The format's own, but for the mean: another would change what the net sees at the borders of a picture."""
    if format == "vggrow":
        return Convention(bgr=False, mean=record.mean, deviation=None)
    kind = TORCHVISION if format == "torchvision" else KERAS
    return Convention(bgr=kind.bgr, mean=record.mean, deviation=kind.deviation)


def how_to_use(convention: Convention) -> str:
    """What must be done to a picture, in one line."""
    if convention.deviation is not None:
        mean = ", ".join(f"{level / 255:.6g}" for level in convention.mean)
        deviation = ", ".join(f"{level / 255:.6g}" for level in convention.deviation)
        return f"pictures: RGB, 0..1, less ({mean}), divided by ({deviation})"
    order, levels = ("BGR", convention.mean[::-1]) if convention.bgr else ("RGB", convention.mean)
    return f"pictures: {order}, 0..255, less ({', '.join(f'{level:g}' for level in levels)})"


def write_safetensors(tensors: dict[str, Tensor], about: str, path: Path) -> None:
    """A safetensors file with what it says of itself in its metadata."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt", OWN_KEY: about})
    path.chmod(mode)      # safetensors 0.8 leaves 0600, whatever the umask


def write_pytorch(tensors: dict[str, Tensor], _about: str, path: Path) -> None:
    """A state dict as torchvision publishes them."""
    with path.open("wb") as opened:      # with a path torch hides what the system said behind "unexpected pos"
        torch.save(tensors, opened)


def write_keras(tensors: dict[str, Tensor], about: str, path: Path) -> None:
    """Keras' weights file as its applications publish them: a group a layer, the order of both in attributes."""
    import h5py

    layers = list(dict.fromkeys(name.partition("/")[0] for name in tensors))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.array(layers, "S")
        file.attrs["backend"] = b"tensorflow"
        file.create_dataset(OWN_KEY, data=about)      # an attribute holds at most 64 KB
        for layer in layers:
            group = file.create_group(layer)
            names = [f"{layer}_W_1:0", f"{layer}_b_1:0"]
            group.attrs["weight_names"] = np.array(names, "S")
            for name, part in zip(names, ("kernel", "bias"), strict=True):
                group.create_dataset(name, data=tensors[f"{layer}/{part}"].numpy())
