"""The order of a model's classes: part of the model for ever; classes that come later are appended, the old ones stay."""

from collections.abc import Sequence


def grown_order(known: Sequence[str], present: Sequence[str]) -> tuple[str, ...]:
    """The classes `present`: those of `known` first, in its order, then the others sorted by name."""
    there = set(present)
    kept = [name for name in known if name in there]
    return (*kept, *sorted(there.difference(kept)))


def added_classes(old: Sequence[str], new: Sequence[str]) -> tuple[str, ...] | None:
    """What `new` has after all of `old` in old's own order, () where both are the same; None where it does not begin so."""
    return tuple(new[len(old) :]) if tuple(new[: len(old)]) == tuple(old) else None


def spoken_classes(names: Sequence[str]) -> str:
    """Classes for a sentence: "class 'fox'", "classes 'bee', 'fox'"."""
    return f"class{'es' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
