"""Energy of clipped features."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from featcache.geometry import logsumexp
from featcache.rows import Rows

_SAMPLE_FLOATS = 2**24


class ReAct(Detector):
    """Score = −log Σ exp(logits of min(x, t)), any real number; t is the bank's `percentile` over all of its values.

    The paper's, OpenOOD's and pytorch-ood's percentile is 90 (OpenOOD takes it of ID validation rows). A bank of
    more than 2²⁴ values is represented by rows evenly spaced through it. Made for features after a ReLU; on
    features of either sign it clips the upper side only. Needs a head, no labels. Holds 2²⁴ float32 while fitting.

    Sun et al. 2021, "ReAct: Out-of-distribution Detection With Rectified Activations", arXiv 2111.12797.
    """

    percentile: float = 90.0

    def check(self) -> None:
        """Raises `ValueError` unless the percentile is in percent, above 1 and at most 100."""
        if not 0 < self.percentile <= 100:
            raise ValueError(f"react:percentile={self.percentile!r} must be from 0 to 100, in percent")
        if self.percentile <= 1:
            raise ValueError(
                f"react:percentile={self.percentile!r} is in percent; for the quantile {self.percentile:g} "
                f"give {100 * self.percentile:g}"
            )

    def fit(self, bank: Rows) -> ReAct:
        """One pass over (at most 2²⁴ values of) the bank.

        Raises `ValueError` without a head, or for a percentile that is none.
        """
        self.check()
        self.head_ = bank.require_head()
        step = -(-len(bank) * bank.embedding_dim // _SAMPLE_FLOATS)
        self.threshold_ = float(np.percentile(bank.take(np.arange(0, len(bank), step)), self.percentile))
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The free energy after clipping."""
        width = len(self.head_.bias)
        return np.concatenate(
            [-logsumexp(self.head_.logits(np.minimum(x, self.threshold_))) for x in pieces(features, width)]
        )
