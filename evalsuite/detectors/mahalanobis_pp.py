"""Mahalanobis distance between rows of norm 1."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import Gaussians, moments, pieces, whitening
from featcache.geometry import unit
from featcache.rows import Rows


class MahalanobisPP(Detector):
    """`mahalanobis` after every row, of the bank too, is scaled to norm 1: score = min_c (z − μ_c)ᵀ Σ⁻¹ (z − μ_c)
    with z = x/‖x‖, at least 0. Also called `mahalanobis++`.

    Feature norms differ a lot within a class, and a shared covariance fits that badly. Fitted: class means and
    shared covariance of the scaled rows (pseudo-inverse where singular). Neither OpenOOD nor pytorch-ood has
    it. Holds d × d and classes × d float64. A row of norm zero stays zero.

    Mueller and Hein 2025, "Mahalanobis++", arXiv 2505.18032.
    """

    def fit(self, bank: Rows) -> MahalanobisPP:
        """One pass over the bank's labelled rows.

        Raises `ValueError` when it has no labels, or when no class has rows of different directions.
        """
        bank = bank.labelled()
        m = moments(bank, normalise=True)
        self.gaussians_ = Gaussians(m.class_mean, whitening(m.within, bank, scale=float(np.trace(m.total))))
        self.classes_ = len(m.classes)
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The squared distance to the nearest class mean."""
        return np.concatenate(
            [self.gaussians_.squared_distance(unit(x)).min(axis=1) for x in pieces(features, self.classes_)]
        )
