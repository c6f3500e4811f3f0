"""Energy of pruned and rescaled activations."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from evalsuite.detectors._ranges import share
from evalsuite.detectors._shaping import largest, ratio, require_activations
from featcache.geometry import logsumexp
from featcache.rows import Rows


class ASH(Detector):
    """Score = −log Σ exp(logits of the shaped row), any real number.

    The `pruned` share of a row's smallest activations becomes zero. Then `variant` `s` multiplies the rest by
    exp(sum before / sum after) (pytorch-ood's default, with pruned 0.65), `b` sets each to sum before / their
    number (OpenOOD's, with 0.9), `p` leaves them. For features after a ReLU: on those of either sign it is close
    to chance (OpenOOD's leaderboard: 46.5 near AUROC for Swin-T), so they are refused. Needs a head, no labels.

    Djurisic et al. 2023, "Extremely Simple Activation Shaping for Out-of-Distribution Detection", arXiv 2209.09858.
    """

    pruned: float = 0.65
    variant: str = "s"

    def check(self) -> None:
        """Raises `ValueError` unless the variant is known and the pruned share in [0, 1)."""
        if self.variant not in ("s", "b", "p"):
            raise ValueError(f"unknown variant {self.variant!r}; use ash:variant=s, b or p")
        share("ash:pruned", self.pruned)

    def fit(self, bank: Rows) -> ASH:
        """Learns nothing; one pass over the bank to see that its features suit.

        Raises `ValueError` without a head, for an unknown variant, for a pruned share not in [0, 1), or when the
        bank has negative features.
        """
        self.check()
        self.head_ = bank.require_head()
        require_activations(bank, "ash", self.pruned)
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The free energy after shaping."""
        width = len(self.head_.bias)
        return np.concatenate([-logsumexp(self.head_.logits(self._shaped(x))) for x in pieces(features, width)])

    def _shaped(self, x: np.ndarray) -> np.ndarray:
        kept = largest(x, self.pruned)
        rest = np.where(kept, x, 0.0)
        if self.variant == "s":
            return rest * np.exp(ratio(rest.sum(axis=1), x.sum(axis=1)))[:, None]
        if self.variant == "b":
            return kept * (x.sum(axis=1) / max(1, int(kept[0].sum())))[:, None]
        return rest
