"""Distance to the subspace in which the bank lies."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import moments, pieces
from evalsuite.detectors._ranges import principal, whole
from featcache.rows import Rows


class Residual(Detector):
    """Score = ‖(I − VVᵀ)(x − μ)‖, at least 0: what is left of a row once its part in the bank's first
    `components` principal directions V is taken off. Needs no labels.

    Fitted: the bank's mean μ and covariance. `components` None takes ViM's rule, 1000 of d ≥ 2048 dimensions,
    512 of d ≥ 768, else d/2. OpenOOD and ViM centre on −pinv(W)b of a classifier (W, b) instead of μ, so their
    numbers differ; the reference is the reconstruction error of scikit-learn's `PCA`. Holds d × d float64.

    Wang et al. 2022, "ViM: Out-Of-Distribution with Virtual-logit Matching", arXiv 2203.10807, section 3.
    """

    components: int | None = None

    def check(self) -> None:
        """Raises `ValueError` unless components is None or a whole number from 1."""
        if self.components is not None:
            whole("residual:components", self.components, 1)

    def fit(self, bank: Rows) -> Residual:
        """One pass over the bank.

        Raises `ValueError` when `components` is not in 1..d−1.
        """
        kept = principal("residual:components", self.components, bank)
        m = moments(bank)
        self.mean_ = m.mean
        self.rest_ = np.linalg.eigh(m.total)[1][:, :-kept]  # eigenvalues ascend: the least directions
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The norm of the part outside the principal directions."""
        return np.concatenate(
            [np.linalg.norm((x - self.mean_) @ self.rest_, axis=1) for x in pieces(features, self.rest_.shape[1])]
        )
