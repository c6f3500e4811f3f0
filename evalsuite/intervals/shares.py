"""Means over rows: of shares, of the accuracies of classes, of cosines; and agreement."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.intervals.estimate import Estimate, Part, Side, blended, equal_rows, score_bounds, shrunk, student

LEAST_FOR_MEAN = 50
"""Rows below which a mean of cosines gets no interval."""

_LEAST_DECISIVE = 10  # a macro average's rows, each counted in proportion to its weight
_MOST_SINGLE = 0.25  # of a macro average's variance, the share of classes with one row


def share(values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"], source: str = "rows") -> Estimate:
    """The mean of values in [0, 1], one a row: an accuracy (right or wrong) or a mean of shares.

    Of right and wrong answers this is the score interval: its coverage is at least 92.8 % for every n and p, and 93 to
    97 % where ten rows or more are to be expected right and wrong. Of other shares there is none for fewer than
    `LEAST_ROWS`. Raises `ValueError` for no rows.
    """
    if values.size == 0:
        raise ValueError("there are no rows: a mean needs at least one")
    values = np.asarray(values, np.float64)
    n, value = len(values), float(values.mean())
    if ((values == 0) | (values == 1)).all():
        return Estimate(value, {source: Part(*score_bounds(value, n), values)}, counts=True)
    return blended(value, {source: Side(values, min(equal_rows(values), equal_rows(1 - values)), 1 / n)})


def macro_share(correct: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Estimate:
    """The unweighted mean over the classes that occur in `labels` of the accuracy within each.

    The variance is the stratified one, Σ p (1 − p) / (n − 1) over the classes (Cochran 1977, "Sampling Techniques",
    §5.9); a class with one row, whose variance nothing tells, counts as one of the mean accuracy. Where no row
    speaks, classes are taken to be alike. There is no interval where more than a
    quarter of the variance is to be expected of classes with one row, or where the smallest classes decide with fewer
    than 10 rows. Raises `ValueError` for no rows.
    """
    if correct.size == 0:
        raise ValueError("there are no rows: a mean needs at least one")
    _, of_row, rows = np.unique(labels, return_inverse=True, return_counts=True)
    classes, right = len(rows), np.bincount(of_row, weights=correct)
    value = float((right / rows).mean())
    single = int((rows == 1).sum())
    if single > _MOST_SINGLE * (1 / rows).sum():
        return Estimate(value, {}, f"{single:,} of {classes:,} classes have one row, which tells nothing of its class")
    weight = (rows.min() / rows) ** 2  # a row's part in the variance, beside one of the smallest class
    if weight @ rows < _LEAST_DECISIVE:
        return Estimate(value, {}, f"the smallest of {classes:,} classes, with {rows.min():,} rows, decides")
    spread = value * (1 - value)
    within = np.where(rows > 1, right * (rows - right) / (rows * np.maximum(rows - 1, 1)), spread)
    variance = (within / rows).sum() / classes**2
    alike = (1 / rows).sum() / classes**2
    speaking = min(weight @ right, weight @ (rows - right))
    inverse = shrunk(variance / spread if spread else 0.0, alike, speaking)
    return Estimate(value, {"rows": Part(*score_bounds(value, 1 / inverse), np.asarray(correct, np.float64))})


def by_influence(
    value: float, influence: Float[np.ndarray, " n"], least: float = -math.inf, most: float = math.inf
) -> Estimate:
    """A value whose rows have these influences, as its variance says: Student's t. No interval for fewer than `LEAST_FOR_MEAN`
    rows, of which a few far off would not show, nor where all are the same."""
    n = len(influence)
    if n < LEAST_FOR_MEAN:
        return Estimate(value, {}, f"{n} rows, fewer than {LEAST_FOR_MEAN}", least, most)
    half = student(n - 1) * float(influence.std(ddof=1)) / math.sqrt(n)
    if half == 0:
        return Estimate(value, {}, f"all of the {n:,} values are the same", least, most)
    return Estimate(value, {"rows": Part(half, half, influence)}, None, least, most)


def cosine_mean(cosines: Float[np.ndarray, " n"]) -> Estimate:
    """The mean of cosines, one a row, `by_influence`. Raises `ValueError` for no rows."""
    if cosines.size == 0:
        raise ValueError("there are no rows: a mean needs at least one")
    return by_influence(float(cosines.mean()), cosines, -1.0, 1.0)


def kappa(a: Int[np.ndarray, " q"], b: Int[np.ndarray, " q"], n_classes: int) -> Estimate:
    """Cohen's kappa of the classes that two give the same rows: agreement beyond chance, (p − c) / (1 − c).

    The variance is that of the rows' influences, chance included (Fleiss, Cohen and Everitt 1969, Psychological
    Bulletin 72, 323–327); the interval is that of the agreement p with this variance, on kappa's scale. Raises
    `ValueError` where one class has every vote of both, and for no rows.
    """
    of_a, of_b = (np.bincount(votes, minlength=n_classes) / max(1, len(votes)) for votes in (a, b))
    same, chance = a == b, float(of_a @ of_b)
    if not len(a) or chance == 1:
        raise ValueError("kappa is not defined: there are no votes, or all are for one class")
    agreed = float(same.mean())
    influence = same - (1 - agreed) / (1 - chance) * (of_b[a] + of_a[b])
    found = blended(agreed, {"rows": Side(influence, float(min(same.sum(), (~same).sum())), 1 / len(a))})
    parts = {
        source: Part(part.down / (1 - chance), part.up / (1 - chance), influence)
        for source, part in found.parts.items()
    }
    return Estimate((agreed - chance) / (1 - chance), parts, found.none, least=-1.0)
