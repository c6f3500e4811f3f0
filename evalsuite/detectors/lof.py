"""Local outlier factor."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from evalsuite.detectors import Detector
from evalsuite.detectors._nearest import nearest
from evalsuite.detectors._ranges import neighbours, whole
from evalsuite.neighbours.exact import search
from featcache.rows import Rows

_SAME = 1e-3  # rows of norm 1 that are no further apart: float32 cosines cannot tell them from the same


class LOF(Detector):
    """Score = the mean local density of a row's k nearest bank rows over its own, above 0; about 1 for ID rows.

    Rows are scaled to norm 1 and compared by Euclidean distance: the score of scikit-learn's
    `LocalOutlierFactor(n_neighbors=k, novelty=True)` on rows so scaled. A row's density is 1/(mean over its
    neighbours o of max(distance, distance of o to its own k-th neighbour) + 1e-10); distances come from float32
    cosines, so those far below 1 have fewer exact digits than scikit-learn's. Needs no labels. Fitting
    searches the bank for its own neighbours: time grows with n²; n × k neighbours (12 bytes each) are held
    while fitting, two float64 a bank row afterwards.

    Where a bank row has k others or more at its own place, its density would be infinite, and scikit-learn's scores
    mean nothing. Then the bank's distinct rows alone are taken, one of each, as the paper does with its k-distinct-distance
    (all but one for k, where there are no more than k).

    Breunig et al. 2000, "LOF: Identifying Density-Based Local Outliers" (duplicates: section 4, footnote).
    """

    k: int = 20

    def check(self) -> None:
        """Raises `ValueError` unless k is a whole number from 1."""
        whole("lof:k", self.k, 1)

    def fit(self, bank: Rows) -> LOF:
        """The bank's neighbours in itself, the row itself left out.

        Raises `ValueError` when k is not in 1..rows − 1, or all rows of the bank are at one place.
        """
        neighbours(self.k, bank, len(bank) - 1)
        k = self.k
        distance, row = _neighbours(bank, k)
        while (distance[:, -1] <= _SAME).any():
            bank = bank.pick(_distinct(distance, row))
            k = min(k, len(bank) - 1)
            if not k:
                raise ValueError(f"all rows of {bank.name} are at one place, which has no density; use another bank")
            distance, row = _neighbours(bank, k)
        self.bank_, self.k_ = bank, k
        self.reach_ = distance[:, -1].astype(np.float64)
        self.density_ = self._density(distance, row)
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """One pass over the bank for all of `features`: pass many rows at once."""
        similarity, row = nearest(self.bank_, features, self.k_)
        return self.density_[row].mean(axis=1) / self._density(_distance(similarity), row)

    def _density(self, distance: np.ndarray, row: np.ndarray) -> np.ndarray:
        return 1.0 / (np.maximum(distance, self.reach_[row]).mean(axis=1) + 1e-10)


def _neighbours(bank: Rows, k: int) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    """Distances and positions of each bank row's k nearest other ones."""
    distance = np.empty((len(bank), k), np.float32)
    row = np.empty((len(bank), k), np.int64)
    start = 0
    for block in bank.blocks():
        here = slice(start, start + len(block))
        similarity, row[here] = search(bank.blocks(), block, k, exclude_self=np.arange(here.start, here.stop))
        distance[here] = _distance(similarity)
        start += len(block)
    return distance, row


def _distinct(distance: Float[np.ndarray, "n k"], row: Int[np.ndarray, "n k"]) -> Int[np.ndarray, " m"]:
    """The first of all rows at each place, as far as their k nearest tell."""
    left, nth = np.nonzero(distance <= _SAME)
    right = row[left, nth]
    first, before = np.arange(len(row)), None
    while before is None or (first != before).any():
        before = first.copy()
        np.minimum.at(first, left, before[right])
        np.minimum.at(first, right, before[left])
    return np.unique(first)


def _distance(similarity: np.ndarray) -> np.ndarray:
    """Between rows of norm 1."""
    return np.sqrt(np.maximum(2.0 - 2.0 * similarity.astype(np.float64), 0.0))
