"""A gate question between models of other classes: which are comparable, and how a challenger does on classes that are new.

Pure. Comparable are models of the same classes in the same order, and a challenger that appends classes to the champion's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggcore.class_order import added_classes, spoken_classes

MOST_CONFUSED = 3    # classes that a new one is confused with, named in a sentence


@dataclass(frozen=True)
class NewClass:
    """How a challenger does on test with a class that the champion does not know.

    pictures: of the class, on test. recall, precision: 0..1; None where nothing counts (no such picture, no such answer).
    taken_for, taken_from: (other class, pictures): its pictures called another class; pictures of another called it.
    """

    name: str
    pictures: int
    recall: float | None
    precision: float | None
    taken_for: tuple[tuple[str, int], ...] = ()
    taken_from: tuple[tuple[str, int], ...] = ()


def new_class_figures(
    classes: Sequence[str], confusion: NDArray[np.int64], added: Sequence[str]
) -> tuple[NewClass, ...]:
    """The figures of the `added` classes; confusion: (classes, classes) pictures, true class by predicted class."""
    found = []
    for name in added:
        place = list(classes).index(name)
        row, column = confusion[place].astype(np.int64), confusion[:, place].astype(np.int64)
        right, pictures, answers = int(row[place]), int(row.sum()), int(column.sum())
        found.append(
            NewClass(
                name=name,
                pictures=pictures,
                recall=right / pictures if pictures else None,
                precision=right / answers if answers else None,
                taken_for=others(classes, row, place),
                taken_from=others(classes, column, place),
            )
        )
    return tuple(found)


def others(classes: Sequence[str], counts: NDArray[np.int64], place: int) -> tuple[tuple[str, int], ...]:
    """The other classes with pictures in a row or column of a confusion matrix, the most first."""
    some = [(int(count), name) for at, (name, count) in enumerate(zip(classes, counts, strict=True)) if count and at != place]
    return tuple((name, count) for count, name in sorted(some, key=lambda one: (-one[0], one[1])))


def new_class_of_json(found: Mapping[str, Any]) -> NewClass:
    """The NewClass that a decision's JSON holds."""
    pairs = {side: tuple((name, count) for name, count in found[side]) for side in ("taken_for", "taken_from")}
    return NewClass(**{**found, **pairs})


def new_class_text(found: Mapping[str, Any]) -> str:
    """A new class's figures (a NewClass as JSON has it) in a sentence."""
    name = repr(found["name"])
    if not found["pictures"]:
        return f"new class {name}: no picture on test" + confused("called it", found["taken_from"])
    recall = f"recall {100 * found['recall']:.1f} %"
    precision = "never answered" if found["precision"] is None else f"precision {100 * found['precision']:.1f} %"
    return (
        f"new class {name}: {recall}, {precision} on {found['pictures']:,} test pictures of it"
        + confused("taken for", found["taken_for"])
        + confused("taken from", found["taken_from"])
    )


def confused(words: str, pairs: Sequence[Sequence[Any]]) -> str:
    """Confusions as the end of a sentence: "; taken for 'cat' 3 times, 'dog' 1 time"."""
    if not pairs:
        return ""
    named = ", ".join(f"{name!r} {count:,} time{'' if count == 1 else 's'}" for name, count in pairs[:MOST_CONFUSED])
    return f"; {words} {named}" + (", ..." if len(pairs) > MOST_CONFUSED else "")


def grown_words(old: Sequence[str], new: Sequence[str]) -> str | None:
    """What a challenger's classes add to the champion's, in words; None where they add none, or are not comparable."""
    added = added_classes(old, new)
    return f"{spoken_classes(added)} {'is' if len(added) == 1 else 'are'} new since the champion" if added else None
