"""Of means of numbers in any range, each row with its weight."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from jaxtyping import Float

from evalsuite.intervals.estimate import Estimate, Part, student
from evalsuite.intervals.shares import LEAST_FOR_MEAN


def mean(values: Float[np.ndarray, " n"], weight: Float[np.ndarray, " n"] | None = None) -> Estimate:
    """Σ wᵢ xᵢ / Σ wᵢ over rows, which are drawn whole: of nats a token and w tokens a row, nats a token of all of them.

    A row's influence is that on the ratio, n wᵢ (xᵢ − mean) / Σ w (Cochran 1977, "Sampling Techniques", 6.4); the interval is
    Student's of these, corrected for their third moment as by `hall`. Rows of weight 0 are none. No interval for fewer than
    `LEAST_FOR_MEAN` rows or values that are all the same. Raises `ValueError` where no row has a weight.
    """
    weight = np.ones(len(values)) if weight is None else weight
    n, total = int((weight > 0).sum()), float(weight.sum())
    if not total > 0:
        raise ValueError("no row has a weight above 0: a mean needs at least one")
    value = float(weight @ values) / total
    estimate = partial(Estimate, value, least=-math.inf, most=math.inf)
    if n < LEAST_FOR_MEAN:
        return estimate({}, none=f"{n} rows, fewer than {LEAST_FOR_MEAN}")
    influence = weight * (values - value) * (n / total)
    if not (spread := influence[weight > 0]).std() > 1e-12 * abs(value):
        return estimate({}, none=f"all of the {n:,} values are the same")
    return estimate({"rows": Part(*hall(spread), influence)})


def hall(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """How far the mean of n numbers may lie above and below the truth: Student's interval, corrected for the third moment by Hall's
    transformation (1992, JRSS B 54, 221–228)."""
    n, value, spread = len(values), float(values.mean()), float(values.std(ddof=1))
    skew = float(((values - value) ** 3).mean()) / spread**3 / math.sqrt(n)

    def studentised(y: float) -> float:
        """Hall's g⁻¹: what Student's ratio is where its transform, which is nearly normal, is y."""
        return y if abs(skew) < 1e-6 else 3 / skew * (float(np.cbrt(1 + skew * (y - skew / 6))) - 1)

    bound = student(n - 1)
    down, up = (abs(studentised(y)) * spread / math.sqrt(n) for y in (bound, -bound))
    return down, up
