"""Generalised entropy of the softmax."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from evalsuite.detectors._ranges import whole


class GEN(Detector):
    """Score = Σ p^γ (1 − p)^γ over the `top` largest softmax probabilities p, at least 0; γ is `gamma`.

    The paper's and OpenOOD's γ = 0.1 and top = 100 (all classes when there are fewer). pytorch-ood takes the
    mean instead of the sum (the same ranking), all classes by default, and clips p to [1e-7, 1 − 1e-7], which
    ties the rows beyond; here 1 − p is summed from the other classes and nothing is clipped. Fits nothing,
    needs no labels.

    Liu et al. 2023, "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection", CVPR.
    """

    needs = ("logits",)

    gamma: float = 0.1
    top: int = 100

    def check(self) -> None:
        """Raises `ValueError` unless gamma is in (0, 1] and top a whole number from 1."""
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gen:gamma={self.gamma!r} must be above 0 and at most 1")
        whole("gen:top", self.top, 1)

    def score(self, logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
        """The generalised entropy."""
        return np.concatenate([self._entropy(x) for x in pieces(logits, 1)])

    def _entropy(self, logits: np.ndarray) -> np.ndarray:
        falling = -np.sort(-logits, axis=1)
        weight = np.exp(falling - falling[:, :1])
        total = weight.sum(axis=1, keepdims=True)
        p = weight[:, : self.top] / total
        rest = 1.0 - p
        rest[:, 0] = weight[:, 1:].sum(axis=1) / total[:, 0]  # the only one that can be close to zero
        return (p**self.gamma * rest**self.gamma).sum(axis=1)
