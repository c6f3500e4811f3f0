"""Whether a classifier's classes are a store's: how often it is right about the store's rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from evalsuite.accuracy import guessing, macro_guessing
from evalsuite.detectors._moments import pieces
from evalsuite.intervals import macro_share
from evalsuite.neighbours.index import evenly_spread
from featcache.classes import Classes, match, numbers_of
from featcache.rows import Rows

_ABOVE = 0.1  # the share of the way from chance to 1 that a classifier of few classes is expected to go
_LEAST_ROWS = 10  # predicted as one class, to say that it is another
_OTHERS = 0.5  # the share of them that are one other class, above which this is said
_JUDGED = 10_000  # rows of id_train that a head is judged on, where id_test has no labels


class Judged:
    """The accuracy of `rows.head`, or without one of the logits that the store has, on the labelled ones of `rows`.

    `bank` holds the rows that detectors are fitted to; `role` is the part that `rows` play, for messages. Logits whose
    classes the store does not name are judged where they are as many as its classes, which are then taken to be in that order; so is
    a head without class names.
    """

    def __init__(self, rows: Rows, bank: Rows, role: str) -> None:
        self._rows, self.role = rows, role
        labels = np.concatenate([bank.labels, rows.labels])
        self._known = len(np.unique(labels[labels >= 0]) if rows.class_names is None else rows.class_names)
        self._whose = "the stored logits" if rows.head is None else f"head {rows.head.name}"
        self._predicted: list[Int[np.ndarray, " _"]] = []

    @classmethod
    def on(cls, train: Rows, test: Rows) -> Judged:
        """Of `test`, while that is scored; where it has no labels and there is a head, of some labelled rows of `train`."""
        labelled = np.flatnonzero(train.labels >= 0)
        if (test.labels >= 0).any() or train.head is None or not len(labelled):
            return cls(test, train, "id_test")
        some = train.pick(labelled[evenly_spread(len(labelled), _JUDGED)])
        judged = cls(some, train, "id_train")
        for block in some.blocks_of(("embedding",)):
            judged.see(block)
        return judged

    def see(self, block: Mapping[str, Float[np.ndarray, "_ d"]]) -> None:
        """One block of the rows, in order: their embeddings, and logits where they are at hand."""
        head = self._rows.head
        if "logits" in block:
            self._classes = block["logits"].shape[1]
            self._predicted.append(block["logits"].argmax(axis=1))
        elif head is not None:
            self._classes = len(head.bias)
            self._predicted += [head.logits(x).argmax(axis=1) for x in pieces(block["embedding"], self._classes)]

    def record(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The accuracy with its chance level, number of rows and how classes were matched, for a result file; and a
        remark. None, and perhaps a remark why, where it cannot be told. Warns where it is next to chance, or one
        predicted class mostly another."""
        labelled = self._rows.labels >= 0
        predicted = np.concatenate([np.empty(0, np.int64), *self._predicted])
        if not labelled.any() or len(predicted) < len(labelled):  # not one row, or not all, had logits
            return None, []
        where = f"{self.role} {self._rows.name}"
        try:
            numbers, by = self._numbers()
        except ValueError as error:
            return None, [f"{self._whose}: its accuracy on {where} cannot be told: {error}"]
        if numbers is None:
            why = f"it has {self._classes:,} classes without names that are matched, and the store {self._known:,}"
            of_head = self._rows.head is not None
            return None, [f"{self._whose}: its accuracy on {where} cannot be told: {why}"] if of_head else []
        truth = self._rows.labels[labelled]
        predicted = predicted[labelled]
        if not np.isin(truth, numbers).any():
            return None, [f"{self._whose}: its accuracy on {where} cannot be told: they have no class in common"]
        right = numbers[predicted] == truth
        accuracy, chance = float(right.mean()), guessing(truth, numbers)
        # Of the mean over classes too: where one class has nearly all rows, a good classifier may be right no more often.
        each_class = macro_share(right, truth).value, macro_guessing(truth, numbers)
        said = f"{self._whose}: right on {accuracy:.4f} of the {len(truth):,} labelled rows of {where}"
        if by == "number":
            said += ", its classes matched by number"
        remark = f"{said} (chance {chance:.4f})"
        if near_chance(accuracy, chance, len(truth)) and near_chance(*each_class, len(truth)):
            warnings.warn(
                f"{said}, next to chance ({chance:.4f}): its classes, their order or its encoder seem to be others; fit a "
                "head with `evalsuite probe … --save FILE`",
                RuntimeWarning,
                stacklevel=3,
            )
        elif mixed := self._mixed(numbers, predicted, truth):
            warnings.warn(
                f"{self._whose}: {mixed} in {where}: its classes seem to be in another order; give it their names "
                "(`evalsuite probe … --save FILE` does)",
                RuntimeWarning,
                stacklevel=3,
            )
        return {"top1": accuracy, "chance": chance, "rows": len(truth), "of": self.role, "classes_by": by}, [remark]

    def _numbers(self) -> tuple[Int[np.ndarray, " c"] | None, str]:
        head, same = self._rows.head, self._classes == self._known
        if head is None and (names := self._rows.logit_classes) is not None:
            columns = Classes(self._whose, np.arange(self._classes), names)
            return np.array(
                [-1 if each is None else each for each in match(columns, Classes.of(self._rows)).values()]
            ), "name"
        if head is None:
            return (np.arange(self._classes) if same else None), "number"
        numbers, by = numbers_of(head, Classes.of(self._rows))
        own = head.class_names == list(map(str, head.labels.tolist())) and self._rows.class_names is None
        return (numbers if by == "name" or own or same else None), by

    def _mixed(self, numbers: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> str:
        """A class as which mostly rows of one other are predicted, and hardly any of its own, in words."""
        classes = Classes.of(self._rows)
        for own in np.unique(predicted):
            labels, rows = np.unique(truth[predicted == own], return_counts=True)
            total, most = rows.sum(), rows.argmax()
            right = rows[labels == numbers[own]].sum()
            if numbers[own] >= 0 and total >= _LEAST_ROWS and rows[most] > _OTHERS * total and right < _ABOVE * total:
                names = classes.name(int(numbers[own])), classes.name(int(labels[most]))
                return f"{rows[most]:,} of {total:,} rows that it takes for {names[0]} are {names[1]}"
        return ""


def near_chance(accuracy: float, chance: float, rows: int) -> bool:
    """Whether the accuracy is within two standard errors of chance, or so close to it that with few classes the order
    of some must be wrong; of rows of one class, whether most are wrong."""
    if chance >= 1:
        return accuracy < 0.5
    error = math.sqrt(chance * (1 - chance) / rows)
    return accuracy <= chance + 2 * error or (accuracy < 3 * chance and accuracy - chance < _ABOVE * (1 - chance))
