"""Mahalanobis distance to the bank as a whole, between rows of norm 1."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import Gaussians, moments, pieces, whitening
from featcache.geometry import unit
from featcache.rows import Rows


class SSD(Detector):
    """Score = (z − μ)ᵀ Σ⁻¹ (z − μ) with z = x/‖x‖, at least 0; μ, Σ the mean and covariance of all bank rows so
    scaled. Needs no labels.

    The paper clusters the bank first; this is its form with one cluster. OpenOOD's SSD cannot be run and
    pytorch-ood has none, so there is no peer to agree with. Pseudo-inverse where Σ is singular. Holds d × d
    float64. A row of norm zero stays zero.

    Sehwag et al. 2021, "SSD: A Unified Framework for Self-Supervised Outlier Detection", arXiv 2103.12051.
    """

    def fit(self, bank: Rows) -> SSD:
        """One pass over the bank.

        Raises `ValueError` when all of its rows have the same direction.
        """
        m = moments(bank, normalise=True)
        self.gaussian_ = Gaussians(m.mean[None], whitening(m.total, bank))
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The squared distance to the mean."""
        return np.concatenate([self.gaussian_.squared_distance(unit(x))[:, 0] for x in pieces(features, 1)])
