"""The plain classifiers that a net is held against: real fits on small pictures made here."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy import yardsticks as module
from deploy.yardsticks import (
    Measured,
    ResultRow,
    Yardstick,
    Yardsticks,
    gain_over,
    picture_features,
    read_yardsticks,
    require_scikit,
    result_rows,
    result_table,
    sample,
    write_yardsticks,
    yardsticks,
)
from pipelines.manifest import Pictures
from vggcore.errors import DatasetError, StoreError, VggrowError


def make_pictures(root: Path, name: str, counts: list[int], *, seed: int) -> Pictures:
    """Noise whose brightness tells the class: 60, 120, 180 of 255, deviation 25; grey PNG of 40x36 pixels."""
    draws = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    paths = []
    for place, label in enumerate(labels):
        path = f"{name}/{place:03}.png"
        (root / name).mkdir(parents=True, exist_ok=True)
        pixels = np.clip(60 * (label + 1) + 25 * draws.standard_normal((36, 40)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / path)
        paths.append(path)
    contents = np.array([f"{place * 7919 % 2**60:032x}"[::-1] for place in range(len(labels))], object)
    side = np.full(len(labels), 36)
    return Pictures(root, np.array(paths, object), labels.astype(np.int64), side, side + 4, contents)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pictures of this file are."""
    return tmp_path_factory.mktemp("yardsticks")


@pytest.fixture(scope="module")
def train(root: Path) -> Pictures:
    """30 dark and 15 bright pictures."""
    return make_pictures(root, "train", [30, 15], seed=1)


@pytest.fixture(scope="module")
def tested(root: Path) -> Pictures:
    """12 dark and 6 bright pictures."""
    return make_pictures(root, "test", [12, 6], seed=2)


@pytest.fixture(scope="module")
def found(train: Pictures, tested: Pictures) -> Yardsticks:
    """What the yardsticks reach on them."""
    return yardsticks(train, tested, 7)


def by_name(found: Yardsticks) -> dict[str, Yardstick]:
    """The rows by their names."""
    return {row.name: row for row in found.rows}


def test_each_yardstick_is_scored_on_every_test_picture(found: Yardsticks, tested: Pictures) -> None:
    rows = by_name(found)

    assert list(rows) == ["majority class", "logistic regression", "random forest", "HOG + linear SVM", "HOG + RBF SVM"]
    assert found.paths == tuple(tested.paths) and found.labels == tuple(tested.labels)
    for row in rows.values():
        right = sum(said == label for said, label in zip(row.predictions, found.labels, strict=True))
        assert row.top1_accuracy == pytest.approx(right / 18)
    assert "grey" in rows["logistic regression"].detail


def test_the_majority_says_the_commonest_class_of_train_and_knows_nothing_more(found: Yardsticks) -> None:
    majority = by_name(found)["majority class"]

    assert set(majority.predictions) == {0}
    assert (majority.top1_accuracy, majority.balanced_accuracy, majority.auc) == (pytest.approx(12 / 18), 0.5, 0.5)


def test_pixels_tell_dark_from_bright(found: Yardsticks) -> None:
    for name in ("logistic regression", "random forest"):
        row = by_name(found)[name]
        assert (row.top1_accuracy, row.balanced_accuracy, row.auc) == (1.0, 1.0, 1.0)


def test_the_same_seed_gives_the_same_predictions_and_test_labels_move_none(
    found: Yardsticks, train: Pictures, tested: Pictures
) -> None:
    turned = yardsticks(train, replace(tested, labels=1 - tested.labels), 7)

    assert [row.predictions for row in turned.rows] == [row.predictions for row in found.rows]
    assert by_name(turned)["logistic regression"].top1_accuracy == 0.0


def test_three_classes_of_which_train_lacks_one(root: Path) -> None:
    train = make_pictures(root, "two of three", [8, 0, 8], seed=3)
    test = make_pictures(root, "three", [3, 3, 3], seed=4)

    rows = by_name(yardsticks(train, test, 7))

    logistic = rows["logistic regression"]
    assert logistic.predictions[:3] == (0, 0, 0) and logistic.predictions[6:] == (2, 2, 2)
    assert 1 not in {said for row in rows.values() for said in row.predictions}
    assert all(row.auc is not None and 0 <= row.auc <= 1 for row in rows.values())


def test_a_large_split_is_sampled_by_content_and_keeps_each_class(train: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PICTURES", 10)
    rare = replace(train, labels=np.where(np.arange(45) == 44, 2, train.labels))
    order = np.random.default_rng(5).permutation(45)
    shuffled = replace(rare, labels=rare.labels[order], contents=rare.contents[order], paths=rare.paths[order])

    chosen = sample(rare, 7, at_least_one_each=True)
    again = sample(shuffled, 7, at_least_one_each=True)

    assert 10 <= len(chosen) <= 12 and set(rare.labels[chosen]) == {0, 1, 2}
    assert set(rare.contents[chosen]) == set(shuffled.contents[again])
    assert len(sample(rare, 7, at_least_one_each=False)) == 10
    assert set(sample(rare, 8, at_least_one_each=False)) != set(sample(rare, 7, at_least_one_each=False))


def test_pictures_stand_upright_and_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    wide = Image.fromarray(np.repeat(np.repeat(np.uint8([[20, 240]]), 32, 1), 64, 0))
    exif = Image.Exif()
    exif[0x0112] = 6                       # to be turned clockwise by a quarter
    wide.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(np.full((40, 40), 0x8000, np.uint16)).save(tmp_path / "deep.png")

    turned, _ = picture_features(tmp_path / "turned.jpg")
    deep, _ = picture_features(tmp_path / "deep.png")

    assert turned[:10].mean() < 40 and turned[-10:].mean() > 220
    assert set(np.unique(deep)) == {0x80}


def test_a_picture_that_does_not_decode_is_named(root: Path, train: Pictures, tmp_path: Path) -> None:
    (root / "broken.png").write_bytes(b"<html>")
    paths = train.paths.copy()
    paths[3] = "broken.png"

    with pytest.raises(DatasetError, match=r"broken\.png: Pillow cannot decode it .*; replace or remove it, then scan again"):
        yardsticks(replace(train, paths=paths), train, 7)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)

    with pytest.raises(VggrowError, match=r"pip install 'vggrow\[demo\]'"):
        require_scikit()


def test_what_is_written_is_read_back(found: Yardsticks, tmp_path: Path) -> None:
    write_yardsticks(tmp_path / "new" / "yardsticks.json", found)

    assert read_yardsticks(tmp_path / "new" / "yardsticks.json") == found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}], "paths": [], "labels": []}'])
def test_a_file_that_is_no_yardsticks_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "yardsticks.json").write_text(text)

    with pytest.raises(StoreError, match=r"yardsticks\.json: cannot be read as yardsticks .*train again to renew it"):
        read_yardsticks(tmp_path / "yardsticks.json")


def net_of(found: Yardsticks, *, wrong: int) -> Measured:
    """A net that is right on all of the test pictures but the first `wrong`, in another order than the yardsticks'."""
    labels = np.array(found.labels)
    said = np.where(np.arange(len(labels)) < wrong, 1 - labels, labels)
    order = np.arange(len(labels))[::-1]
    return Measured("D", tuple(found.paths[place] for place in order), labels[order], np.eye(2)[said][order] * 0.8 + 0.1)


def test_the_gain_is_paired_by_picture_and_its_interval_holds_it(found: Yardsticks) -> None:
    rows = by_name(found)

    over_majority = gain_over(net_of(found, wrong=0), found, rows["majority class"])
    over_perfect = gain_over(net_of(found, wrong=0), found, rows["logistic regression"])
    under = gain_over(net_of(found, wrong=3), found, rows["logistic regression"])
    strange = gain_over(Measured("D", ("elsewhere.png",), np.zeros(1, np.int64), np.eye(2)[:1]), found, rows["random forest"])

    assert over_majority is not None and over_majority[0] == pytest.approx(6 / 18)
    assert 0 < over_majority[1] < 6 / 18 < over_majority[2] < 1
    assert over_perfect == (0.0, 0.0, 0.0)     # the same pictures are right: no resample can tell them apart
    assert under is not None and under[0] == pytest.approx(-3 / 18) and under[1] < -3 / 18 < under[2] <= 0
    assert strange is None


def test_the_table_puts_stages_first_then_yardsticks_in_straight_columns(found: Yardsticks) -> None:
    evaluation = {"top1_accuracy": 0.9876, "balanced_accuracy": 0.5, "auc": None, "pictures": 18}
    net = net_of(found, wrong=0)

    lines = result_table(result_rows({"A-64": evaluation, "D-64": evaluation}, found, net), net="D-64").splitlines()

    assert lines[0].split() == ["top-1", "%", "balanced", "%", "AUC", "D-64", "minus", "it,", "95", "%", "interval"]
    assert lines[2].split() == ["A-64", "98.8", "50.0", "-"] and lines[3].startswith("D-64")
    assert lines[4] == lines[1] and set(lines[4]) == {"-", " "}
    assert lines[5].startswith("majority class") and "66.7" in lines[5] and "+33.3 (" in lines[5]
    assert len(lines) == 10
    assert lines[5].index("66.7") == lines[2].index("98.8")


def test_the_table_without_yardsticks_has_no_empty_column() -> None:
    table = result_table([ResultRow("A", 0.5, 0.25, 0.75, 4, is_yardstick=False)], net="A")

    assert table.splitlines()[0].split() == ["top-1", "%", "balanced", "%", "AUC"]
    assert table.splitlines()[2].split() == ["A", "50.0", "25.0", "0.750"]
