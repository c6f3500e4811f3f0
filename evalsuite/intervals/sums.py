"""Of ratios of sums over images, such as the IoU: the images are drawn again."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from evalsuite.intervals.estimate import LEAST_ROWS, Estimate, Part

DRAWS = 1000
_BLOCK = 2**24  # images drawn at once


def ratio_of_sums(
    part: Float[np.ndarray, "n c"] | Int[np.ndarray, "n c"],
    whole: Float[np.ndarray, "n c"] | Int[np.ndarray, "n c"],
    seed: int = 0,
) -> Estimate:
    """The mean over columns of Σ part / Σ whole, each in [0, 1], over n images; every column's Σ whole is above 0.

    The interval is that of the percentiles of 1,000 bootstrap samples of whole images, as pixels of one image are not drawn by
    themselves; in a sample, columns without any `whole` are left out. An image's influence is that of the linearised ratio,
    n (part − ratio · whole) / Σ whole (Woodruff 1971, JASA 66, 411–414), by which two of the same images are compared. There is
    no interval for fewer than 5 images, nor where all samples are the same.
    """
    n, (parts, wholes) = len(part), (np.asarray(each, np.float64) for each in (part, whole))
    ratio = parts.sum(axis=0) / wholes.sum(axis=0)
    value = float(ratio.mean())
    if n < LEAST_ROWS:
        return Estimate(value, {}, f"{n} images, fewer than {LEAST_ROWS}")
    rng, found = np.random.default_rng(seed), []
    for start in range(0, DRAWS, step := max(1, _BLOCK // n)):
        times = rng.multinomial(n, np.full(n, 1 / n), size=min(step, DRAWS - start)).astype(np.float64)
        over, under = times @ parts, times @ wholes
        found.append(np.nanmean(np.divide(over, under, where=under > 0, out=np.full_like(over, np.nan)), axis=1))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    if low == high:
        return Estimate(value, {}, f"all of {n:,} images are alike")
    influence = (n * (parts - ratio * wholes) / wholes.sum(axis=0)).mean(axis=1)
    return Estimate(value, {"images": Part(max(0.0, value - low), max(0.0, high - value), influence)})
