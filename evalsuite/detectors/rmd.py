"""Mahalanobis distance to the nearest class, less the distance to all of the bank."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import Gaussians, moments, pieces, whitening
from featcache.rows import Rows


class RMD(Detector):
    """Score = min over classes c of M_c(x) − M_0(x), any real number.

    M_c is the squared Mahalanobis distance to class c as in `mahalanobis`, M_0 that to the mean of all labelled
    rows under their own covariance: what is unusual for any image of the domain cancels. Both covariances are
    divided by n (as in OpenOOD; a pseudo-inverse where they are singular). pytorch-ood 0.4.0 divides neither and adds
    1e-6 to the diagonal, which scales the score: the same ranking unless a covariance is singular or close to it (its
    0.2.0 divides one of the two, which is a bug). Holds 2 × d × d and classes × d float64.

    Ren et al. 2021, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", arXiv 2106.09022.
    """

    def fit(self, bank: Rows) -> RMD:
        """One pass over the bank's labelled rows.

        Raises `ValueError` when it has no labels, a single class, or no class with rows that differ.
        """
        bank = bank.labelled()
        m = moments(bank)
        if len(m.classes) < 2:
            raise ValueError(
                f"{bank.name} has one class, whose distance is that to all rows: rmd is 0 everywhere; use mahalanobis"
            )
        scale = float(np.trace(m.total))
        self.gaussians_ = Gaussians(m.class_mean, whitening(m.within, bank, scale))
        self.background_ = Gaussians(m.mean[None], whitening(m.total, bank, scale))
        self.classes_ = len(m.classes)
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The least squared distance to a class mean, less the squared distance to the mean of all."""
        return np.concatenate(
            [
                self.gaussians_.squared_distance(x).min(axis=1) - self.background_.squared_distance(x)[:, 0]
                for x in pieces(features, self.classes_)
            ]
        )
