"""Largest logit."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector


class MaxLogit(Detector):
    """Score = −max over classes of the logits, any real number. Fits nothing, needs no labels.

    Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection for Real-World Settings", arXiv 1911.11132.
    """

    needs = ("logits",)

    def score(self, logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
        """The largest logit, negated."""
        return -logits.max(axis=1).astype(np.float64)
