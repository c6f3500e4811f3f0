"""Mahalanobis distance to the nearest class mean."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import Gaussians, moments, pieces, whitening
from featcache.geometry import unit
from featcache.rows import Rows


class Mahalanobis(Detector):
    """Score = min over classes c of (x − μ_c)ᵀ Σ⁻¹ (x − μ_c), at least 0.

    Fitted: one mean a class and the covariance of all rows about their class's mean, divided by n (OpenOOD's;
    a pseudo-inverse where it is singular). pytorch-ood halves the score and adds 1e-6 to the diagonal of the
    *undivided* covariance: the same ranking unless Σ is singular or close to it. Holds d × d and classes × d
    float64.

    Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
    Attacks", arXiv 1807.03888.
    """

    normalise: ClassVar[bool] = False

    def fit(self, bank: Rows) -> Mahalanobis:
        """One pass over the bank's labelled rows.

        Raises `ValueError` when it has no labels, or when no class has rows that differ.
        """
        bank = bank.labelled()
        m = moments(bank, self.normalise)
        self.gaussians_ = Gaussians(m.class_mean, whitening(m.within, bank, scale=float(np.trace(m.total))))
        self.classes_ = len(m.classes)
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The squared distance to the nearest class mean."""
        found = (unit(x) if self.normalise else x for x in pieces(features, self.classes_))
        return np.concatenate([self.gaussians_.squared_distance(x).min(axis=1) for x in found])
