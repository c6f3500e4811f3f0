"""Inner product with the usual features of the predicted class."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import add_by_group, pieces
from featcache.classes import Classes, numbers_of
from featcache.rows import Rows


class SHE(Detector):
    """Score = −⟨x, pattern of the class the head predicts for x⟩, any real number.

    Fitted: a class's pattern, the mean of its bank rows that the head gets right. A class of which it gets none
    right has the mean of all its rows (OpenOOD: not a number; pytorch-ood: refuses). Needs a head and labels; classes are
    matched by name, by number where one side has no names.
    Holds classes × d float64.

    Zhang et al. 2023, "Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with
    Modern Hopfield Energy", ICLR.
    """

    def fit(self, bank: Rows) -> SHE:
        """One pass over the bank's labelled rows.

        Raises `ValueError` without a head or labels, or when a class of the head has no row there.
        """
        bank = bank.labelled()
        self.head_ = bank.require_head()
        numbers = numbers_of(self.head_, Classes.of(bank))[0]
        missing = np.flatnonzero(~np.isin(numbers, bank.labels))
        if len(missing):
            raise ValueError(
                f"{bank.name} has no row of class {(self.head_.class_names or self.head_.labels)[missing[0]]}, which "
                f"{self.head_.name} predicts; use a bank with all of its classes"
            )
        order = np.argsort(numbers)
        place = order[np.searchsorted(numbers, bank.labels, sorter=order).clip(max=len(numbers) - 1)]
        known = numbers[place] == bank.labels
        # A class's rows that are right, in [0], and those that are not, in [1].
        sums, count = np.zeros((2, len(numbers), bank.embedding_dim)), np.zeros((2, len(numbers)))
        start = 0
        for block in bank.blocks_of(("embedding",)):
            for x in pieces(block["embedding"], len(numbers)):
                here = slice(start, start + len(x))
                start += len(x)
                right = self.head_.logits(x).argmax(axis=1) == place[here]
                for i, chosen in enumerate((right & known[here], ~right & known[here])):
                    add_by_group(sums[i], x[chosen], place[here][chosen])
                    count[i] += np.bincount(place[here][chosen], minlength=len(numbers))
        which = np.where(count[0] > 0, 0, 1), np.arange(len(numbers))
        self.pattern_ = sums[which] / count[which][:, None]
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The inner product, negated."""
        width = len(self.pattern_)
        return np.concatenate(
            [-(x * self.pattern_[self.head_.logits(x).argmax(axis=1)]).sum(axis=1) for x in pieces(features, width)]
        )
