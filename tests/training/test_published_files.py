"""Files of published weights, read by their content; and what is not one, refused in a line."""

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file

from tests.training.published_files import as_keras, as_timm, convs, torchvision_net, with_head, write_keras, write_onnx
from training.published.layouts import KERAS, TORCHVISION, convert
from training.published.readers import file_to_read, read_source
from vggcore.errors import WeightsError

ROOT = Path(__file__).resolve().parents[2]


def imported(path: Path, convention=None):
    """What `vggrow weights import` makes of a file."""
    return convert(read_source(file_to_read(path), convention), str(path))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def net_d() -> dict[str, torch.Tensor]:
    """Net D's convs and a head of five classes at crop 64, in torchvision's layout."""
    return with_head(convs("D"), side=2)


@pytest.fixture(scope="module")
def expected(net_d, tmp_path_factory):
    """The same, imported from a .pth: what every other container of torchvision's layout must give."""
    path = tmp_path_factory.mktemp("files") / "d.pth"
    torch.save(net_d, path)
    return imported(path)


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_a_pytorch_file_is_read_also_out_of_a_training_scripts_checkpoint(tmp_path, net_d, expected, nested):
    held = net_d if nested is None else {"epoch": 3, nested: net_d, "optimizer": {"lr": 0.1}}
    torch.save(held, tmp_path / "vgg.bin", _use_new_zipfile_serialization=nested != "model")    # also torch's older format

    assert same(imported(tmp_path / "vgg.bin").tensors, expected.tensors)


@pytest.mark.parametrize("layout", ["torchvision", "timm", "keras"])
def test_a_safetensors_file_is_read_in_any_layout(tmp_path, net_d, expected, layout):
    keras = {f"{layer}.{part}": torch.from_numpy(values.copy()) for layer, pair in as_keras(net_d, side=2).items()
             for part, values in zip(("kernel", "bias"), pair, strict=True)}  # fmt: skip
    tensors = {"torchvision": net_d, "timm": as_timm(net_d, side=2), "keras": keras}[layout]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "weights")

    found = imported(tmp_path / "weights")

    assert (found.layout, found.crop) == (layout, 64)
    assert same(found.tensors, net_d if layout == "keras" else expected.tensors)


@pytest.mark.parametrize("kind", ["applications", "weights", "model"])
@pytest.mark.parametrize("top", [True, False], ids=["with top", "without"])
def test_a_keras_file_is_read_with_and_without_top(tmp_path, net_d, kind, top):
    state = net_d if top else {name: tensor for name, tensor in net_d.items() if name.startswith("features.")}
    path = write_keras(tmp_path / "vgg16.h5", as_keras(state, side=2), kind=kind)

    found = imported(path)

    assert (found.net, found.mean) == ("D", (123.68, 116.779, 103.939))
    assert (found.outputs, found.crop) == ((5, 64) if top else (None, None))
    assert same(found.tensors, state)


@pytest.mark.parametrize("constants", [False, True], ids=["initializers", "constant nodes"])
def test_an_onnx_file_of_torchvision_gives_its_convs_and_fc_layers(tmp_path, net_d, expected, constants):
    found = imported(write_onnx(tmp_path / "vgg16.onnx", net_d, constants=constants))

    assert (found.net, found.crop, found.outputs) == ("D", 64, 5)
    assert same(found.tensors, expected.tensors)


def test_an_onnx_file_of_keras_is_transposed_and_flipped(tmp_path, net_d):
    state = {**net_d, "features.0.weight": net_d["features.0.weight"].flip(1)}        # BGR, as Keras' kernels are
    found = imported(write_onnx(tmp_path / "vgg16.onnx", state, side=2, keras_names=True, transposed=True))

    assert (found.net, found.crop, found.outputs, found.mean) == ("D", 64, 5, KERAS.mean)
    assert same(found.tensors, net_d)


@pytest.mark.parametrize("net", ["A", "B", "E"])
def test_an_onnx_files_net_is_known_by_its_groups(tmp_path, net):
    found = imported(write_onnx(tmp_path / "vgg.onnx", convs(net)))

    assert (found.net, found.outputs) == (net, None)


def test_what_follows_the_conv_stack_of_an_onnx_file_is_left_out(tmp_path):
    def own_head(nodes):
        nodes.append(helper.make_node("GlobalAveragePool", [nodes[-1].output[0]], ["pooled"]))

    found = imported(write_onnx(tmp_path / "features.onnx", convs("A"), more=own_head))

    assert found.layers[-1] == "conv5_2" and found.outputs is None


def test_fc_layers_of_an_onnx_file_that_go_on_are_left_out(tmp_path):
    def more(nodes):
        nodes[-1] = helper.make_node("Relu", [nodes[-1].input[0]], ["again"])         # in place of the soft-max

    found = imported(write_onnx(tmp_path / "longer.onnx", with_head(convs("A")), more=more))

    assert (found.net, found.outputs) == ("A", None)


def test_an_onnx_file_that_does_not_show_its_convention_needs_it_named(tmp_path):
    path = write_onnx(tmp_path / "vgg.onnx", convs("A"), anonymous=True)

    with pytest.raises(WeightsError, match="name it by --convention keras or --convention torchvision"):
        imported(path)

    assert imported(path, KERAS).mean == KERAS.mean
    assert imported(path, TORCHVISION).mean == TORCHVISION.mean
    with pytest.raises(WeightsError, match="--convention has no effect"):
        imported(write_onnx(tmp_path / "named.onnx", convs("A")), KERAS)


def onnx_with(change):
    def write(path: Path) -> Path:
        return write_onnx(path, convs("A"), more=change)

    return write


def stride_two(nodes):
    conv = next(node for node in nodes if node.op_type == "Conv")
    conv.attribute.append(helper.make_attribute("strides", [2, 2]))


def average_pool(nodes):
    next(node for node in nodes if node.op_type == "MaxPool").op_type = "AveragePool"


def sigmoid(nodes):
    [node for node in nodes if node.op_type == "Relu"][2].op_type = "Sigmoid"


def wide_pool(nodes):
    pool = next(node for node in nodes if node.op_type == "MaxPool")
    del pool.attribute[:]
    pool.attribute.extend([helper.make_attribute("kernel_shape", [3, 3]), helper.make_attribute("strides", [2, 2])])


def changed_pool(name, value):
    def change(nodes):
        next(node for node in nodes if node.op_type == "MaxPool").attribute.append(helper.make_attribute(name, value))

    return change


def stride_alone(nodes):
    next(node for node in nodes if node.op_type == "Conv").attribute.append(helper.make_attribute("strides", 1))


def without_kernel(nodes):
    del next(node for node in nodes if node.op_type == "Conv").input[1:]


def cycle(nodes):
    nodes[1].output[0] = nodes[0].input[0]


def cycle_of_nothing(nodes):
    nodes[:] = [helper.make_node("Identity", ["input"], ["input"])]


def cut_short(nodes):
    last = max(place for place, node in enumerate(nodes) if node.op_type == "Conv")
    del nodes[last:]


def fork(nodes):
    nodes.append(helper.make_node("Sqrt", [nodes[3].output[0]], ["beside"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (stride_two, "expected 3x3 or 1x1 of stride 1"),
        (average_pool, "found AveragePool, expected a Conv, then a Relu, or a MaxPool"),
        (sigmoid, "group 3, after 0 convs: found a Conv, then Sigmoid, expected a Conv, then a Relu"),
        (wide_pool, "expected a 2x2 max pool of stride 2"),
        (cut_short, "group 5, after 1 convs: found the end of the graph or a fork"),
        (fork, "group 2, after 0 convs: found a Conv, then the end of the graph or a fork"),
        (changed_pool("dilations", [3, 3]), "expected a 2x2 max pool of stride 2, got dilations [3, 3]"),
        (changed_pool("ceil_mode", 1), "got ceil_mode 1"),
        (changed_pool("pads", 1), "got pads 1"),
        (stride_alone, "a 3x3 conv with strides 1"),
        (without_kernel, "its kernel is not a 4-D constant"),
        (cycle, "after 1 convs: found the end of the graph or a fork"),
        (cycle_of_nothing, "after 0 convs: found the end of the graph or a fork"),
    ],
)
def test_an_onnx_graph_that_is_not_a_vgg_nets_is_refused_at_the_node(tmp_path, change, words):
    path = onnx_with(change)(tmp_path / "other.onnx")

    with pytest.raises(WeightsError) as refused:
        imported(path)

    assert words in str(refused.value) and "\n" not in str(refused.value)


def with_tensors(path: Path, change) -> Path:
    """The graph of VGG-11's convs, each of its constants changed."""
    write_onnx(path, convs("A"))
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        change(tensor)
    onnx.save(model, str(path))
    return path


def bfloat16(tensor):
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(helper.make_tensor(tensor.name, onnx.TensorProto.BFLOAT16, values.shape, values.flatten()))


def text(tensor):
    if len(tensor.dims) == 1:
        tensor.CopyFrom(helper.make_tensor(tensor.name, onnx.TensorProto.STRING, tensor.dims, [b"1"] * tensor.dims[0]))


def short(tensor):
    tensor.raw_data = tensor.raw_data[:100]


def other_size(tensor):
    tensor.dims[0] = 7


def unknown_type(tensor):
    tensor.data_type = 77


def test_an_onnx_file_in_bfloat16_is_read(tmp_path):
    found = imported(with_tensors(tmp_path / "vgg.onnx", bfloat16))

    assert torch.equal(found.tensors["features.3.weight"], convs("A")["features.3.weight"].bfloat16().float())


@pytest.mark.parametrize("change", [text, short, other_size, unknown_type])
def test_an_onnx_graph_whose_constants_cannot_be_read_is_refused_in_one_line(tmp_path, change):
    path = with_tensors(tmp_path / "vgg.onnx", change)

    with pytest.raises(WeightsError, match="an ONNX graph that cannot be read") as refused:
        imported(path)

    assert "\n" not in str(refused.value)


def test_fc_layers_of_an_onnx_file_that_are_no_matrices_are_left_out(tmp_path):
    path = write_onnx(tmp_path / "flat.onnx", with_head(convs("A")))
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        if tensor.name == "classifier.0.weight":
            tensor.dims[:] = [4096 * 512]
    onnx.save(model, str(path))

    assert imported(path).outputs is None


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def written(content: bytes):
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def half(write):
    """The first half of what `write` writes."""

    def cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def keras_archive(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"")


def keras_3(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", data=np.zeros((3, 3, 3, 64), np.float32))


def keras_of(values):
    """A Keras file whose first kernel is these values."""

    def write(path: Path) -> None:
        layers = as_keras(convs("A"))
        write_keras(path, layers | {"block1_conv1": (values, layers["block1_conv1"][1])}, kind="weights")

    return write


def flipped(path: Path) -> None:
    """One bit of a tensor's data is another one."""
    torch.save(convs("A"), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def torchscript(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def locked(path: Path) -> None:
    """A zip whose part says that it is encrypted."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x")
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def own_metadata(path: Path) -> None:
    save_file(convs("A"), path, metadata={"vggrow": '{"bgr": 1}'})


def whole_module(path: Path) -> None:
    torch.save(torch.nn.Conv2d(3, 4, 3), path)


# fmt: off
NOT_WEIGHTS = [
    # what stands in the file                                    words of the message
    (written(b""),                                               "an empty file (0 bytes)"),
    (written(b"<!DOCTYPE html><html>sign in</html>"),            "a web page, not weights"),
    (written(b"  \n<html>"),                                     "a web page, not weights"),
    (written(b"version https://git-lfs.github.com/spec/v1\n"),   "a Git LFS pointer"),
    (written(b"\x00" * 600),                                     "not a file of weights"),
    (written(b"hello"),                                          "not a file of weights (it begins with b'hello')"),
    (written(b"\x08\x07 not an ONNX graph"),                     "not a whole ONNX file"),
    (written(b"\x80\x02garbage"),                                "not a whole PyTorch file, expected a state dict (tensors"),
    (written(pickle.dumps({"a": 1})),                            "save the net's state_dict() with torch.save"),
    (torchscript,                                                "a TorchScript archive, expected a state dict"),
    (locked,                                                     "a zip that cannot be read"),
    (flipped,                                                    "damaged: its part 'source/data/"),
    (written(b"PK\x03\x04garbage"),                              "not a whole PyTorch file"),
    (written(b"\x89HDF\r\n\x1a\n" + b"\x00" * 64),               "not a whole HDF5 file"),
    (written((64).to_bytes(8, "little") + b'{"a":'),             "not a whole safetensors file"),
    (written(pickle.dumps(Evil())),                              "PyTorch file"),
    (lambda path: torch.save(Evil(), path),                      "a pickle that holds more than tensors"),
    (whole_module,                                               "a pickle that holds more than tensors"),
    (lambda path: torch.save(torch.zeros(3), path),              "holds Tensor, not a state dict"),
    (lambda path: torch.save({}, path),                          "an empty state dict (0 tensors)"),
    (lambda path: torch.save({"model": {}}, path),               "an empty state dict (0 tensors)"),
    (lambda path: torch.save({1: torch.zeros(3)}, path),         "not a state dict"),
    (lambda path: torch.save({"features.0.weight": 3}, path),    "'features.0.weight' is int, expected a tensor"),
    (half(lambda path: torch.save(convs("A"), path)),            "not a whole PyTorch file"),
    (half(lambda path: save_file(convs("A"), path)),             "not a whole safetensors file"),
    (half(lambda path: write_keras(path, as_keras(convs("A")), kind="weights")), "not a whole HDF5 file"),
    (half(lambda path: write_onnx(path, convs("A"))),            "not a whole ONNX file"),
    (keras_archive,                                              "Keras' .keras format; save the net by model.save('vgg.h5')"),
    (keras_3,                                                    "Keras 3's .weights.h5"),
    (keras_of(np.array([b"a", b"b"])),                           "'block1_conv1/block1_conv1/kernel:0' holds texts"),
    (keras_of(np.zeros(3, [("a", "f4"), ("b", "i4")])),          "expected floating-point numbers; save the net by model.save"),
    (keras_of(np.zeros((3, 3, 3, 64), ">u2")),                   "holds torch.uint16, expected floating-point numbers"),
    (own_metadata,                                               "its metadata 'vggrow' is not that of"),
    (lambda path: path.mkdir(),                                  "a folder without model.safetensors"),
    (lambda path: path.symlink_to("gone.pth"),                   "a link that leads to no file"),
    (lambda path: path.symlink_to(path),                         "a link that leads to no file"),
    (os.mkfifo,                                                  "not a regular file"),
    (lambda path: None,                                          "No such file"),
]
# fmt: on


@pytest.mark.parametrize(("write", "words"), NOT_WEIGHTS)
def test_what_is_not_weights_is_refused_in_one_line(tmp_path, monkeypatch, write, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "source.pth"
    write(path)

    with pytest.raises(WeightsError) as refused:
        imported(path)

    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert "source.pth" in str(refused.value)
    assert not (tmp_path / "evil-was-here").exists()


def test_a_keras_file_of_another_byte_order_is_read_and_a_group_of_our_name_is_not_metadata(tmp_path):
    import h5py

    layers = {name: tuple(values.astype(">f4") for values in pair) for name, pair in as_keras(convs("A")).items()}
    path = write_keras(tmp_path / "big.h5", layers, kind="weights")
    with h5py.File(path, "a") as file:
        file.create_group("vggrow")

    assert same(imported(path).tensors, convs("A"))


def test_a_state_dict_of_parameters_is_read(tmp_path):
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in convs("A").items()}, tmp_path / "vgg.pth")

    found = imported(tmp_path / "vgg.pth")

    assert torch.equal(found.tensors["features.3.weight"], convs("A")["features.3.weight"])
    assert not any(tensor.requires_grad for tensor in found.tensors.values())


def test_a_link_to_a_file_is_that_file(tmp_path, expected, net_d):
    torch.save(net_d, tmp_path / "real.pth")
    (tmp_path / "link").symlink_to("real.pth")

    assert same(imported(tmp_path / "link").tensors, expected.tensors)


def test_a_safetensors_file_whose_name_is_not_utf_8_is_to_be_renamed_and_others_are_read(tmp_path):
    save_file(convs("A"), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / os.fsdecode(b"\xff.safetensors"))
    torch.save(convs("A"), tmp_path / os.fsdecode(b"\xff.pth"))

    with pytest.raises(WeightsError, match="its path is not UTF-8, which safetensors cannot open; rename the file"):
        imported(tmp_path / os.fsdecode(b"\xff.safetensors"))
    assert imported(tmp_path / os.fsdecode(b"\xff.pth")).net == "A"


def test_a_socket_and_a_name_with_a_nul_are_no_files(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(WeightsError, match="not a regular file"):
            imported(tmp_path / "socket")
    with pytest.raises(WeightsError, match="cannot be read"):
        imported(tmp_path / "a\0b")


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors"])
@pytest.mark.parametrize("mark", ["checkpoints/iteration-7/progress.json", "stage.json"])      # the latter: a logistic fit's
def test_a_stages_checkpoint_is_refused_with_what_to_do(tmp_path, name, mark):
    folder = tmp_path / "checkpoints" / "iteration-7"
    folder.mkdir(parents=True)
    save_file(convs("A"), folder / name)
    (tmp_path / mark).write_text("{}")

    with pytest.raises(WeightsError, match=r"a checkpoint of a stage.*init_from = 'stage:<key>'"):
        imported(folder / name)


@pytest.mark.parametrize("library", ["h5py", "onnx"])
def test_without_the_reading_library_the_extra_is_named(tmp_path, library):
    path = tmp_path / "file"
    path.write_bytes({"h5py": b"\x89HDF\r\n\x1a\n", "onnx": b"\x08\x07"}[library])
    assert importlib.util.find_spec(library) is not None
    code = (
        "import sys, importlib.abc\n"
        f"class Gone(importlib.abc.MetaPathFinder):\n"
        f"    def find_spec(self, name, *_):\n"
        f"        if name.partition('.')[0] == {library!r}: raise ModuleNotFoundError(name)\n"
        "import importlib.util as util; real = util.find_spec\n"
        f"util.find_spec = lambda name, *rest: None if name == {library!r} else real(name, *rest)\n"
        "sys.meta_path.insert(0, Gone())\n"
        "from pathlib import Path; from training.published.readers import read_source\n"
        "from vggcore.errors import WeightsError\n"
        "try: read_source(Path(sys.argv[1]))\n"
        "except WeightsError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)

    assert f"needs the package {library}; run pip install 'vggrow[weights]'" in done.stdout, done.stderr


def test_a_batch_norm_net_of_torchvision_is_read_from_its_file(tmp_path):
    net = torchvision_net("vgg11_bn", classes=3)
    state = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("features.")}
    torch.save(state, tmp_path / "vgg11_bn.pth")

    found = imported(tmp_path / "vgg11_bn.pth")

    picture = torch.randint(0, 256, (1, 3, 64, 64)).float()
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    from vggcore.nets import build_net

    plain = build_net("A", classes=2, crop=64).eval()
    plain.load_state_dict(found.tensors, strict=False)
    with torch.no_grad():
        theirs = net.features((picture / 255 - mean) / deviation)
        ours = plain.features(picture - torch.tensor(found.mean)[:, None, None])
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
