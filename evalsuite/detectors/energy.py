"""Free energy of the logits."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from evalsuite.detectors._ranges import temperature
from featcache.geometry import logsumexp


class Energy(Detector):
    """Score = −T log Σ exp(logits / T), any real number; T is `temperature`. Fits nothing, needs no labels.

    Liu et al. 2020, "Energy-based Out-of-distribution Detection", arXiv 2010.03759.
    """

    needs = ("logits",)

    temperature: float = 1.0

    def check(self) -> None:
        """Raises `ValueError` unless the temperature is positive."""
        temperature("energy:temperature", self.temperature)

    def score(self, logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
        """The free energy."""
        return np.concatenate([-self.temperature * logsumexp(x / self.temperature) for x in pieces(logits, 1)])
