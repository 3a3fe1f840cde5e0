"""Drift: what changed in the data is said, and what got worse stops, whatever the size of the set."""

from dataclasses import replace

import pytest

from deploy.drift import Moved, Summary, compare, drift_text, label_conflicts, moved, summarise
from pipelines.scan import scan
from tests.pipelines.photo_folders import make_photo_folder
from vggcore.recipe import Data

LAST = Summary(
    fingerprint="a" * 32,
    classes={"cat": 600, "dog": 400},
    quarantined=0,
    shorter_side=300.0,
    colour=(120.0, 110.0, 100.0),
    duplicates=0,
    conflicts={},
    near_duplicates=6,
)


def problems(last: Summary, now: Summary, max_bad: float = 0.001) -> tuple[str, ...]:
    return compare(last, now, max_bad=max_bad).problems


def test_the_same_data_has_neither_notes_nor_problems():
    drift = compare(LAST, LAST, max_bad=0.001)

    assert (drift.notes, drift.problems) == ((), ())


def test_more_bad_files_than_max_bad_stop():
    (problem,) = problems(LAST, replace(LAST, quarantined=2))

    assert "2 of 1,002 files do not decode (0.20%, last 0.00%)" in problem and "max_bad = 0.001" in problem


def test_bad_files_up_to_max_bad_do_not_stop():
    assert problems(LAST, replace(LAST, quarantined=2), max_bad=0.01) == ()


def test_bad_files_above_max_bad_that_were_there_before_do_not_stop():
    assert problems(replace(LAST, quarantined=5), replace(LAST, quarantined=5)) == ()


def test_a_doubled_share_of_bad_files_stops_also_below_max_bad():
    (problem,) = problems(replace(LAST, quarantined=5), replace(LAST, quarantined=11), max_bad=0.05)

    assert "twice the share" in problem
    assert problems(replace(LAST, quarantined=5), replace(LAST, quarantined=9), max_bad=0.05) == ()


def test_one_bad_file_in_a_hundred_thousand_that_becomes_two_does_not_stop():
    large = replace(LAST, classes={"cat": 60_000, "dog": 40_000}, quarantined=1)

    assert problems(large, replace(large, quarantined=2)) == ()


def test_a_lost_class_stops_and_a_new_one_is_noted():
    drift = compare(LAST, replace(LAST, classes={"cat": 600, "fox": 40}), max_bad=0.001)

    assert drift.problems == ("class 'dog' is gone; it had 400 pictures",)
    assert drift.notes == ("class 'fox' is new, with 40 pictures",)


def test_a_picture_in_two_classes_stops_unless_it_was_so_before():
    now = replace(LAST, conflicts={"c1": "'cat/1.jpg' and 'dog/7.jpg'"})

    assert problems(LAST, now) == ("the same picture in two classes: 'cat/1.jpg' and 'dog/7.jpg'",)
    assert problems(now, now) == ()


def test_of_many_conflicts_a_few_are_named_and_the_rest_counted():
    now = replace(LAST, conflicts={str(number): f"'cat/{number}.jpg' and 'dog/{number}.jpg'" for number in range(10)})

    (problem,) = problems(LAST, now)

    assert problem.count("dog/") == 3 and problem.endswith("and 7 more")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": {"cat": 600, "dog": 190}}, "class 'dog' has 190 pictures, it had 400"),
        ({"colour": (131.0, 110.0, 100.0)}, "mean colour moved by +11.0, +0.0, +0.0"),
        ({"shorter_side": 100.0}, "median shorter side is 100 px, it was 300"),
        ({"duplicates": 4}, "4 pictures are copies of others, 0 were"),
        ({"near_duplicates": 12}, "12 pictures have a near-duplicate (1.2%), 6 had one (0.6%)"),
    ],
)
def test_what_is_odd_but_may_be_meant_is_noted_and_does_not_stop(change, words):
    drift = compare(LAST, replace(LAST, **change), max_bad=0.001)

    assert drift.problems == ()
    assert any(words in note for note in drift.notes), drift.notes


@pytest.mark.parametrize(
    ("before", "after"),
    [(6, 11), (4, 10), (None, 500), (500, None)],
    ids=["not doubled", "a hundredth", "old record", "old scan"],
)
def test_near_duplicates_that_say_little_are_not_pointed_out(before, after):
    drift = compare(replace(LAST, near_duplicates=before), replace(LAST, near_duplicates=after), max_bad=0.001)

    assert (drift.notes, drift.problems) == ((), ())


def test_a_record_of_before_near_duplicates_were_counted_is_read():
    record = LAST.to_json()
    del record["near_duplicates"]

    assert Summary.from_json(record) == replace(LAST, near_duplicates=None)


def test_a_conflict_names_two_paths_and_copies_in_one_class_are_none():
    found = label_conflicts(["a/1", "a/2", "b/1", "b/2"], ["a", "a", "b", "b"], ["x", "x", "x", "y"])

    assert found == {"x": "'a/1' and 'b/1'"}


def test_of_two_real_scans_what_came_went_and_changed_class_is_counted(tmp_path):
    pictures = make_photo_folder(tmp_path / "pictures", per_class=12)
    before = scan(Data(root=pictures), tmp_path / "store", threads=1)
    (pictures / "cat" / "cat-000.jpg").rename(pictures / "flower" / "was-cat.jpg")
    (pictures / "coffee" / "coffee-001.jpg").unlink()
    (pictures / "cat" / "copy.jpg").write_bytes((pictures / "flower" / "flower-002.jpg").read_bytes())

    after = scan(Data(root=pictures), tmp_path / "store", threads=1)

    drift = compare(summarise(before), summarise(after), max_bad=0.001, contents=moved(before, after))
    assert drift.moved == Moved(added=0, removed=1, relabelled=2)      # a copy in another class counts as relabelled too
    assert drift.now.duplicates == 1
    assert drift.last.near_duplicates is not None and drift.now.near_duplicates is not None
    assert drift.now.near_duplicates >= 2          # the copy, and what it is a copy of
    assert [problem for problem in drift.problems if "flower-002.jpg" in problem and "cat/copy.jpg" in problem]
    assert Summary.from_json(summarise(after).to_json()) == summarise(after)
    assert drift_text(drift)[0] == "pictures 36 -> 36 (0 came, 1 went): coffee 12 -> 11, flower 12 -> 13"
