"""An estimate, and the score interval that most of them have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from evalsuite.result import Metric

LEAST_ROWS = 5
"""ID or OOD rows below which areas and FPR@95 get no interval."""

Z = NormalDist().inv_cdf(0.975)
PRIOR_ROWS = 1.0  # what the variance where no row speaks counts as, against the rows that speak for and against
_FEW = 5.0  # right or wrong rows under which the nearer bound is that of a Poisson count
_CORRECTED = 20.0  # rows below which Wilson's bounds are corrected for continuity (Newcombe's method 4)


@dataclass(frozen=True)
class Part:
    """What the rows of one source do to an estimate: how far it may lie above (`down`) and below (`up`) the truth for
    their sake, and each row's influence, up to a factor and a constant."""

    down: float
    up: float
    influence: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Estimate:
    """A value in [`least`, `most`], and by source its `Part`; or, in `none`, why it has no interval."""

    value: float
    parts: Mapping[str, Part]
    none: str | None = None
    least: float = 0.0
    most: float = 1.0
    counts: bool = False  # of rows that are right or wrong, and nothing else

    @property
    def ci95(self) -> tuple[float, float] | None:
        if self.none is not None:
            return None
        down, up = (math.sqrt(sum(getattr(part, side) ** 2 for part in self.parts.values())) for side in ("down", "up"))
        return max(self.least, self.value - down), min(self.most, self.value + up)

    def metric(self) -> Metric:
        return Metric(self.value, self.ci95, self.none)


@dataclass(frozen=True)
class Side:
    """One source's rows: their influences, how many `speak` against the value or for it, whichever are fewer, and the
    variance that a value p may have where none does, over p (1 − p)."""

    influence: Float[np.ndarray, " n"]
    speaking: float
    model: float


def blended(value: float, sides: Mapping[str, Side], bias: float = 0.0) -> Estimate:
    """The score interval of a value in [0, 1] that is `bias` too high; see the module."""
    few = min(len(side.influence) for side in sides.values())
    if few < LEAST_ROWS:
        return Estimate(value, {}, f"{few} rows, fewer than {LEAST_ROWS}")
    spread = value * (1 - value)
    inverse = {
        source: shrunk(
            float(side.influence.var(ddof=1)) / len(side.influence) / spread if spread > 0 else 0.0,
            side.model,
            side.speaking,
        )
        for source, side in sides.items()
    }
    total = sum(inverse.values())
    rows = 1 / min(total, max(side.model for side in sides.values()))
    down, up = score_bounds(value, rows * (Z / student(few - 1)) ** 2)
    down = min(down + bias, value)
    return Estimate(
        value,
        {
            source: Part(down * math.sqrt(part / total), up * math.sqrt(part / total), sides[source].influence)
            for source, part in inverse.items()
        },
    )


def score_bounds(p: float, n: int | float) -> tuple[float, float]:
    """How far Wilson's bounds of the share p of n rows, which need not be whole, lie below and above it. Of the rows
    that are right or wrong, where they are fewer than `_FEW`, the least number is Garwood's of a Poisson count, as Brown,
    Cai and DasGupta modify the score interval."""
    if p > 0.5:
        return score_bounds(1 - p, n)[::-1]
    moved = 0.5 / n if n < _CORRECTED else 0.0

    def bound(p: float, side: int) -> float:
        half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n * n))
        return (p + Z**2 / (2 * n) + side * half) / (1 + Z**2 / n)

    low = bound(max(p - moved, 0.0), -1) if n * p >= _FEW else _least_count(n * p) / n
    return p - max(low, 0.0), min(bound(p + moved, 1), 1.0) - p


def _least_count(found: float) -> float:
    """The mean under which a Poisson count reaches `found`, which need not be whole, with a probability of 2.5 %
    (Garwood 1936, Biometrika 28, 437–442)."""
    if found < 1e-9:
        return 0.0
    low, high = 0.0, found
    while high - low > 1e-7 * found:
        mean = (low + high) / 2
        term = math.exp(found * math.log(mean) - mean - math.lgamma(found + 1))
        reached, i = term, found
        while term > 1e-9:
            i += 1
            term *= mean / i
            reached += term
        low, high = (low, mean) if reached > 0.025 else (mean, high)
    return low


def shrunk(estimated: float, model: float, speaking: float) -> float:
    """The variance of `speaking` rows and that of the model, which counts as one row."""
    return (speaking * estimated + PRIOR_ROWS * model) / (speaking + PRIOR_ROWS)


def student(freedom: int) -> float:
    """The 97.5th percentile of Student's t (Abramowitz and Stegun 26.7.5), for 40 degrees of freedom or more to 1e-4."""
    z, v = Z, freedom
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v * v)


def equal_rows(weights: Float[np.ndarray, " n"]) -> float:
    """How many rows of equal weight tell as much as these (Kish)."""
    total = float(weights.sum())
    return total * total / float(weights @ weights) if total > 0 else 0.0
