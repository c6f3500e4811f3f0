"""Means of estimates, and differences of two on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from evalsuite.intervals.estimate import PRIOR_ROWS, Estimate, Part, Z, equal_rows, student


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of estimates in [0, 1], whose influences are of the same rows where their source is the same."""
    if len(estimates) == 1:
        return estimates[0]
    value = float(np.mean([each.value for each in estimates]))
    for each in estimates:
        if each.none is not None:
            return Estimate(value, {}, each.none)
    parts: dict[str, Part] = {}
    for source in dict.fromkeys(source for each in estimates for source in each.parts):
        of = [each.parts[source] for each in estimates if source in each.parts]
        influence = np.stack([part.influence for part in of])
        correlation = _correlation(influence)
        down, up = (
            math.sqrt(max(0.0, far @ correlation @ far)) / len(estimates)
            for far in (np.array([part.down for part in of]), np.array([part.up for part in of]))
        )
        parts[source] = Part(down, up, influence.sum(axis=0) / len(estimates))
    return Estimate(value, parts)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """b − a, of two estimates whose influences are of the same rows: samples that were measured twice.

    Of rows that are right or wrong this is Tango's score interval (1998, Statistics in Medicine 17, 891–908), which
    leaves out 0 where McNemar's test tells the two apart. Else it is Student's of the influences' differences, for the
    AUROC DeLong, DeLong and Clarke-Pearson's; where few rows differ, it is widened towards what no differing row among
    n gives, ± z² / (n + z²) (Tango); but for means of numbers in any range, which have no such scale.
    """
    value = b.value - a.value
    if (none := a.none or b.none) is not None:
        return Estimate(value, {}, none)
    if a.counts and b.counts:
        ((source, ours),), (theirs,) = a.parts.items(), b.parts.values()
        influence = theirs.influence - ours.influence
        return Estimate(value, {source: Part(*_tango(influence), influence)}, least=-1.0)
    parts: dict[str, Part] = {}
    for source in a.parts:
        influence = b.parts[source].influence - a.parts[source].influence
        differing, n = equal_rows(np.abs(influence)), len(influence)
        guard = PRIOR_ROWS / (differing + PRIOR_ROWS) * Z**2 / (n + Z**2) if a.least > -math.inf else 0.0
        half = math.hypot(student(n - 1) * float(influence.std(ddof=1)) / math.sqrt(n), guard) if n > 1 else 1.0
        parts[source] = Part(half, half, influence)
    return Estimate(value, parts, least=b.least - a.most, most=b.most - a.least)


def _tango(difference: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Tango's score interval of a paired difference of shares, as distances below and above it."""
    n, gained, lost = len(difference), int((difference > 0).sum()), int((difference < 0).sum())

    def distance(up: bool) -> float:
        more, less = (gained, lost) if up else (lost, gained)
        value = (more - less) / n
        low, high = value, 1.0
        for _ in range(50):
            delta = (low + high) / 2
            b, c = (2 * n - more + less) * delta - more - less, -less * delta * (1 - delta)
            rare = (math.sqrt(b * b - 8 * n * c) - b) / (4 * n)
            spread = math.sqrt(max(0.0, n * (2 * rare + delta * (1 - delta))))
            low, high = (delta, high) if n * delta - (more - less) <= Z * spread else (low, delta)
        return high - value

    return distance(up=False), distance(up=True)


def _correlation(rows: Float[np.ndarray, "e n"], unknown: float = 1.0) -> Float[np.ndarray, "e e"]:
    """Between rows; `unknown` where one of two is constant."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1)
    product = np.outer(length, length)
    found = np.divide(centred @ centred.T, product, out=np.full(product.shape, unknown), where=product > 0)
    np.fill_diagonal(found, 1.0)
    return found.clip(-1, 1)
