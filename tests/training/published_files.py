"""Files of VGG weights as their publishers write them, with random values: for the tests of published weights."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import onnx
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

NETS = {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}


def torchvision_net(name: str, *, classes: int = 1000, seed: int = 1) -> nn.Module:
    """torchvision's module in eval mode with random weights, biases and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(num_classes=classes)
    net = net.to_empty(device="cpu").eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan = module.weight[0].numel()
            bound = (6 / fan) ** 0.5                 # He's, uniform: four times as fast as normal draws
            module.weight.data.uniform_(-bound, bound, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.num_batches_tracked.fill_(7)
    return net


def convs(net: str = "A", *, seed: int = 1) -> dict[str, Tensor]:
    """torchvision's features alone: the convs of net A, B, D or E."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = getattr(torchvision.models, NETS[net])().features.state_dict()
    return {f"features.{name}": torch.randn(meta.shape, generator=generator) * 0.05 for name, meta in shapes.items()}


def with_head(state: dict[str, Tensor], *, classes: int = 5, side: int = 1, seed: int = 2) -> dict[str, Tensor]:
    """FC layers added, for a feature map of side x side places."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0": (4096, 512 * side**2), "3": (4096, 4096), "6": (classes, 4096)}
    head = {f"classifier.{at}.weight": torch.randn(shape, generator=generator) * 0.01 for at, shape in shapes.items()}
    head |= {f"classifier.{at}.bias": torch.randn(shape[:1], generator=generator) * 0.1 for at, shape in shapes.items()}
    return state | head


def as_timm(state: dict[str, Tensor], *, side: int = 1) -> dict[str, Tensor]:
    """timm's names: FC1 and FC2 as convs of the pre-logits."""
    names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    found = {}
    for name, tensor in state.items():
        module, part = name.rsplit(".", 1)
        if part == "weight" and module in ("classifier.0", "classifier.3"):
            kernel = side if module == "classifier.0" else 1
            tensor = tensor.reshape(4096, -1, kernel, kernel)
        found[f"{names.get(module, module)}.{part}"] = tensor
    return found


def as_keras(state: dict[str, Tensor], *, side: int = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Keras' layers with (kernel, bias): HWIO and BGR, FC1's inputs in the order row, column, channel."""
    layers = {}
    group = number = 1
    convs_of = sorted({int(name.split(".")[1]) for name in state if name.startswith("features.")})
    for place, index in enumerate(convs_of):
        kernel = state[f"features.{index}.weight"].numpy().transpose(2, 3, 1, 0)
        if place == 0:
            kernel = kernel[:, :, ::-1]
        layers[f"block{group}_conv{number}"] = (np.ascontiguousarray(kernel), state[f"features.{index}.bias"].numpy())
        pooled = place + 1 < len(convs_of) and convs_of[place + 1] - index == 3
        group, number = (group + 1, 1) if pooled else (group, number + 1)
    for at, name in (("0", "fc1"), ("3", "fc2"), ("6", "predictions")):
        if f"classifier.{at}.weight" in state:
            weight = state[f"classifier.{at}.weight"].numpy()
            if name == "fc1":
                weight = weight.reshape(4096, 512, side, side).transpose(0, 2, 3, 1).reshape(4096, -1)
            layers[name] = (np.ascontiguousarray(weight.T), state[f"classifier.{at}.bias"].numpy())
    return layers


def write_keras(path: Path, layers: dict[str, tuple[np.ndarray, np.ndarray]], *, kind: str) -> Path:
    """A weights file of Keras 1 (kind "applications") or 2 ("weights"), or a whole model's ("model")."""
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if kind == "model" else file
        if kind == "model":
            file.attrs["model_config"] = "{}"
            file.create_group("optimizer_weights").create_dataset("iteration:0", data=np.int64(7))
        root.attrs["layer_names"] = [name.encode() for name in ["input_1", *layers, "block1_pool"]]
        for name in ("input_1", "block1_pool"):
            root.create_group(name).attrs["weight_names"] = np.array([], "S1")
        for name, (kernel, bias) in layers.items():
            names = (f"{name}_W_1:0", f"{name}_b_1:0") if kind == "applications" else (f"{name}/kernel:0", f"{name}/bias:0")
            group = root.create_group(name)
            group.attrs["weight_names"] = [one.encode() for one in names]
            for one, values in zip(names, (kernel, bias), strict=True):
                group.create_dataset(one, data=values)
    return path


def write_onnx(
    path: Path,
    state: dict[str, Tensor],
    *,
    side: int = 1,
    keras_names: bool = False,
    anonymous: bool = False,
    constants: bool = False,
    transposed: bool = False,
    more: Callable[[list[onnx.NodeProto]], None] = lambda nodes: None,
) -> Path:
    """A graph of torchvision's layers; keras_names, transposed: as tf2onnx writes Keras' (kernels still as given)."""
    nodes: list[onnx.NodeProto] = []
    initializers: list[TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        if constants:
            nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            initializers.append(tensor)
        return name

    last = "input"

    def node(kind: str, *inputs: str, **attributes: object) -> None:
        nonlocal last
        output = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, [last, *inputs], [output], name=f"node_{output}", **attributes))
        last = output

    if transposed:
        node("Transpose", perm=[0, 3, 1, 2])
    keras = list(as_keras({name: value for name, value in state.items() if name.startswith("features.")}))
    indices = sorted({int(name.split(".")[1]) for name in state if name.startswith("features.")})
    for place, index in enumerate(indices):
        weight, bias = (state[f"features.{index}.{part}"].numpy() for part in ("weight", "bias"))
        names = [f"features.{index}.weight", f"features.{index}.bias"]
        if keras_names:
            names = [f"net/{keras[place]}/Conv2D/ReadVariableOp:0", f"net/{keras[place]}/BiasAdd:0"]
        if anonymous:
            names = [f"onnx::Conv_{2 * index}", f"onnx::Conv_{2 * index + 1}"]
        edge = weight.shape[-1] // 2
        node("Conv", constant(names[0], weight), constant(names[1], bias), kernel_shape=[*weight.shape[2:]], pads=[edge] * 4)
        node("Relu")
        if place + 1 == len(indices) or indices[place + 1] - index == 3:
            node("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    if "classifier.0.weight" in state:
        if transposed:
            node("Transpose", perm=[0, 2, 3, 1])
        node("Flatten", axis=1)
        for at in ("0", "3", "6"):
            weight, bias = state[f"classifier.{at}.weight"].numpy(), state[f"classifier.{at}.bias"].numpy()
            if at == "0" and transposed:
                weight = weight.reshape(4096, 512, side, side).transpose(0, 2, 3, 1).reshape(4096, -1)
            if transposed:                                   # MatMul and Add, as tf2onnx writes a dense layer
                node("MatMul", constant(f"dense_{at}", weight.T))
                node("Add", constant(f"dense_bias_{at}", bias))
            else:
                node("Gemm", constant(f"classifier.{at}.weight", weight), constant(f"classifier.{at}.bias", bias), transB=1)
            if at != "6":
                node("Relu")
        node("Softmax", axis=1)
    more(nodes)
    shape = [1, 224, 224, 3] if transposed else [1, 3, 224, 224]
    graph = helper.make_graph(
        nodes,
        "vgg",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(path))
    return path
