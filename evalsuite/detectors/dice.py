"""Energy under a head of few weights."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import moments, pieces
from evalsuite.detectors._ranges import share
from featcache.geometry import logsumexp
from featcache.rows import Rows


class DICE(Detector):
    """Score = −log Σ exp(x · Mᵀ + b), any real number; M keeps of the head's weights W those whose contribution
    W · mean bank row is above the `dropped` quantile of all contributions, and has zeros elsewhere.

    The paper's and OpenOOD's share is 0.9; pytorch-ood has no default. Needs a head, no labels. Holds classes × d
    float64 (OpenOOD and pytorch-ood: rows × classes × d).

    Sun and Li 2022, "DICE: Leveraging Sparsification for Out-of-Distribution Detection", arXiv 2111.09805.
    """

    dropped: float = 0.9

    def check(self) -> None:
        """Raises `ValueError` unless the dropped share is in [0, 1)."""
        share("dice:dropped", self.dropped)

    def fit(self, bank: Rows) -> DICE:
        """One pass over the bank.

        Raises `ValueError` without a head, or when dropped is not in [0, 1).
        """
        self.check()
        head = bank.require_head()
        contribution = moments(bank).mean * head.weight
        self.weight_ = np.where(contribution > np.quantile(contribution, self.dropped), head.weight, 0.0)
        self.bias_ = head.bias
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The free energy under the kept weights."""
        return np.concatenate([-logsumexp(x @ self.weight_.T + self.bias_) for x in pieces(features, len(self.bias_))])
