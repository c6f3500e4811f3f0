"""Distance to the decision boundaries, relative to the distance to the bank's mean."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import moments, pieces
from featcache.rows import Rows


class FDBD(Detector):
    """Score = −(mean over the other classes c of |l_ŷ − l_c| / ‖w_ŷ − w_c‖) / ‖x − μ‖, at most 0; ŷ is the class the
    head predicts, l its logits, μ the bank's mean.

    OpenOOD sums over the classes where pytorch-ood and we take the mean: the same ranking. A row at μ counts as
    1e-8 away, as in pytorch-ood. Needs a head, no labels. Holds classes × classes float64.

    Liu and Qin 2024, "Fast Decision Boundary based Out-of-Distribution Detector", arXiv 2312.11536.
    """

    def fit(self, bank: Rows) -> FDBD:
        """One pass over the bank.

        Raises `ValueError` without a head, or when it has a single class.
        """
        self.head_ = bank.require_head()
        weight = self.head_.weight
        if len(weight) < 2:
            raise ValueError(f"{self.head_.name} has one class, so no decision boundary; fit a head on two or more")
        gram = weight @ weight.T
        length = np.diag(gram)
        between = np.sqrt(np.maximum(length[:, None] + length - 2 * gram, 0.0))
        self.between_ = np.where(between > 0, between, 1.0)  # no boundary: the logits do not differ there
        self.mean_ = moments(bank).mean
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The relative distance, negated."""
        return np.concatenate([-self._relative(x) for x in pieces(features, len(self.between_))])

    def _relative(self, x: np.ndarray) -> np.ndarray:
        logits = self.head_.logits(x)
        distance = (logits.max(axis=1)[:, None] - logits) / self.between_[logits.argmax(axis=1)]
        away = np.maximum(np.linalg.norm(x - self.mean_, axis=1), 1e-8)
        return distance.sum(axis=1) / (len(self.between_) - 1) / away
