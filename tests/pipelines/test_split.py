"""The split rules: by hash, stratified with a memory, by group."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from pipelines.split import (
    check_splits,
    groups_of,
    memory_file,
    read_memory,
    split_by_group,
    split_by_hash,
    split_stratified,
    whole_shares,
    write_memory,
)
from vggcore.errors import DatasetError
from vggcore.recipe import Split


def contents_of(count: int, word: str = "picture") -> list[str]:
    return [hashlib.blake2b(f"{word} {number}".encode(), digest_size=16).hexdigest() for number in range(count)]


def test_by_hash_the_shares_hold_on_average() -> None:
    splits = Counter(split_by_hash(contents_of(20_000), Split(val=0.1, test=0.25)))

    assert splits["val"] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert splits["test"] / 20_000 == pytest.approx(0.25, abs=0.01)


def test_by_hash_a_picture_keeps_its_split_whatever_others_come_or_go() -> None:
    contents = contents_of(500)

    together, alone = split_by_hash(contents, Split()), [split_by_hash([content], Split())[0] for content in contents]

    assert together == alone


def test_by_hash_the_assignment_is_the_same_for_ever() -> None:
    splits = split_by_hash(contents_of(12), Split(val=0.3, test=0.3))

    assert " ".join(splits) == "train train train val test train val test test test val val"


def test_a_larger_val_share_takes_pictures_from_train_and_none_from_test() -> None:
    contents = contents_of(2000)

    before, after = split_by_hash(contents, Split(val=0.1, test=0.2)), split_by_hash(contents, Split(val=0.2, test=0.2))

    assert {(old, new) for old, new in zip(before, after, strict=True) if old != new} == {("train", "val")}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 333, 1000])
def test_stratified_shares_are_exact_to_within_one_picture_in_every_class(count: int) -> None:
    rule = Split(val=0.15, test=0.2)
    labels = ["cat"] * count + ["dog"] * (2 * count)
    contents = contents_of(3 * count)

    splits = split_stratified(labels, contents, rule, {})

    counts = Counter(zip(labels, splits, strict=True))
    for label, number in (("cat", count), ("dog", 2 * count)):
        for split, share in (("train", 0.65), ("val", 0.15), ("test", 0.2)):
            assert abs(counts[label, split] - share * number) < 1


def test_whole_shares_are_not_spoiled_by_rounding() -> None:
    assert whole_shares(20, Split(val=0.15, test=0.15)) == {"train": 14, "val": 3, "test": 3}
    assert whole_shares(100, Split(val=0.29, test=0.01)) == {"train": 70, "val": 29, "test": 1}
    assert whole_shares(1, Split(val=0.15, test=0.15)) == {"train": 1, "val": 0, "test": 0}


def test_stratified_without_a_memory_the_order_of_the_files_does_not_matter() -> None:
    labels, contents = ["cat", "dog"] * 60, contents_of(120)

    forward = split_stratified(labels, contents, Split(), {})
    backward = split_stratified(labels[::-1], contents[::-1], Split(), {})

    assert forward == backward[::-1]


def test_stratified_pictures_keep_their_split_when_others_come_and_shares_stay_exact() -> None:
    rule, old, new = Split(val=0.2, test=0.2), contents_of(50), contents_of(37, "newcomer")
    before = dict(zip(old, split_stratified(["cat"] * 50, old, rule, {}), strict=True))

    after = dict(zip(old + new, split_stratified(["cat"] * 87, old + new, rule, before), strict=True))

    assert {content: after[content] for content in old} == before
    assert Counter(after.values()) == Counter(whole_shares(87, rule))


def test_stratified_newcomers_fill_the_split_that_lost_pictures() -> None:
    rule, old, new = Split(val=0.2, test=0.2), contents_of(50), contents_of(10, "newcomer")
    before = dict(zip(old, split_stratified(["cat"] * 50, old, rule, {}), strict=True))
    left = [content for content in old if before[content] != "val"]  # all 10 of val were deleted

    splits = split_stratified(["cat"] * 50, left + new, rule, before)

    assert Counter(splits) == {"train": 30, "val": 10, "test": 10}


@pytest.mark.parametrize("by", ["hash", "stratified"])
def test_copies_of_a_picture_stand_in_one_split_even_in_two_classes(by: str) -> None:
    contents = contents_of(40)
    labels = ["cat"] * 40 + ["dog"] * 40

    splits = split_by_hash(contents * 2, Split()) if by == "hash" else split_stratified(labels, contents * 2, Split(), {})

    assert splits[:40] == splits[40:]


def test_the_memory_comes_back_from_its_file(tmp_path: Path) -> None:
    split_of = dict(zip(contents_of(3), ("train", "val", "test"), strict=True))
    path = memory_file(tmp_path, Split(val=0.2, test=0.2))
    absent = read_memory(path)

    write_memory(path, split_of)

    assert absent == {}
    assert read_memory(path) == split_of
    assert path.parent == tmp_path / "data" / "splits"
    assert path != memory_file(tmp_path, Split(val=0.2, test=0.1))


def test_a_group_is_never_torn_apart() -> None:
    paths = [f"cat/house{house}/{number}.jpg" for house in range(300) for number in range(3)]
    groups = groups_of(paths, r"house(\d+)")

    splits = split_by_group(groups, Split(val=0.2, test=0.2))

    seen = {(group, split) for group, split in zip(groups, splits, strict=True)}
    assert groups[:4] == ["0", "0", "0", "1"]
    assert len(seen) == 300
    assert Counter(split for _, split in seen)["val"] == pytest.approx(60, abs=25)


def test_a_group_without_parentheses_is_the_whole_match() -> None:
    assert groups_of(["cat/house12/1.jpg"], r"house\d+") == ["house12"]


@pytest.mark.parametrize("pattern", [r"house(\d+)", r"(house)?flat"])
def test_a_path_that_the_group_pattern_does_not_match_is_named(pattern: str) -> None:
    with pytest.raises(DatasetError, match=r"^dog/flat1/1.jpg: split.group .* does not match"):
        groups_of(["dog/flat1/1.jpg"], pattern)


@pytest.mark.parametrize("empty", ["train", "val", "test"])
@pytest.mark.parametrize("by", ["folder", "hash", "stratified", "group"])
def test_an_empty_split_is_an_error_that_says_what_to_do(empty: str, by: str) -> None:
    splits = [split for split in ("train", "val", "test") if split != empty] * 2

    with pytest.raises(DatasetError, match=f"pets: no picture in {empty} .*: add pictures"):
        check_splits("pets", ["cat", "dog"], ["cat", "cat", "dog", "dog"], splits, by)


def test_a_class_that_train_lacks_is_an_error() -> None:
    labels, splits = ["cat", "cat", "cat", "dog"], ["train", "val", "test", "val"]

    with pytest.raises(DatasetError, match=r"pets: class 'dog' has no picture in train \(found 0 in train, 1 in val, 0 in"):
        check_splits("pets", ["cat", "dog"], labels, splits, "folder")


def test_a_class_that_val_or_test_lacks_is_a_note() -> None:
    labels, splits = ["cat", "cat", "cat", "dog"], ["train", "val", "test", "train"]

    notes = check_splits("pets", ["cat", "dog"], labels, splits, "folder")

    assert len(notes) == 2
    assert "class 'dog' has no picture in val" in notes[0]
    assert "class 'dog' has no picture in test" in notes[1]
