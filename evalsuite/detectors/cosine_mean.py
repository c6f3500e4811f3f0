"""Angle to the nearest class mean."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import moments, pieces
from featcache.geometry import unit
from featcache.rows import Rows


class CosineMean(Detector):
    """Score = 1 − max over classes c of cos(x, μ_c), in [0, 2], μ_c the mean of the class's rows of norm 1.

    The nearest-prototype rule of few-shot classification, read as a score; no peer has it. A row of norm zero
    scores 1. Holds classes × d float64 once fitted.

    Snell et al. 2017, "Prototypical Networks for Few-shot Learning", arXiv 1703.05175 (there with L2 distances).
    """

    def fit(self, bank: Rows) -> CosineMean:
        """One pass over the bank's labelled rows.

        Raises `ValueError` when it has no labels.
        """
        self.prototypes_ = unit(moments(bank.labelled(), normalise=True).class_mean)
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """One minus the cosine similarity to the nearest class mean."""
        return np.concatenate(
            [1.0 - (unit(x) @ self.prototypes_.T).max(axis=1) for x in pieces(features, len(self.prototypes_))]
        )
