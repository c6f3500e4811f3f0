"""Whether float16 is enough for some features: does rounding them lose what tells their rows apart?

float16 has 11 significant bits. Of features around zero it loses nothing that matters: each row moves by 1/4000 of its
length. Of 1000 + 0.1·x it keeps nothing of x, of values under 6e-8 or over 65504 nothing at all. So rounding is measured
against what evaluators and students read, which is differences: between the values of a dimension, between those of a
row, and between a row and its nearest neighbour.
"""

import numpy as np
from jaxtyping import Float

TOLERANCE = 0.01
"""Of the spread of a dimension's or a row's values, the part that rounding may have."""
NEAR_TOLERANCE = 0.1
"""Of the distance between near rows, the part by which rounding may change it."""
SAMPLED = 2048
"""Rows whose nearest neighbours, among themselves, are looked at."""


class Rounding:
    """What rounding to `dtype` does to the rows of one field, read block by block.

    Args:
        rows: how many there will be, of all blocks.
        dtype: float16, or float32 for wider values.
    """

    def __init__(self, rows: int, dtype: str = "float16"):
        self._dtype, self._seen = np.dtype(dtype), 0
        self._sampled = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLED])
        self._kept: list[np.ndarray] = []
        self._mean = self._scatter = np.zeros((2, 1))  # of values and of errors, by dimension
        self._beyond = self._moved = False

    def update(self, values: Float[np.ndarray, "n d"]) -> None:
        """The next rows, all finite."""
        wide = np.asarray(values, np.float64)
        rounded = rounded_to(values, self._dtype).astype(np.float64)
        self._beyond |= not bool(np.isfinite(rounded).all())
        if self._beyond:
            return
        moved = np.linalg.norm(rounded - wide, axis=1) > TOLERANCE * np.linalg.norm(wide, axis=1)
        self._moved |= bool(moved.any())
        if len(wide):  # merged as by Chan et al. 1983: a large mean takes no digits
            both, before, after = np.stack([wide, rounded - wide]), self._seen, self._seen + len(wide)
            mean = both.mean(axis=1)
            apart = mean - self._mean
            self._scatter = (
                self._scatter + ((both - mean[:, None]) ** 2).sum(axis=1) + apart**2 * (before * len(wide) / after)
            )
            self._mean = self._mean + apart * (len(wide) / after)
        here = np.searchsorted(self._sampled, [self._seen, self._seen + len(wide)])
        self._kept.append(wide[self._sampled[slice(*here)] - self._seen])
        self._seen += len(wide)

    def loses(self) -> str:
        """What is lost that matters, in words; "" when nothing is."""
        if self._beyond:
            return f"values are beyond {self._dtype} (±{np.finfo(self._dtype).max:g})"
        if self._moved:
            return f"{self._dtype} moves a row by more than {TOLERANCE:.0%} of its length"
        if not self._seen:
            return ""
        spread, moved = np.sqrt(self._scatter / self._seen)
        # Where a dimension is constant, all rows are rounded alike, but for what the sums themselves round.
        if (moved > np.maximum(TOLERANCE * spread, 1e-13 * np.abs(self._mean[0]))).any():
            at = int(np.argmax(moved / np.where(spread > 0, spread, np.inf)))
            return f"{self._dtype} rounds away what varies in dimension {at}"
        sample = np.concatenate(self._kept)
        error = rounded_to(sample, self._dtype) - sample
        across = error.std(axis=1) > TOLERANCE * sample.std(axis=1)
        if across.mean() > 0.5:
            return f"{self._dtype} rounds away what varies within rows"
        nearest, distance = _nearest(sample)
        other = np.isfinite(distance)
        changed = np.linalg.norm(error - error[nearest], axis=1)[other] > NEAR_TOLERANCE * distance[other]
        if changed.any() and changed.mean() > 0.5:
            return f"{self._dtype} rounds away what tells near rows apart"
        return ""


def share_lost(values: Float[np.ndarray, "n d"]) -> float:
    """Of the spread of a few rows around their mean, the part that rounding to float16 has; infinite beyond its range.

    Of rows that are all but the same, 0: nothing is known of what tells others apart.
    """
    wide = np.asarray(values, np.float64)
    error = rounded_to(wide, "float16") - wide
    if not np.isfinite(error).all():
        return np.inf
    spread = np.linalg.norm(wide - wide.mean(axis=0))
    return float(np.linalg.norm(error - error.mean(axis=0)) / spread) if spread > 2e-6 * np.linalg.norm(wide) else 0.0


def rounded_to(values: np.ndarray, dtype: str | np.dtype) -> np.ndarray:
    """In another dtype, infinite where it is beyond."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(values).astype(dtype)


def _nearest(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, the nearest other one that is not the same, and how far it is; infinitely far where there is none."""
    rows = rows - rows.mean(axis=0)
    length = (rows**2).sum(axis=1)
    square = length[:, None] + length - 2 * rows @ rows.T
    square[square <= 1e-13 * (length[:, None] + length)] = np.inf  # itself, and its copies
    nearest = square.argmin(axis=1)
    return nearest, np.sqrt(square[np.arange(len(rows)), nearest])
