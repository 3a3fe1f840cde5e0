"""Published weights in our convention: the same logits as their publishers' own modules; what does not fit is named."""

import re

import pytest
import torch
import torchvision
from torchvision.transforms.functional import normalize

from tests.training.published_files import as_keras, as_timm, convs, torchvision_net, with_head
from training.published.layouts import TORCHVISION, Found, convert
from vggcore.errors import WeightsError
from vggcore.nets import build_net

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def levels(count: int, side: int, seed: int = 3) -> torch.Tensor:
    """Pictures (count, 3, side, side), RGB, 0..255."""
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).float()


def keras_tensors(layers) -> dict[str, torch.Tensor]:
    """As Keras 2 names them."""
    return {
        f"{name}/{part}:0": torch.from_numpy(values)
        for name, pair in layers.items()
        for part, values in zip(("kernel", "bias"), pair, strict=True)
    }


def ours(converted, pictures: torch.Tensor) -> torch.Tensor:
    """Logits of our net with converted weights; pictures RGB, 0..255."""
    net = build_net(converted.net, classes=converted.outputs, crop=converted.crop).eval()
    net.load_state_dict(converted.tensors)
    with torch.no_grad():
        return net(pictures - torch.tensor(converted.mean)[:, None, None])


@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize(("name", "net"), [("vgg11", "A"), ("vgg13", "B"), ("vgg16", "D"), ("vgg19", "E")])
def test_a_torchvision_net_gives_the_same_logits_here(name, net, batch_norm):
    theirs = torchvision_net(f"{name}_bn" if batch_norm else name)
    pictures = levels(1, 224)
    with torch.no_grad():
        expected = theirs(normalize(pictures / 255, MEAN, DEVIATION))

    converted = convert(Found(theirs.state_dict()), "vgg.pth")

    assert (converted.net, converted.crop, converted.outputs) == (net, 224, 1000)
    assert converted.layers[-3:] == ("fc1", "fc2", "fc3") and converted.layers[0] == "conv1_1"
    assert converted.mean == pytest.approx([255 * level for level in MEAN], abs=1e-12)
    found = ours(converted, pictures)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_timm_file_has_its_fc_layers_as_convs():
    state = with_head(convs("D"), side=2)

    converted = convert(Found(as_timm(state, side=2)), "timm.safetensors")

    plain = convert(Found(state), "vgg.pth")
    assert converted.layout == "timm" and converted.crop == 64
    assert converted.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(converted.tensors[name], plain.tensors[name]) for name in plain.tensors)


def test_a_keras_file_is_flipped_to_rgb_and_keeps_its_values():
    state = with_head(convs("E"), side=2)
    layers = as_keras(state, side=2)

    converted = convert(Found(keras_tensors(layers)), "vgg19.h5")

    assert (converted.net, converted.layout, converted.crop, converted.outputs) == ("E", "keras", 64, 5)
    assert converted.mean == (123.68, 116.779, 103.939)
    # as_keras turned torch's RGB kernels to BGR: back again they are what they were, to the last bit
    assert all(torch.equal(converted.tensors[name], tensor) for name, tensor in state.items())


def test_the_first_conv_answers_to_an_rgb_picture_as_keras_does_to_a_bgr_one():
    layers = as_keras(convs("D"))
    kernel, bias = (torch.from_numpy(values).double() for values in layers["block1_conv1"])       # HWIO, BGR
    picture = levels(1, 32).double()
    bgr = picture.flip(1) - torch.tensor([103.939, 116.779, 123.68], dtype=torch.float64)[:, None, None]
    expected = torch.nn.functional.conv2d(bgr, kernel.permute(3, 2, 0, 1), bias, padding=1)

    converted = convert(Found(keras_tensors(layers)), "vgg16.h5")

    rgb = picture - torch.tensor(converted.mean, dtype=torch.float64)[:, None, None]
    weight, own_bias = (converted.tensors[f"features.0.{part}"].double() for part in ("weight", "bias"))
    found = torch.nn.functional.conv2d(rgb, weight, own_bias, padding=1)
    assert torch.allclose(found, expected, atol=1e-9)


def test_half_precision_and_a_data_parallel_prefix_are_no_obstacle():
    state = convs("A")
    converted = convert(Found({f"module.{name}": tensor.half() for name, tensor in state.items()}), "half.pth")

    expected = state["features.3.weight"].half().float()
    assert converted.layers == ("conv1_1", "conv2_1", "conv3_1", "conv3_2", "conv4_1", "conv4_2", "conv5_1", "conv5_2")
    assert (converted.crop, converted.outputs) == (None, None)
    assert torch.equal(converted.tensors["features.3.weight"], expected)
    assert all(tensor.dtype == torch.float32 for tensor in converted.tensors.values())


def test_torchvisions_division_is_folded_into_the_first_conv_alone():
    state = convs("A")
    converted = convert(Found(state), "vgg11.pth")

    deviation = torch.tensor(TORCHVISION.deviation, dtype=torch.float64)[:, None, None]
    assert torch.equal(converted.tensors["features.0.weight"], (state["features.0.weight"].double() / deviation).float())
    assert torch.equal(converted.tensors["features.3.weight"], state["features.3.weight"])


def without(*names):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def other(name, tensor):
    return lambda state: state | {name: tensor}


# fmt: off
WRONG = [
    # what is done to net D's convs and head        words of the message
    (without("features.0.weight"),                  ["nearest net D", "1 tensors are missing", "'features.0.weight' first"]),
    (without("features.28.weight", "features.28.bias"), ["nearest net D", "2 tensors are missing", "'features.28.weight'"]),
    (without("classifier.6.bias"),                  ["'classifier.6.bias' first"]),
    (without("classifier.3.weight", "classifier.3.bias", "classifier.6.weight", "classifier.6.bias"), ["4 tensors are miss"]),
    (other("features.30.weight", torch.zeros(2)),   ["1 tensors are not that net's", "'features.30.weight' first"]),
    (other("head.scale", torch.zeros(2)),           ["not that net's"]),
    (other("features.5.weight", torch.ones(128, 32, 3, 3)), ["'features.5.weight' is (128, 32, 3, 3), expected (128, "]),
    (other("features.0.weight", torch.zeros(64, 1, 3, 3)), ["'features.0.weight' is (64, 1, 3, 3), expected (64, 3, 3, 3)"]),
    (other("classifier.0.weight", torch.zeros(4096, 500)), ["'classifier.0.weight' is (4096, 500), expected (4096, 2508"]),
    (other("classifier.3.weight", torch.zeros(10, 4096)), ["'classifier.3.weight' is (10, 4096), expected (4096, 4096)"]),
    (other("features.5.bias", torch.zeros(128, dtype=torch.int8)), ["'features.5.bias' holds torch.int8", "unquantised"]),
    (other("features.5.bias", torch.zeros(128, device="meta")), ["'features.5.bias' is a tensor of another kind (meta"]),
    (other("features.5.bias", torch.zeros(128).to_sparse()), ["(sparse_coo), expected a dense one"]),
    (other("module.features.5.bias", torch.zeros(128)), ["two tensors for 'features.5.bias', with and without 'module.'"]),
    (other("features.5.bias", torch.full((128,), torch.nan)), ["features.5.bias has values that are not finite"]),
]
# fmt: on


@pytest.fixture(scope="module")
def whole_d():
    return with_head(convs("D"))


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_a_tensor_that_does_not_fit_is_named(whole_d, change, words):
    with pytest.raises(WeightsError) as refused:
        convert(Found(change(whole_d)), "d.pth")

    assert "\n" not in str(refused.value)
    for word in ["d.pth", *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "alexnet", "densenet121", "mobilenet_v2"])
def test_another_net_is_refused_in_one_line(name):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()

    with pytest.raises(WeightsError, match=re.escape("net.pth: ")) as refused:
        convert(Found(state), "net.pth")

    assert "\n" not in str(refused.value)


def test_a_keras_model_with_a_head_of_its_own_is_refused_by_the_heads_name():
    tensors = keras_tensors(as_keras(convs("D")))

    with pytest.raises(WeightsError, match=r"1 tensors are not that net's, 'dense_1/kernel:0' first"):
        convert(Found(tensors | {"dense_1/kernel:0": torch.zeros(512, 4)}), "own.h5")
