"""Weights on disk: safetensors files, whole or not at all, no pickle."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vggcore.errors import StoreError
from vggcore.whole_file import whole_file


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Writes a state dict to `path` from any device and memory format; the folder is made if absent.

    Raises StoreError when the file cannot be written: no space, no permission.
    """
    # safetensors refuses tensors that are not contiguous in their logical order, channels_last ones among them.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        with whole_file(path) as part:
            part.touch()
            mode = part.stat().st_mode
            save_file(tensors, part, metadata={"format": "pt"})
            part.chmod(mode)   # safetensors 0.8 leaves 0600, whatever the umask: a shared store's weights for one user
    except SafetensorError as error:
        raise StoreError(f"{path}: weights cannot be written ({error}); make room, or use another store") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, on the CPU; StoreError when it is absent, cut short or something else."""
    if not path.is_file():
        raise StoreError(f"{path}: no such file of weights; train the stage again, or give the folder that holds it")
    try:
        state: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path}: not a whole safetensors file ({error}); remove it and train the stage again, or bring it anew"
        ) from error
    return state


def load_some(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Some tensors of a safetensors file, by the names that they are to have, each with its name in the file.

    Raises StoreError when the file is absent, cut short or something else, or lacks one of them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            absent = sorted(set(names.values()) - set(file.keys()))
            if absent:
                raise StoreError(f"{path}: {len(absent)} weights are missing, the first is {absent[0]}")
            return {name: file.get_tensor(source) for name, source in names.items()}
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: not a whole safetensors file ({error}); remove it, and train or import again") from error


def load_into(net: nn.Module, path: Path) -> None:
    """Sets every weight of `net` from a safetensors file, in place.

    Raises StoreError, and changes nothing, unless the file has exactly the net's names and shapes.
    """
    state, wanted = load_weights(path), net.state_dict()
    advice = "are net, head, width, crop and classes those it was trained with?"
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise StoreError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]}; {advice}")
    unknown = sorted(state.keys() - wanted.keys())
    if unknown:
        raise StoreError(f"{path}: {len(unknown)} weights are unknown to this net, the first is {unknown[0]}; {advice}")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            found, shape = tuple(state[name].shape), tuple(tensor.shape)
            raise StoreError(f"{path}: {name} is {found}, wanted {shape}; {advice}")
    net.load_state_dict(state)
