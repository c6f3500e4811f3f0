"""Energy of rescaled activations."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from evalsuite.detectors._ranges import share
from evalsuite.detectors._shaping import largest, ratio, require_activations
from featcache.geometry import logsumexp
from featcache.rows import Rows


class SCALE(Detector):
    """Score = −log Σ exp(logits of x · exp(r)), any real number; r is the sum of a row's activations over that of
    its largest, the `pruned` share of smallest ones left out.

    The paper's and OpenOOD's share is 0.85; pytorch-ood's 0.65. Nothing is pruned from x itself, unlike `ash`. For
    features after a ReLU: those of either sign are refused. Needs a head, no labels.

    Xu et al. 2024, "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement",
    arXiv 2310.00227.
    """

    pruned: float = 0.85

    def check(self) -> None:
        """Raises `ValueError` unless the pruned share is in [0, 1)."""
        share("scale:pruned", self.pruned)

    def fit(self, bank: Rows) -> SCALE:
        """Learns nothing; one pass over the bank to see that its features suit.

        Raises `ValueError` without a head, for a pruned share not in [0, 1), or when the bank has negative features.
        """
        self.check()
        self.head_ = bank.require_head()
        require_activations(bank, "scale", self.pruned)
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The free energy after scaling."""
        width = len(self.head_.bias)
        return np.concatenate([-logsumexp(self.head_.logits(self._scaled(x))) for x in pieces(features, width)])

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        part = np.where(largest(x, self.pruned), x, 0.0).sum(axis=1)
        return x * np.exp(ratio(part, x.sum(axis=1)))[:, None]
