"""Maximum softmax probability."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from evalsuite.detectors._ranges import temperature


class MSP(Detector):
    """Score = 1 − max over classes of softmax(logits / temperature), in [0, 1).

    Summed from the *other* classes' probabilities in float64: confident rows stay apart where 1 − p rounds to
    zero, so fewer scores tie than in OpenOOD or pytorch-ood. Fits nothing, needs no labels.

    Hendrycks and Gimpel 2017, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in
    Neural Networks", arXiv 1610.02136.
    """

    needs = ("logits",)

    temperature: float = 1.0

    def check(self) -> None:
        """Raises `ValueError` unless the temperature is positive."""
        temperature("msp:temperature", self.temperature)

    def score(self, logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
        """The probability of not being the likeliest class."""
        return np.concatenate([_others(x / self.temperature) for x in pieces(logits, 1)])


def _others(logits: np.ndarray) -> np.ndarray:
    rising = np.sort(logits, axis=1)
    others = np.exp(rising[:, :-1] - rising[:, -1:]).sum(axis=1)
    return others / (1.0 + others)
