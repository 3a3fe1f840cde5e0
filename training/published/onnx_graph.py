"""The VGG conv stack at the beginning of an ONNX graph, and the FC layers where they follow at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from training.published.layouts import KERAS, KERAS_LAYER, TORCHVISION, Convention, Found
from vggcore.errors import WeightsError
from vggcore.nets import FC_NAMES, FC_UNITS, GROUP_CHANNELS, NETS, conv_names
from vggcore.recipe import NetName

CHANNELS_FIRST, CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]     # Transpose's perm from (N, H, W, C), and back
UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)   # what onnx and numpy raise then
IGNORED = ("Identity", "Dropout", "Cast")                       # they change no value at inference

POOL: dict[str, list[Any]] = {
    "kernel_shape": [[2, 2]],
    "strides": [[2, 2]],
    "pads": [[0] * 4],
    "dilations": [[1, 1]],
    "ceil_mode": [0],
    "auto_pad": [b"NOTSET", b"VALID"],
}


class Chain:
    """A graph walked from its input, one consumer after another, with the constants that its nodes use."""

    def __init__(self, graph: Any) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.consumers: dict[str, list[Any]] = {}
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants.update((node.output[0], item.t) for item in node.attribute if item.name == "value")
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.inputs = [item.name for item in graph.input if item.name not in self.constants]

    def after(self, name: str) -> Iterator[Any]:
        """The nodes that follow a value, one after another, until the graph forks or ends; nodes without effect left out.

        A cycle, which ONNX forbids, ends it too.
        """
        seen: set[str] = set()
        while name not in seen:
            seen.add(name)
            following = [node for node in self.consumers.get(name, []) if node.op_type not in ("Shape", "Constant")]
            if len(following) != 1 or not following[0].output:
                return
            name = following[0].output[0]
            if following[0].op_type not in IGNORED:
                yield following[0]

    def array(self, name: str) -> np.ndarray | None:
        """A constant's values, bfloat16 as float32; None where the name is not one. Raises ValueError for other kinds."""
        if name not in self.constants:
            return None
        tensor = self.constants[name]
        values: np.ndarray = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.BFLOAT16:
            values = values.astype(np.float32)
        if values.dtype.kind not in "fiub":
            raise ValueError(f"{name[:60]!r} holds {values.dtype}, expected floating-point numbers")
        return values


def read_onnx(file: Path, convention: Convention | None) -> Found:
    """The convs of a graph that begins with a VGG conv stack, under torchvision's names.

    An optional Transpose, then Conv, Relu and MaxPool in Table 1's order; what follows is not used, apart from three FC
    layers of the paper's shapes that follow at once. Keras' convention where the tensors have Keras' names, torchvision's
    where they have torchvision's, and else the one given. Raises WeightsError that names the first node that does not fit.
    """
    try:
        graph = onnx.load(str(file)).graph
    except Exception as error:   # protobuf's, onnx' or the system's, for a file of others
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise WeightsError(f"{file}: not a whole ONNX file ({said}); download or export it again") from error
    try:
        return read_graph(graph, convention, file)
    except UNREADABLE as error:
        said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:120]
        raise WeightsError(
            f"{file}: an ONNX graph that cannot be read ({said}), expected the conv stack of a VGG net; export the net again"
        ) from error


def read_graph(graph: Any, convention: Convention | None, file: Path) -> Found:
    """As read_onnx, from the graph; raises one of UNREADABLE where its nodes or tensors are not as ONNX has them."""
    chain = Chain(graph)
    if len(chain.inputs) != 1:
        raise WeightsError(f"{file}: an ONNX graph with {len(chain.inputs)} inputs, expected 1; give a VGG net")
    nodes = list(chain.after(chain.inputs[0]))
    if nodes and nodes[0].op_type == "Transpose" and attributes(nodes[0]).get("perm") == CHANNELS_FIRST:
        del nodes[0]
    convs, used = conv_stack(chain, nodes, file)
    net = net_of(convs, file)
    tensors: dict[str, torch.Tensor] = {}
    names = []
    flat = [pair for group in convs for pair in group]
    for module, (conv, _kernel) in zip(conv_names(net).values(), flat, strict=True):
        names.append(conv.input[1])
        tensors |= conv_tensors(chain, conv, module, file)
    for module, (weight, bias) in zip(FC_NAMES["paper"], fc_layers(chain, nodes[used:]), strict=False):
        tensors |= {f"{module}.weight": torch.from_numpy(weight), f"{module}.bias": torch.from_numpy(bias)}
    return Found(tensors, convention_of(names, convention, file), net)


def conv_stack(chain: Chain, nodes: list[Any], file: Path) -> tuple[list[list[tuple[Any, int]]], int]:
    """The five groups of convs with the side of each kernel, and how many nodes they and what stands between take."""
    groups: list[list[tuple[Any, int]]] = [[]]
    used = 0
    kinds = [node.op_type for node in nodes] + ["the end of the graph or a fork"] * 2
    while len(groups) < 6:
        if kinds[used : used + 2] == ["Conv", "Relu"]:
            groups[-1].append((nodes[used], conv_kernel(chain, nodes[used], file)))
            used += 2
        elif kinds[used] == "MaxPool" and groups[-1]:
            check_pool(nodes[used], file)
            groups.append([])
            used += 1
        else:
            found = f"a Conv, then {kinds[used + 1]}" if kinds[used] == "Conv" else kinds[used]
            expected = "a Conv, then a Relu" + (", or a MaxPool" if groups[-1] else "")
            raise WeightsError(
                f"{file}: group {len(groups)}, after {len(groups[-1])} convs: found {found}, expected {expected}; the graph"
                " must begin with the conv stack of a VGG net"
            )
    return groups[:5], used


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes by name."""
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def conv_kernel(chain: Chain, node: Any, file: Path) -> int:
    """The side of a conv's kernel, or WeightsError where it is not one of a VGG net: stride 1, same padding, one group."""
    kernel, about = chain.array(node.input[1]) if len(node.input) > 1 else None, attributes(node)
    if kernel is None or kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise WeightsError(f"{file}: {node.name or 'Conv'}: its kernel is not a 4-D constant; export the net for inference")
    side = int(kernel.shape[2])
    padded = about.get("pads", [0] * 4) == [side // 2] * 4 or about.get("auto_pad") in (b"SAME_UPPER", b"SAME_LOWER")
    plain = all(about.get(name, [1, 1]) == [1, 1] for name in ("strides", "dilations")) and about.get("group", 1) == 1
    if side not in (1, 3) or not padded or not plain:
        raise WeightsError(
            f"{file}: {node.name or 'Conv'}: a {side}x{side} conv with strides {about.get('strides')} and pads"
            f" {about.get('pads')}, expected 3x3 or 1x1 of stride 1 that keep the size; the net is not a VGG net"
        )
    return side


def check_pool(node: Any, file: Path) -> None:
    """WeightsError for a pool other than 2x2 of stride 2 that drops what is left at the edges."""
    about = {"dilations": [1, 1], "pads": [0] * 4, "ceil_mode": 0, "auto_pad": b"NOTSET"} | attributes(node)
    for name, expected in POOL.items():
        if about.get(name) not in expected:
            raise WeightsError(
                f"{file}: {node.name or 'MaxPool'}: expected a 2x2 max pool of stride 2, got {name} {about.get(name)}; the net"
                " is not a VGG net"
            )


def net_of(convs: list[list[tuple[Any, int]]], file: Path) -> NetName:
    """The net with these convs in its groups; C has a 1x1 kernel third."""
    counts = tuple(len(group) for group in convs)
    for net, config in NETS.items():
        kernels = [config.third_conv_kernel if count == 3 else 3 for count in config.convs]
        if config.convs == counts and not config.lrn and [group[-1][1] for group in convs] == kernels:
            return net
    known = ", ".join(f"{net} {config.convs}" for net, config in NETS.items() if not config.lrn)
    raise WeightsError(f"{file}: {counts} convs in the five groups; expected those of Table 1: {known}")


def conv_tensors(chain: Chain, conv: Any, module: str, file: Path) -> dict[str, torch.Tensor]:
    """A conv's kernel (out, in, height, width) and bias, under the module's name."""
    kernel = chain.array(conv.input[1])
    bias = chain.array(conv.input[2]) if len(conv.input) > 2 else None
    if kernel is None or bias is None:
        raise WeightsError(f"{file}: {conv.name or 'Conv'}: its kernel or bias is not a constant; export the net for inference")
    return {f"{module}.weight": torch.from_numpy(kernel.copy()), f"{module}.bias": torch.from_numpy(bias.copy())}


def convention_of(names: list[str], given: Convention | None, file: Path) -> Convention:
    """Keras' or torchvision's, by the names of the kernels; the one given for a file whose names do not say."""
    if all(KERAS_LAYER.search(name) for name in names):
        found = KERAS
    elif all("features." in name and name.endswith(".weight") for name in names):
        found = TORCHVISION
    elif given is None:
        raise WeightsError(
            f"{file}: its kernels' names ({names[0][:60]!r} first) do not show whether it takes pictures as Keras or as"
            " torchvision does; name it by --convention keras or --convention torchvision"
        )
    else:
        return given
    if given is not None:
        raise WeightsError(f"{file}: --convention has no effect: the names of the kernels show it; leave it out")
    return found


def fc_layers(chain: Chain, nodes: list[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights (out, in) and biases of three FC layers that follow at once; none where they are not the paper's."""
    rows_first = bool(nodes) and nodes[0].op_type == "Transpose" and attributes(nodes[0]).get("perm") == CHANNELS_LAST
    nodes = nodes[1:] if rows_first else nodes
    while nodes and nodes[0].op_type == "AveragePool" and attributes(nodes[0]).get("kernel_shape") == [1, 1]:
        nodes = nodes[1:]                                          # torchvision's adaptive pool where it has nothing to do
    if not nodes or nodes[0].op_type not in ("Flatten", "Reshape"):
        return []
    found: list[tuple[np.ndarray, np.ndarray]] = []
    place = 1
    while len(found) < 3:
        layer, place = linear_layer(chain, nodes, place)
        if layer is None:
            return []
        found.append(layer)
        if len(found) < 3:
            if place >= len(nodes) or nodes[place].op_type != "Relu":
                return []
            place += 1
    shapes = [weight.shape for weight, _ in found]
    side = round((shapes[0][1] / GROUP_CHANNELS[-1]) ** 0.5)
    inputs = GROUP_CHANNELS[-1] * side**2
    if shapes != [(FC_UNITS, inputs), (FC_UNITS, FC_UNITS), (shapes[2][0], FC_UNITS)]:
        return []
    if rows_first:                                                 # from row, column, channel to channel, row, column
        first = found[0][0].reshape(FC_UNITS, side, side, -1).transpose(0, 3, 1, 2).reshape(FC_UNITS, inputs)
        found[0] = (np.ascontiguousarray(first), found[0][1])
    if place < len(nodes) and nodes[place].op_type not in ("Softmax", "LogSoftmax"):
        return []                                                  # more layers follow: the third is not the last
    return found


def linear_layer(chain: Chain, nodes: list[Any], place: int) -> tuple[tuple[np.ndarray, np.ndarray] | None, int]:
    """The weights (out, in) and bias at nodes[place] (Gemm, or MatMul and Add), and the place after it."""
    node = nodes[place] if place < len(nodes) else None
    if node is not None and node.op_type == "Gemm" and len(node.input) == 3:
        about = attributes(node)
        weight, bias = chain.array(node.input[1]), chain.array(node.input[2])
        plain = about.get("alpha", 1.0) == 1.0 and about.get("beta", 1.0) == 1.0 and not about.get("transA", 0)
        if weight is not None and weight.ndim == 2 and bias is not None and bias.ndim == 1 and plain:
            weight = weight if about.get("transB", 0) else weight.T
            return (np.array(weight, order="C"), bias.copy()), place + 1
    if node is not None and node.op_type == "MatMul" and place + 1 < len(nodes) and nodes[place + 1].op_type == "Add":
        weight = chain.array(node.input[1])
        bias = next((array for name in nodes[place + 1].input if (array := chain.array(name)) is not None), None)
        if weight is not None and bias is not None and weight.ndim == 2 and bias.ndim == 1:
            return (np.array(weight.T, order="C"), bias.copy()), place + 2
    return None, place
