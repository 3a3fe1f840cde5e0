"""Files of weights, by their content: PyTorch, safetensors, Keras' HDF5, ONNX; a folder of ours; each read to `Found`."""

import importlib.util
import json
import math
import os
import stat
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.published.layouts import KERAS_LAYER, Convention, Found
from vggcore.errors import WeightsError
from vggcore.nets import conv_names
from vggcore.published import PublishedWeights
from vggcore.recipe import NetName

OWN_KEY = "vggrow"       # in a file of `weights export`: what a PublishedWeights says, as JSON
WEIGHTS_FILE, RECORD_FILE, PACKAGE_FILE = "model.safetensors", "weights.json", "model.json"
CHECKPOINT_FILE, STAGE_FILE = "progress.json", "stage.json"      # beside a checkpoint's weights; two folders above them
NESTED = ("state_dict", "model_state_dict", "model")     # where training scripts put a net's weights
LARGEST = 8 * 10**9      # bytes; E with its optimizer's state in float64 has 3.4e9. Others would fill the memory first
KERAS_ADVICE = "save the net by model.save('vgg.h5') and import that file"
STATE_DICT = (
    "expected a state dict (tensors alone) as torch.save writes it, and a pickle that could run code is not read; save the"
    " net's state_dict() with torch.save"
)
ADVICE = "give a file of VGG weights: PyTorch's .pth, .safetensors, Keras' .h5 or .onnx"


def read_source(file: Path, convention: Convention | None = None) -> Found:
    """What a file of file_to_read holds: weights, those of a package, or those of an entry of a store.

    convention: how the net takes pictures, for an ONNX file whose names do not say. Raises WeightsError for anything
    else: empty, a web page, a pickle of something else, cut short.
    """
    beside = {name for name in (RECORD_FILE, PACKAGE_FILE) if (file.parent / name).exists()}
    if in_checkpoint(file):
        raise WeightsError(
            f"{file}: a checkpoint of a stage, which does not say its mean; start from it with init_from = 'stage:<key>', or"
            " give the stage's package (STORE/packages/<key>)"
        )
    if file.name == WEIGHTS_FILE and beside:
        return read_own(file, beside)
    head = first_bytes(file)
    if head.startswith(b"\x08"):
        needs("onnx", file)
        from training.published.onnx_graph import read_onnx

        return read_onnx(file, convention)
    if convention is not None:
        raise WeightsError(f"{file}: --convention has no effect: only an ONNX file may not show its own; leave it out")
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return read_keras(file)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return read_safetensors(file)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return read_pytorch(file)
    raise WeightsError(f"{file}: {kind_of(head)}; {ADVICE}")


def in_checkpoint(file: Path) -> bool:
    """Whether the file is of a stage's checkpoint: STORE/stages/<key>/checkpoints/iteration-<n>/."""
    folder = file.absolute().parent
    marks = (folder / CHECKPOINT_FILE, folder.parent.parent / STAGE_FILE)
    return folder.name.startswith("iteration-") and any(mark.exists() for mark in marks)


def file_to_read(path: Path) -> Path:
    """The regular file that a source means: itself, or model.safetensors of a package's or a store's folder.

    Raises WeightsError for what is absent, another folder, or a special file.
    """
    try:
        about = path.stat()
    except (OSError, ValueError) as error:      # ValueError: a NUL in the name
        what = getattr(error, "strerror", None) or error
        if os.path.islink(path):  # noqa: PTH114 (also where its folder may not be read)
            what = f"a link that leads to no file ({what})"
        raise WeightsError(f"{str(path)!r}: cannot be read: {what}; {ADVICE}") from error
    if stat.S_ISDIR(about.st_mode):
        if not (path / WEIGHTS_FILE).is_file() or not ((path / RECORD_FILE).exists() or (path / PACKAGE_FILE).exists()):
            raise WeightsError(f"{path}: a folder without {WEIGHTS_FILE} and {PACKAGE_FILE} or {RECORD_FILE}; {ADVICE}")
        return path / WEIGHTS_FILE
    if not stat.S_ISREG(about.st_mode):
        raise WeightsError(f"{path}: not a regular file; {ADVICE}")
    if about.st_size > LARGEST:
        raise WeightsError(f"{path}: {about.st_size / 1e9:,.0f} GB, more than any checkpoint of a VGG net; {ADVICE}")
    return path


def first_bytes(file: Path) -> bytes:
    """The file's first 512 bytes."""
    try:
        with file.open("rb") as opened:
            return opened.read(512)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}); make it readable") from error


def kind_of(head: bytes) -> str:
    """What a file that is not weights seems to be."""
    start = head.lstrip().lower()
    if not head:
        return "an empty file (0 bytes)"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights (a download link's page, or a log-in page)"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run git lfs pull)"
    return f"not a file of weights (it begins with {head[:12]!r})"


def needs(library: str, file: Path) -> None:
    """WeightsError where the library that reads this kind of file is not installed."""
    if importlib.util.find_spec(library) is None:
        raise WeightsError(f"{file}: reading it needs the package {library}; run pip install 'vggrow[weights]'")


def read_pytorch(file: Path) -> Found:
    """A state dict saved by torch.save; read with weights_only, so that no code in it runs."""
    check_archive(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:   # torch raises what its reader happens to meet in a file of others: a dozen kinds
        raise WeightsError(f"{file}: {what_torch_refused(error)}") from error
    return Found(tensors_of(held, file))


def what_torch_refused(error: Exception) -> str:
    """What a file is that torch.load does not read, and what to do; torch's own advice is to let the file run code."""
    said = str(error)
    if "GLOBAL" in said:                # "Unsupported global: GLOBAL ...": a class or a function
        return "a pickle that holds more than tensors, which could run code; save its state_dict() with torch.save"
    if "TorchScript" in said:
        return f"a TorchScript archive, {STATE_DICT}"
    if said.startswith("Weights only load failed"):
        return f"not a whole PyTorch file, {STATE_DICT}"
    return f"not a whole PyTorch file ({first_line(said) or type(error).__name__}); download or save it again"


def check_archive(file: Path) -> None:
    """WeightsError for the zip of Keras 3, and for one whose parts are not what was written: torch.load reads those too."""
    try:
        with zipfile.ZipFile(file) as archive:
            if "model.weights.h5" in archive.namelist():
                raise WeightsError(f"{file}: Keras' .keras format; {KERAS_ADVICE}")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError):      # torch's older format, or cut short: torch.load says what it is
        return
    except (RuntimeError, NotImplementedError, EOFError, zlib.error) as error:      # locked, or of a packer unknown here
        raise WeightsError(f"{file}: a zip that cannot be read ({first_line(str(error))}), {STATE_DICT}") from error
    if damaged is not None:
        raise WeightsError(f"{file}: damaged: its part {damaged[:80]!r} is not what was written; download or save it again")


def first_line(text: str) -> str:
    """The first line of a library's message, at most 120 characters of it."""
    return (text.strip().splitlines() or [""])[0][:120]


def tensors_of(held: Any, file: Path) -> dict[str, Tensor]:
    """The tensors by name in what torch.load gave."""
    for key in NESTED:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
            break
    if isinstance(held, Mapping) and not held:
        raise WeightsError(f"{file}: an empty state dict (0 tensors); {ADVICE}")
    if not isinstance(held, Mapping) or not all(isinstance(name, str) for name in held):
        raise WeightsError(f"{file}: holds {type(held).__name__}, not a state dict (tensors by name); {ADVICE}")
    others = [name for name, value in held.items() if not isinstance(value, Tensor)]
    if others:
        found = type(held[others[0]]).__name__
        raise WeightsError(f"{file}: {others[0][:80]!r} is {found}, expected a tensor; save the net's state_dict() alone")
    return {name: tensor.detach() for name, tensor in held.items()}      # a Parameter's values


def read_safetensors(file: Path) -> Found:
    """A safetensors file in any layout; one of `weights export` says its own convention."""
    if os.fsencode(file).decode("utf-8", "ignore") != str(file):
        raise WeightsError(f"{str(file)!r}: its path is not UTF-8, which safetensors cannot open; rename the file")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: not a whole safetensors file ({first_line(str(error))}); bring it again") from error
    return own_found(tensors, metadata.get(OWN_KEY), file)


def own_found(tensors: dict[str, Tensor], about: str | None, file: Path) -> Found:
    """The tensors with what `weights export` wrote beside them, where it did."""
    if about is None:
        return Found(tensors)
    try:
        said = json.loads(about)
        convention = convention_said(said["bgr"], said["mean"], said["deviation"])
        classes = None if said["classes"] is None else texts(said["classes"])
        net = one_of_nets(said["net"])
        licence, origin, name, digest = (text_or_none(said[key]) for key in ("licence", "origin", "name", "digest"))
        return Found(tensors, convention, net, classes, licence, origin, name, digest)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        wrong = first_line(f"no {error}" if isinstance(error, KeyError) else str(error))
        raise WeightsError(
            f"{file}: its metadata {OWN_KEY!r} is not that of `vggrow weights export` ({wrong}); export again"
        ) from error


def convention_said(bgr: Any, mean: Any, deviation: Any) -> Convention:
    """How a net takes pictures, from JSON; ValueError where no net can take them so."""
    if not isinstance(bgr, bool):
        raise ValueError(f"bgr is {bgr!r}, expected true or false")
    levels, divisors = rgb(mean), None if deviation is None else rgb(deviation)
    if not all(0 <= level <= 255 for level in levels):
        raise ValueError(f"mean is {mean}, expected levels of 0..255")
    if divisors is not None and min(divisors) <= 0:
        raise ValueError(f"deviation is {deviation}, expected numbers above 0")
    return Convention(bgr=bgr, mean=levels, deviation=divisors)


def texts(values: Any) -> tuple[str, ...]:
    """A list's texts, or ValueError."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("classes are not a list of texts")
    return tuple(values)


def text_or_none(value: Any) -> str | None:
    """The text, or ValueError for anything but one or none."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def rgb(values: Any) -> tuple[float, float, float]:
    """Three finite numbers, or ValueError."""
    red, green, blue = (float(value) for value in values)
    if not all(math.isfinite(level) for level in (red, green, blue)):
        raise ValueError(f"{values} are not finite")
    return red, green, blue


def one_of_nets(name: Any) -> NetName:
    """The net of this name, or ValueError."""
    for net in get_args(NetName):
        if net == name:
            return net  # type: ignore[no-any-return]
    raise ValueError(f"no net {name!r}")


def read_keras(file: Path) -> Found:
    """Keras' HDF5: a weights file, or a whole model's, whose weights stand in the group model_weights."""
    needs("h5py", file)
    import h5py

    tensors: dict[str, Tensor] = {}

    def take(path: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape and path != OWN_KEY:
            layer = next((part for part in path.split("/") if KERAS_LAYER.search(part)), None)
            name = path if layer is None else f"{layer}/{path.rsplit('/', 1)[-1]}"
            if name in tensors:
                raise WeightsError(f"{file}: two tensors {name!r}; give a file of one net")
            tensors[name] = numbers_in(item, path, file)

    try:
        with h5py.File(file, "r") as opened:
            own, nested = opened.get(OWN_KEY), opened.get("model_weights")
            about = own.asstr()[()] if isinstance(own, h5py.Dataset) and own.shape == () else None
            (nested if isinstance(nested, h5py.Group) else opened).visititems(take)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{file}: not a whole HDF5 file ({first_line(str(error))}); download or save it again") from error
    if any(name.startswith("layers/") for name in tensors):
        raise WeightsError(f"{file}: Keras 3's .weights.h5, which does not name its layers; {KERAS_ADVICE}")
    return own_found(tensors, about, file)


def numbers_in(dataset: Any, path: str, file: Path) -> Tensor:
    """A dataset's numbers in this machine's byte order. Raises WeightsError for texts, records and the like."""
    if dataset.dtype.kind not in "fiub" or dataset.dtype.itemsize > 8:
        kind = "texts" if dataset.dtype.kind in "OS" else f"{str(dataset.dtype)[:60]} values"
        raise WeightsError(f"{file}: {path[:80]!r} holds {kind}, expected floating-point numbers; {KERAS_ADVICE}")
    values = dataset[()]
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))


def read_own(file: Path, beside: set[str]) -> Found:
    """model.safetensors with its weights.json or model.json beside it: an entry of a store, or a package."""
    found = read_safetensors(file)
    if RECORD_FILE in beside:
        return own_entry(file, found.tensors)
    return read_package(file, found.tensors)


def own_entry(file: Path, tensors: Mapping[str, Tensor]) -> Found:
    """An entry of a store, from its weights.json."""
    place = file.parent / RECORD_FILE
    try:
        record = PublishedWeights.model_validate_json(place.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{place}: not the record of published weights of vggrow; give another folder") from error
    return Found(
        tensors,
        Convention(bgr=False, mean=record.mean, deviation=None),
        record.net,
        record.classes,
        record.licence,
        record.origin,
        record.name,
        record.digest,
    )


def read_package(file: Path, tensors: Mapping[str, Tensor]) -> Found:
    """A package of ours, from its model.json: the convs, and the FC layers of the paper's head."""
    place = file.parent / PACKAGE_FILE
    try:
        model = json.loads(place.read_text(encoding="utf-8"))
        net, width, head = one_of_nets(model["net"]), model["stage"]["width"], model["stage"]["head"]
        convention, classes = convention_said(False, model["mean"], model["deviation"]), texts(model["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{place}: not the model.json of a package of vggrow; give another folder") from error
    if width != 1:
        raise WeightsError(f"{place}: the net's width is {width}, expected 1; start from it with init_from = 'stage:<key>'")
    if head != "paper":
        convs = set(conv_names(net).values())
        kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in convs}
        return Found(kept, convention, net)
    return Found(tensors, convention, net, classes)
