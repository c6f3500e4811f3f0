"""Distance to the k-th nearest ID training row."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._nearest import nearest
from evalsuite.detectors._ranges import neighbours, whole
from featcache.rows import Rows


class KNN(Detector):
    """Score = 1 − cosine similarity to the k-th nearest bank row, in [0, 2]; `mean` takes the mean of the k
    nearest instead, which depends less on k.

    Non-parametric and label-free. OpenOOD's and pytorch-ood's k is 50; they report the L2 distance of unit
    vectors, OpenOOD squared: the same ranking. CosPress uses k 1. Keep k below the number of rows of a class.
    The bank is read, 64 MiB at a time, for every block of rows scored.

    Sun et al. 2022, "Out-of-Distribution Detection with Deep Nearest Neighbors", arXiv 2204.06507.
    """

    k: int = 50
    mean: bool = False

    def check(self) -> None:
        """Raises `ValueError` unless k is a whole number from 1."""
        whole("knn:k", self.k, 1)

    def fit(self, bank: Rows) -> KNN:
        """Keep the bank; nothing is read yet.

        Raises `ValueError` when the bank has fewer than k rows or k is no whole number.
        """
        neighbours(self.k, bank, len(bank))
        self.bank_ = bank
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """One pass over the bank for all of `features`: pass many rows at once."""
        similarity, _ = nearest(self.bank_, features, self.k)
        distance = 1.0 - similarity.astype(np.float64)
        return distance.mean(axis=1) if self.mean else distance[:, -1]
