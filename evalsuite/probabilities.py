"""What a classifier says of rows: its probabilities, by which temperature they are true, and of which classes they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from featcache.classes import Classes, match, numbers_of
from featcache.geometry import logsumexp
from featcache.rows import Rows

COLDEST, HOTTEST = 0.01, 100.0
"""Between these temperatures the best is sought."""
_HALVINGS = 40  # of that interval, in logarithms: to a factor of 1 + 1e-11


@dataclass(frozen=True)
class Said:
    """Of labelled rows, whose class is one of a classifier's columns: `truth`, the column `predicted` (of equal logits the
    first), the `place` of the true one (0: first), `nll`, −ln of its probability, and the `confidence`, the probability of
    the predicted one; both by softmax(logits / temperature)."""

    truth: Int[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]
    place: Int[np.ndarray, " n"]
    nll: Float[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]


class Classifier:
    """The logits of rows with a head, or without one those that their store keeps, and the `classes` of their columns: as the
    head or the encoder names them; else the store's, in the order of their numbers.

    Raises `ValueError` where there are no logits, or stored ones without names are not as many as the store's classes.
    """

    def __init__(self, rows: Rows) -> None:
        rows.require_field("logits")
        self._head = rows.head
        self.name = f"the logits of {rows.name}" if rows.head is None else rows.head.name
        columns = rows.shape_of("logits")[-1] if rows.head is None else len(rows.head.bias)
        self._named = rows.logit_classes is not None
        names = rows.logit_classes or (rows.classes if rows.head is None else list(map(str, rows.head.labels.tolist())))
        if len(names) != columns:
            raise ValueError(
                f"{rows.name} has {columns:,} logits and {len(names):,} classes: which logit is of which class cannot be told; "
                "give a head of its classes (`evalsuite probe … --save FILE`)"
            )
        self.classes = Classes(self.name, np.arange(columns), names)

    def columns(self, rows: Rows) -> tuple[Int[np.ndarray, " n"], str]:
        """The column of each row's class, all of which have a label; and whether classes were matched by `name` or `number`.

        Raises `ValueError` for a class that the classifier does not have.
        """
        classes = Classes.of(rows)
        numbers, by = self._numbers(classes)
        column = {number: at for at, number in enumerate(numbers) if number is not None and number >= 0}
        unknown = [number for number in classes.numbers.tolist() if number not in column]
        if unknown:
            raise ValueError(
                f"{rows.name} has {len(unknown):,} of {len(classes.numbers):,} classes that {self.name} does not have "
                f"({classes.some(unknown)}; it has {self.classes.some()}); name the classes alike, or leave out their rows"
            )
        found, of_row = np.unique(rows.labels, return_inverse=True)
        return np.array([column[number] for number in found.tolist()], np.int64)[of_row], by

    def _numbers(self, classes: Classes) -> tuple[Sequence[int | None], str]:
        """The store's number of each column's class, none or −1 where it has no such class."""
        if self._head is not None:
            numbers, by = numbers_of(self._head, classes)
            return numbers.tolist(), by
        if self._named:
            return list(match(self.classes, classes).values()), "name"
        return range(len(self.classes.numbers)), "number"


def said(
    rows: Rows,
    truth: Int[np.ndarray, " n"],
    temperatures: tuple[float, ...] = (1.0,),
    look: Callable[[Mapping[str, Float[np.ndarray, "_ c"]]], None] = lambda block: None,
) -> list[Said]:
    """What is said of the rows, at each temperature, in one pass; `look` sees their logits block by block."""
    start = 0
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in temperatures]
    for block in rows.blocks_of(["logits"]):
        look(block)
        logits = block["logits"].astype(np.float64)
        true = truth[start : start + len(logits)][:, None]
        start += len(logits)
        own = np.take_along_axis(logits, true, axis=1)
        place = ((logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < true))).sum(axis=1)
        for parts, temperature in zip(found, temperatures, strict=True):
            whole, top = logsumexp(logits / temperature), logits.max(axis=1) / temperature
            parts.append(
                (true[:, 0], logits.argmax(axis=1), place, whole - own[:, 0] / temperature, np.exp(top - whole))
            )
    return [Said(*map(np.concatenate, zip(*parts, strict=True))) for parts in found]


def fit_temperature(rows: Rows, truth: Int[np.ndarray, " n"]) -> float:
    """The T in [`COLDEST`, `HOTTEST`] of the least mean NLL of softmax(logits / T) on these rows (Guo et al. 2017,
    arXiv 1706.04599). The NLL is convex in 1 / T: where its derivative there, the mean of E[logit] − logit of the true class,
    changes its sign. Warns where that is beyond either end. Holds the logits of the rows in memory, as float32."""
    logits = np.concatenate([block["logits"].astype(np.float32) for block in rows.blocks_of(["logits"])])
    of_true = logits[np.arange(len(truth)), truth]
    own, all_right = float(of_true.mean(dtype=np.float64)), bool((of_true == logits.max(axis=1)).all())
    step = max(1, 2**22 // logits.shape[1])

    def expected(inverse: float) -> float:
        """The mean over rows of the mean logit under softmax(logits · inverse)."""
        total = 0.0
        for start in range(0, len(logits), step):
            part = logits[start : start + step].astype(np.float64)
            weight = np.exp(inverse * (part - part.max(axis=1, keepdims=True)))
            total += float(((weight * part).sum(axis=1) / weight.sum(axis=1)).sum())
        return total / len(logits)

    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(float(np.exp(middle))) < own else (low, middle)
    temperature = COLDEST if all_right else float(np.exp(-(low + high) / 2))
    if not 1.001 * COLDEST < temperature < HOTTEST / 1.001:
        why = "(almost) all of its rows are right" if temperature < 1 else "its logits say nothing of their classes"
        warnings.warn(
            f"{rows.name}: the temperature {temperature:.3g} is at the end of those tried, as {why}; fit it to other rows",
            RuntimeWarning,
            stacklevel=3,
        )
    return temperature
