"""Classes keep their order for ever; new ones are appended, sorted by name."""

import pytest

from vggcore.class_order import added_classes, grown_order, spoken_classes


@pytest.mark.parametrize(
    ("known", "present", "order"),
    [
        ((), ("cat", "ant"), ("ant", "cat")),
        (("dog", "cat"), ("cat", "dog"), ("dog", "cat")),
        (("dog", "cat"), ("aardvark", "cat", "dog"), ("dog", "cat", "aardvark")),
        (("dog", "cat"), ("zebra", "cat", "dog", "aardvark"), ("dog", "cat", "aardvark", "zebra")),
        (("dog", "cat", "fox"), ("cat", "eel", "fox"), ("cat", "fox", "eel")),
    ],
)
def test_known_classes_come_first_in_their_order_and_new_ones_sorted(known, present, order):
    assert grown_order(known, present) == order


@pytest.mark.parametrize(
    ("old", "new", "added"),
    [
        (("b", "c"), ("b", "c"), ()),
        (("b", "c"), ["b", "c", "a"], ("a",)),
        (("b", "c"), ("a", "b", "c"), None),
        (("b", "c"), ("c", "b"), None),
        (("b", "c"), ("b",), None),
        (("b", "c"), ("b", "a"), None),
    ],
)
def test_a_class_is_added_only_after_all_old_ones_in_their_order(old, new, added):
    assert added_classes(old, new) == added


def test_classes_in_a_sentence():
    assert spoken_classes(("fox",)) == "class 'fox'" and spoken_classes(("bee", "fox")) == "classes 'bee', 'fox'"
