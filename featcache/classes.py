"""Which class of one side is which class of the other: by name where there are names, and what guessing would reach."""

from __future__ import annotations

import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from featcache.head import Head
    from featcache.rows import Rows
else:
    Head = Rows = Any

_SHOWN = 3  # classes named in a message


@dataclass(frozen=True)
class Classes:
    """The classes of a store, corpus or head: their distinct `numbers`, and `names` by number, None where classes are
    only numbers. `whose` they are is for messages.

    Raises `ValueError` when a number has no name.
    """

    whose: str
    numbers: Int[np.ndarray, " c"]
    names: Sequence[str] | None

    def __post_init__(self) -> None:
        if self.names is not None and len(self.numbers) and int(self.numbers.max()) >= len(self.names):
            raise ValueError(
                f"{self.whose} has label {int(self.numbers.max())}, but names for {len(self.names)} classes only; "
                "give every class a name and make it again"
            )

    @classmethod
    def of(cls, rows: Rows) -> Classes:
        """Those that rows have."""
        return cls(rows.name, np.unique(rows.labels[rows.labels >= 0]), rows.class_names)

    def name(self, number: int) -> str:
        return str(number) if self.names is None else str(self.names[number])

    def named(self) -> list[tuple[int, str]]:
        """Number and name of every class that has one, with rows or without; without names, of those with rows."""
        numbers = self.numbers.tolist() if self.names is None else range(len(self.names))
        return [(number, self.name(number)) for number in numbers]

    def distinct_name(self, number: int) -> str:
        """The name, with the number where several classes share it."""
        name = self.name(number)
        shared = self.names is not None and list(self.names).count(name) > 1
        return f"{name} ({number})" if shared else name

    def some(self, numbers: Sequence[int] | np.ndarray | None = None) -> str:
        """Some names, for messages."""
        numbers = self.numbers if numbers is None else np.asarray(numbers)
        named = ", ".join(self.name(int(number)) for number in numbers[:_SHOWN])
        return named + (f", … ({len(numbers):,} in all)" if len(numbers) > _SHOWN else "")


def match(theirs: Classes, ours: Classes) -> dict[int, int | None]:
    """For each of their numbers the number of the same class of ours; None where we have no such class.

    Two that name their classes by the same list, or by numbers only, agree on the numbers. Else names decide: exactly,
    or, with a warning, but for case, spaces and Unicode's form where no more than one class of either side comes into
    question. Where one side has numbers only, its classes are named by them ("0", "1", …), as in corpora whose labels are
    numbers.

    Raises `ValueError` when one side has numbers only that the other's names are not, or several classes have the
    name that is looked for.
    """
    if theirs.names is ours.names or (theirs.names is not None and theirs.names == ours.names):
        return {int(number): int(number) for number in theirs.numbers}
    if (theirs.names is None) != (ours.names is None):
        bare, named = (theirs, ours) if theirs.names is None else (ours, theirs)
        assert named.names is not None
        if not {bare.name(int(number)) for number in bare.numbers} <= set(named.names):
            raise ValueError(
                f"{named.whose} has class names ({named.some()}), {bare.whose} only numbers ({bare.some()}), which may "
                f"count other classes or in another order; give {bare.whose} class names (import labels as words, "
                "write_store(class_names=…)), or make both from corpora labelled alike"
            )
    of_ours: dict[str, list[int]] = {}
    for number, name in ours.named():
        of_ours.setdefault(name, []).append(number)
    times = Counter(name for _, name in theirs.named())
    respelled = _respelled(times, of_ours)
    found: dict[int, int | None] = {}
    near: list[str] = []
    for number in theirs.numbers.tolist():
        name = theirs.name(number)
        own = respelled.get(name, name)
        for side, count in ((theirs, times[name]), (ours, len(of_ours.get(own, ())))):
            if count > 1 and own in of_ours:
                raise ValueError(
                    f"{side.whose} has two classes of one name ({own}); rename one in its corpus and extract again"
                )
        found[number] = of_ours[own][0] if own in of_ours else None
        near += [f"{name!r} and {own!r}"] if name in respelled else []
    if near:
        warnings.warn(
            f"{len(near):,} classes of {theirs.whose} and {ours.whose} are taken for the same though their names differ in "
            f"case or spaces ({', '.join(near[:_SHOWN])}{', …' if len(near) > _SHOWN else ''})",
            UserWarning,
            stacklevel=3,
        )
    return found


def _respelled(theirs: Iterable[str], ours: Iterable[str]) -> dict[str, str]:
    """Each of their names that one of ours, and only one, is but for case, spaces and Unicode's form, and that name."""
    a, b = set(theirs), set(ours)
    rough: tuple[dict[str, list[str]], dict[str, list[str]]] = {}, {}
    for found, names in zip(rough, (a - b, b - a), strict=True):
        for name in names:
            found.setdefault(" ".join(unicodedata.normalize("NFC", name).split()).casefold(), []).append(name)
    return {of[0]: rough[1][key][0] for key, of in rough[0].items() if len(of) == 1 == len(rough[1].get(key, ()))}


def require_common(theirs: Classes, ours: Classes) -> dict[int, int]:
    """`match`, of classes that are all ours.

    Raises `ValueError` as `match` does, and when we have no row of any of their classes, or do not know one.
    """
    found, reached = match(theirs, ours), set(ours.numbers.tolist())
    if not any(number in reached for number in found.values()):
        raise ValueError(
            f"{theirs.whose} and {ours.whose} have no class in common ({theirs.some()} against {ours.some()}), so nothing "
            "could be right; give stores of the same classes, named alike"
        )
    known = {number: own for number, own in found.items() if own is not None}
    unknown = sorted(found.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"{theirs.whose} has {len(unknown)} classes that {ours.whose} does not know ({theirs.some(unknown)}); "
            "name the class folders alike or drop these classes"
        )
    return known


def aligned_labels(bank: Rows, query: Rows) -> Int[np.ndarray, " q"]:
    """The labels of the query, all of whose rows have one, in the bank's numbering. Raises as `require_common`."""
    found = require_common(Classes.of(query), Classes.of(bank))
    numbers, of_row = np.unique(query.labels, return_inverse=True)
    return np.array([found[number] for number in numbers.tolist()], np.int64)[of_row]


def numbers_of(head: Head, store: Classes) -> tuple[Int[np.ndarray, " c"], str]:
    """What number the store gives each of the head's classes, -1 where it has no such class; and whether that is known by
    `name` or only by `number`: where one of the two has no names, and for a head whose names are its own numbers where the
    store has others.

    Raises `ValueError` as `match` does.
    """
    names = head.class_names
    if names is not None and store.names is not None:
        listed = [store.names[label] if label < len(store.names) else None for label in head.labels.tolist()]
        if listed == names:
            return head.labels, "name"
        found = match(Classes(head.name, np.arange(len(names)), names), store)
        numbers = np.array([-1 if number is None else number for number in found.values()], np.int64)
        if (numbers >= 0).any() or names != list(map(str, head.labels.tolist())):
            return numbers, "name"
    return head.labels, "number"


def columns_of(head: Head, labels: Int[np.ndarray, " n"], classes: Classes) -> Int[np.ndarray, " n"]:
    """For each label the row of the head's weight that stands for its class; -1 for −1. `classes` are those of the labels.

    Raises `ValueError` as `match` does, and when the head does not know one of them.
    """
    numbers, by = numbers_of(head, classes)
    unknown = np.setdiff1d(classes.numbers, numbers)
    if len(unknown) and by == "name":
        raise ValueError(
            f"{classes.whose} has {len(unknown)} classes that {head.name} does not know ({classes.some(unknown)}); "
            "fit a head to the same classes, named alike"
        )
    if len(unknown):
        raise ValueError(f"{head.name} knows no class {unknown[0]} of {classes.whose}; fit a head to the same classes")
    order = np.argsort(numbers)
    columns = order[np.searchsorted(numbers, labels, sorter=order).clip(max=len(numbers) - 1)]
    return np.where(labels >= 0, columns, -1)


def ordered(head: Head, classes: Classes) -> Head:
    """The head with one row of its weight for each of `classes`, in their order, and named as they are.

    Raises `ValueError` as `match` does, and when either has a class that the other does not.
    """
    numbers, _ = numbers_of(head, classes)
    own = classes.numbers.tolist()
    missing = [number for number in own if number not in numbers.tolist()]
    if missing or len(numbers) != len(own):
        what = f"lacks {classes.some(missing)}" if missing else f"has {len(numbers) - len(own)} others"
        raise ValueError(
            f"{head.name}: its {len(numbers)} classes are not the {len(own)} of {classes.whose} ({what}); fit a head to rows of "
            "the same classes, named alike"
        )
    order = np.argsort(numbers)
    names = [classes.name(number) for number in own]
    return replace(head, weight=head.weight[order], bias=head.bias[order], labels=np.asarray(own), class_names=names)


def unreachable_remarks(bank: Rows, query: Rows, truth: Int[np.ndarray, " q"], role: str) -> list[str]:
    """One line about the query's rows whose class, in the bank's numbering `truth`, no row of the bank has; none where
    every class has one. `role` is the query's, for the line."""
    lost = ~np.isin(truth, bank.labels)
    if not lost.any():
        return []
    return [
        f"{role} {query.name}: {int(lost.sum()):,} of {len(lost):,} rows are of classes without a row in {bank.name} "
        f"({Classes.of(query).some(np.unique(query.labels[lost]))}): they can never be right, and count as wrong"
    ]
