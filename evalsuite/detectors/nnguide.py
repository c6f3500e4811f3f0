"""Energy, guided by the nearest ID training rows."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from evalsuite.detectors._ranges import neighbours, whole
from featcache.geometry import logsumexp, unit
from featcache.rows import Rows


class NNGuide(Detector):
    """Score = −E(x) · mean of the k largest ⟨x/‖x‖, E(b) b/‖b‖⟩ over bank rows b, any real number.

    E = log Σ exp of a row's logits, so stores must have them. pytorch-ood's k and bank (all rows); the paper
    and OpenOOD draw 1 % of the bank and k = 100, OpenOOD the first 1 % in file order. Without logits what is
    left is `knn:mean=true`. Needs no labels. Fitted: the energy of each bank row (8 bytes); the rows themselves
    are read again, 64 MiB at a time, for every block of rows scored.

    Park et al. 2023, "Nearest Neighbor Guidance for Out-of-Distribution Detection", arXiv 2309.14888.
    """

    needs = ("embedding", "logits")

    k: int = 10

    def check(self) -> None:
        """Raises `ValueError` unless k is a whole number from 1."""
        whole("nnguide:k", self.k, 1)

    def fit(self, bank: Rows) -> NNGuide:
        """One pass over the bank's logits.

        Raises `ValueError` when it has none, or when it has fewer than k rows.
        """
        neighbours(self.k, bank, len(bank))
        self.bank_ = bank
        self.energy_ = np.concatenate([_energy(block["logits"]) for block in bank.blocks_of(("logits",))])
        return self

    def score(self, embedding: Float[np.ndarray, "n d"], logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
        """One pass over the bank for all rows: pass many at once."""
        query = unit(embedding.astype(np.float64))
        best = np.full((len(query), self.k), -np.inf)
        start = 0
        for block in self.bank_.blocks_of(("embedding",)):
            for bank in pieces(block["embedding"], 1):
                guide = unit(bank) * self.energy_[start : start + len(bank), None]
                start += len(bank)
                step = max(1, 2**22 // (len(bank) + self.k))
                for first in range(0, len(query), step):
                    part = slice(first, first + step)
                    found = np.concatenate([best[part], query[part] @ guide.T], axis=1)
                    best[part] = np.partition(found, -self.k, axis=1)[:, -self.k :]
        # Sorted, so that the sum does not depend on the order in which blocks brought the rows.
        return -np.sort(best, axis=1).mean(axis=1) * _energy(logits)


def _energy(logits: np.ndarray) -> np.ndarray:
    return np.concatenate([logsumexp(x) for x in pieces(logits, 1)])
