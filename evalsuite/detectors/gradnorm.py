"""Size of the gradient towards a uniform prediction."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from featcache.geometry import logsumexp
from featcache.rows import Rows


class GradNorm(Detector):
    """Score = −‖∂/∂W KL(uniform ‖ softmax)‖₁ = −Σ_c |p_c − 1/C| · ‖x‖₁, at most 0; p is the softmax of the logits of
    C classes, W the head's weights.

    The closed form of what OpenOOD and pytorch-ood compute by one backward pass a row (OpenOOD: C times as much).
    Of the head's weights alone, as the paper; pytorch-ood's default takes every parameter of its model. Needs a
    head, no labels, fits nothing.

    Huang et al. 2021, "On the Importance of Gradients for Detecting Distributional Shifts in the Wild",
    arXiv 2110.00218.
    """

    def fit(self, bank: Rows) -> GradNorm:
        """Reads nothing.

        Raises `ValueError` without a head.
        """
        self.head_ = bank.require_head()
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The gradient's norm, negated."""
        return np.concatenate([-self._norm(x) for x in pieces(features, len(self.head_.bias))])

    def _norm(self, x: np.ndarray) -> np.ndarray:
        logits = self.head_.logits(x)
        p = np.exp(logits - logsumexp(logits)[:, None])
        return np.abs(p - 1 / p.shape[1]).sum(axis=1) * np.abs(x).sum(axis=1)
