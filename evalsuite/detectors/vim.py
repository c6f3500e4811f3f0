"""Residual and energy in one."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import moments, pieces
from evalsuite.detectors._ranges import principal, whole
from featcache.geometry import logsumexp
from featcache.rows import Rows


class ViM(Detector):
    """Score = α ‖P(x − u)‖ − log Σ exp(logits), any real number: a row's part outside the bank's principal subspace,
    as a virtual logit, less its energy.

    u = −pinv(W) b is where the head's logits vanish; P projects on all but the first `components` eigenvectors of
    the mean of (x − u)(x − u)ᵀ over the bank; α is the mean largest logit of the bank over its mean ‖P(x − u)‖.
    `components` None takes the authors' rule, 1000 of d ≥ 2048 dimensions, 512 of d ≥ 768, else d/2 (OpenOOD 256;
    pytorch-ood asks). Needs a head, no labels. Holds d × d float64.

    Wang et al. 2022, "ViM: Out-Of-Distribution with Virtual-logit Matching", arXiv 2203.10807.
    """

    components: int | None = None

    def check(self) -> None:
        """Raises `ValueError` unless components is None or a whole number from 1."""
        if self.components is not None:
            whole("vim:components", self.components, 1)

    def fit(self, bank: Rows) -> ViM:
        """Two passes over the bank.

        Raises `ValueError` without a head, when `components` is not in 1..d−1, or when the bank has no part outside
        the subspace.
        """
        self.head_ = bank.require_head()
        kept = principal("vim:components", self.components, bank)
        self.origin_ = -np.linalg.pinv(self.head_.weight) @ self.head_.bias
        m = moments(bank)
        offset = m.mean - self.origin_
        self.rest_ = np.linalg.eigh(m.total + np.outer(offset, offset))[1][:, :-kept]
        largest = outside = 0.0
        for block in bank.blocks_of(("embedding",)):
            for x in pieces(block["embedding"], len(self.head_.bias)):
                largest += float(self.head_.logits(x).max(axis=1).sum())
                outside += float(self._outside(x).sum())
        if not outside > 0:
            raise ValueError(
                f"{bank.name} lies within {kept} dimensions: nothing is left outside; use fewer vim:components"
            )
        self.alpha_ = largest / outside
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The virtual logit less the energy."""
        return np.concatenate(
            [
                self.alpha_ * self._outside(x) - logsumexp(self.head_.logits(x))
                for x in pieces(features, len(self.head_.bias))
            ]
        )

    def _outside(self, x: np.ndarray) -> np.ndarray:
        return np.linalg.norm((x - self.origin_) @ self.rest_, axis=1)
