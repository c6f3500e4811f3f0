"""Local outlier factor."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors._nearest import nearest
from evalsuite.neighbors import search
from evalsuite.rows import Rows


class LOF:
    """Score = the mean local density of a row's k nearest bank rows over its own, above 0; about 1 for ID rows.

    Rows are scaled to norm 1 and compared by Euclidean distance: the score of scikit-learn's
    `LocalOutlierFactor(n_neighbors=k, novelty=True)` on rows so scaled. A row's density is 1/(mean over its
    neighbours o of max(distance, distance of o to its own k-th neighbour) + 1e-10); distances come from float32
    cosines, so those far below 1 have fewer exact digits than scikit-learn's. Needs no labels. Fitting
    searches the bank for its own neighbours: time grows with n²; n × k neighbours (12 bytes each) are held
    while fitting, two float64 a bank row afterwards.

    Breunig et al. 2000, "LOF: Identifying Density-Based Local Outliers".
    """

    def __init__(self, k: int = 20) -> None:
        self.k = k

    def fit(self, bank: Rows) -> LOF:
        """The bank's neighbours in itself, the row itself left out.

        Raises `ValueError` when k is not in 1..rows − 1.
        """
        if not (isinstance(self.k, int) and 1 <= self.k < len(bank)):
            raise ValueError(
                f"k={self.k!r} does not suit the bank {bank.name}, which has {len(bank)} rows; "
                f"use k from 1 to {len(bank) - 1}"
            )
        self.bank_ = bank
        distance = np.empty((len(bank), self.k), np.float32)
        row = np.empty((len(bank), self.k), np.int64)
        start = 0
        for block in bank.blocks():
            here = slice(start, start + len(block))
            similarity, row[here] = search(bank.blocks(), block, self.k, exclude_self=np.arange(here.start, here.stop))
            distance[here] = _distance(similarity)
            start += len(block)
        self.reach_ = distance[:, -1].astype(np.float64)
        self.density_ = self._density(distance, row)
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """One pass over the bank for all of `features`: pass many rows at once."""
        similarity, row = nearest(self.bank_, features, self.k)
        return self.density_[row].mean(axis=1) / self._density(_distance(similarity), row)

    def _density(self, distance: np.ndarray, row: np.ndarray) -> np.ndarray:
        return 1.0 / (np.maximum(distance, self.reach_[row]).mean(axis=1) + 1e-10)


def _distance(similarity: np.ndarray) -> np.ndarray:
    """Between rows of norm 1."""
    return np.sqrt(np.maximum(2.0 - 2.0 * similarity.astype(np.float64), 0.0))
