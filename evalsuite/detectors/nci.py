"""Closeness to the predicted class's weights."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import moments, pieces
from featcache.rows import Rows


class NCI(Detector):
    """Score = −⟨w_ŷ, x − μ⟩ / ‖x − μ‖ − `alpha` ‖x‖₁, any real number; ŷ is the class the head predicts, w its
    weights, μ the bank's mean.

    OpenOOD's alpha is 1e-4, pytorch-ood's 0. A row at μ has 0 for the first term. Needs a head, no labels.

    Liu and Qin 2025, "Detecting Out-of-Distribution Through the Lens of Neural Collapse", arXiv 2311.01479.
    """

    alpha: float = 1e-4

    def check(self) -> None:
        """Raises `ValueError` unless alpha is at least 0."""
        if not self.alpha >= 0:
            raise ValueError(f"nci:alpha={self.alpha!r} must be at least 0: it weighs a norm")

    def fit(self, bank: Rows) -> NCI:
        """One pass over the bank.

        Raises `ValueError` without a head.
        """
        self.check()
        self.head_ = bank.require_head()
        self.mean_ = moments(bank).mean
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Closeness and norm, negated."""
        return np.concatenate([-self._closeness(x) for x in pieces(features, len(self.head_.bias))])

    def _closeness(self, x: np.ndarray) -> np.ndarray:
        centred = x - self.mean_
        length = np.linalg.norm(centred, axis=1)
        along = (centred * self.head_.weight[self.head_.logits(x).argmax(axis=1)]).sum(axis=1)
        return along / np.where(length > 0, length, 1.0) + self.alpha * np.abs(x).sum(axis=1)
