"""Of probabilities: cross-entropy, calibration, and what is right among the rows that a classifier is surest of."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.intervals.estimate import LEAST_ROWS, PRIOR_ROWS, Estimate, Part, Side, Z, blended, equal_rows, student
from evalsuite.intervals.means import hall
from evalsuite.intervals.shares import LEAST_FOR_MEAN

_LEAST_IN_BIN = 10  # rows for each bin of a calibration error, below which it has no interval
_NEAR = 0.05  # the share of all rows on each side of a threshold by which the accuracy at it is told


def nll(values: Float[np.ndarray, " n"]) -> Estimate:
    """The mean cross-entropy, in nats, of rows that have these values, each −log of the probability of its class.

    A few rows of high cross-entropy decide: the interval is `hall`'s. None for fewer than `LEAST_FOR_MEAN` rows, or where fewer than `LEAST_ROWS` have a class of a
    probability under ½: how far such rows spread is then not seen. Raises `ValueError` for no rows.
    """
    if values.size == 0:
        raise ValueError("there are no rows: a mean needs at least one")
    n, value = len(values), float(values.mean())
    if n < LEAST_FOR_MEAN:
        return Estimate(value, {}, f"{n} rows, fewer than {LEAST_FOR_MEAN}", most=math.inf)
    if (decisive := int((values > math.log(2)).sum())) < LEAST_ROWS:
        few = f"{decisive} rows have a class of a probability under ½, fewer than {LEAST_ROWS}"
        return Estimate(value, {}, few, most=math.inf)
    if float(values.std(ddof=1)) == 0:
        return Estimate(value, {}, f"all of the {n:,} values are the same", most=math.inf)
    return Estimate(value, {"rows": Part(*hall(values), values)}, most=math.inf)


def calibration_error(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int) -> Estimate:
    """The expected calibration error of rows with this probability of the predicted class, in [0, 1]: over `bins` of equal
    width, the first from 0, each with its upper end, Σ (rows of the bin / n) |mean confidence − accuracy|
    (Guo et al. 2017, arXiv 1706.04599).

    What is measured is too high, the more so the fewer rows a bin has: noise counts as error. The interval is that of the error
    of infinitely many rows in the same bins. Its lower end allows for the mean of |x| of a normal x being above |mean of x|,
    each bin's own error being taken for √(error² − variance). None for fewer than ten times as many rows as bins.
    """
    n, (of_bin, error) = len(right), binned(confidence, right, bins)
    value = float(np.abs(error).sum())
    if n < (least := _LEAST_IN_BIN * bins):
        return Estimate(value, {}, f"{n} rows in {bins} bins, fewer than {least}")
    apart = confidence - right
    influence = np.where(error < 0, -1.0, 1.0)[of_bin] * apart
    noise = np.sqrt(np.maximum(np.bincount(of_bin, apart**2, bins) / n - error**2, 0) / n)
    guard = PRIOR_ROWS / (equal_rows(np.abs(apart)) + PRIOR_ROWS) * Z**2 / (n + Z**2)
    half = math.hypot(student(n - 1) * float(influence.std(ddof=1)) / math.sqrt(n), guard)
    too_high = sum(_raised(abs(float(e)) / s) * s for e, s in zip(error, noise.tolist(), strict=True) if s > 0)
    return Estimate(value, {"rows": Part(half + too_high, half, influence)})


def binned(
    confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " bins"]]:
    """Each row's bin, and by bin Σ (confidence − right) / n."""
    of_bin = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    return of_bin, np.bincount(of_bin, confidence - right, bins) / len(right)


def _raised(seen: float) -> float:
    """By how much E|x| is above |E x| of a normal x of variance 1, one of whose values is `seen`."""
    mean = math.sqrt(max(seen * seen - 1, 0.0))
    density, beyond = math.exp(-mean * mean / 2) / math.sqrt(2 * math.pi), math.erfc(mean / math.sqrt(2)) / 2
    return 2 * (density - mean * beyond)


def risk_coverage(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The share of errors among the k surest rows, k = 1 … n: the mean over all orders of rows of equal confidence."""
    _, of_row, rows = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(of_row, ~right) / rows
    risk: np.ndarray = np.repeat(wrong, rows).cumsum() / np.arange(1, len(right) + 1)
    return risk


def aurc(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> Estimate:
    """The area under the risk-coverage curve, the mean of `risk_coverage` over k, in [0, 1]: lower is better
    (Geifman, Uziel and El-Yaniv 2019, arXiv 1805.08206).

    The variance is that of the rows' influences. Of infinitely many rows the area is E[wrong · −ln c], c being the share of rows
    at least as sure; errors among the surest few count most, which is what one row may change where none is wrong.
    """
    n, value = len(right), float(risk_coverage(confidence, right).mean())
    _, of_row, rows = np.unique(-confidence, return_inverse=True, return_counts=True)
    at_least = rows.cumsum() / n  # as sure, by confidence, the highest first
    own = -np.log(at_least - rows / n / 2)[of_row] * ~right
    lost = (np.bincount(of_row, ~right) / at_least)[::-1].cumsum()[::-1] / n  # of errors no surer than this row
    speaking = equal_rows(own)
    return blended(value, {"rows": Side(own - lost[of_row], speaking, 2 / n)})


def selective_accuracy(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], coverage: float) -> Estimate:
    """The accuracy on the ⌈`coverage` · n⌉ rows of the highest confidence; of rows tied with the last of them the share that
    there is room for. In [0, 1] (Geifman and El-Yaniv 2017, arXiv 1705.08500, "selective risk" at a coverage, from 1).

    The threshold varies with the rows: those of more confidence count by how far they are from the accuracy at it, told by the
    twentieth of all rows on either side of it.
    """
    order, chosen = np.argsort(-confidence, kind="stable"), surest(confidence, coverage)
    n, k = len(right), int(chosen.sum())
    value = 1 - float(risk_coverage(confidence, right)[k - 1])
    near = max(1, round(_NEAR * n))
    at_threshold = float(right[order[max(0, k - near) : k + near]].mean())
    influence = n / k * chosen * (right - at_threshold)
    wrong = (1 - value) * k
    return blended(value, {"rows": Side(influence, min(wrong, k - wrong), 1 / k)})


def surest(confidence: Float[np.ndarray, " n"], coverage: float) -> Bool[np.ndarray, " n"]:
    """Which rows are the ⌈`coverage` · n⌉ of the highest confidence; of equal ones the first."""
    chosen = np.zeros(len(confidence), bool)
    chosen[np.argsort(-confidence, kind="stable")[: math.ceil(round(coverage * len(confidence), 9))]] = True
    return chosen
