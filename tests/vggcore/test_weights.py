"""Weights on disk: what is read is what was written, and a file that does not fit is refused with its name."""

import os
import stat

import pytest
import torch
from safetensors import safe_open

from vggcore.errors import StoreError
from vggcore.initialise import initialise_net
from vggcore.nets import build_net
from vggcore.weights import load_into, load_weights, save_weights

SMALL = {"classes": 4, "width": 1 / 8, "crop": 32}


def small_net(net="A", **settings):
    module = build_net(net, **{**SMALL, **settings})
    initialise_net(module, "he", width=1 / 8, seed=1, name=net)
    return module


def test_weights_come_back_bit_by_bit_also_from_channels_last(tmp_path):
    plain, last = small_net(), small_net().to(memory_format=torch.channels_last)
    path = tmp_path / "new" / "model.safetensors"

    save_weights(last.state_dict(), path)
    state = load_weights(path)

    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]     # no temporary file is left
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_net_takes_its_weights_from_a_file_and_keeps_its_memory_format(tmp_path):
    save_weights(small_net().state_dict(), tmp_path / "model.safetensors")
    net = build_net("A", **SMALL).to(memory_format=torch.channels_last)

    load_into(net, tmp_path / "model.safetensors")

    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in small_net().state_dict().items())
    assert net.features[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)

    try:
        save_weights({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights({"a": torch.ones(3)}, path)
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(StoreError, match=r"file/model\.safetensors: cannot be written \(Not a directory\)"):
        save_weights({"a": torch.zeros(3)}, tmp_path / "file" / "model.safetensors")
    with pytest.raises(AttributeError):
        save_weights({"a": None}, path)

    assert load_weights(path)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file of weights"),
        (b"", "not a whole safetensors file"),
        (b"<html>no such page</html>", "not a whole safetensors file"),
        ("cut", "not a whole safetensors file"),
    ],
    ids=["absent", "empty", "a page", "cut short"],
)
def test_a_file_that_holds_no_weights_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    if content == "cut":
        save_weights(small_net().state_dict(), path)
        content = path.read_bytes()[:-7]
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(StoreError, match=rf"model\.safetensors: {words}") as caught:
        load_weights(path)

    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"net": "B"}, r"18 weights are missing, the first is features\.10\.bias"),
        ({"head": "compact"}, r"4 weights are missing, the first is classifier\.1\.bias"),
        ({"classes": 5}, r"classifier\.6\.weight is \(4, 512\), wanted \(5, 512\)"),
    ],
    ids=["another net", "another head", "other classes"],
)
def test_weights_of_another_net_are_refused_and_change_nothing(tmp_path, settings, words):
    path = tmp_path / "model.safetensors"
    save_weights(small_net().state_dict(), path)
    net = small_net(**settings)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    with pytest.raises(StoreError, match=rf"model\.safetensors: {words}.*trained with"):
        load_into(net, path)

    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_weight_too_many_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights({**small_net().state_dict(), "features.1.scale": torch.ones(2)}, path)

    with pytest.raises(StoreError, match=r"1 weights are unknown to this net, the first is features\.1\.scale"):
        load_into(small_net(), path)
