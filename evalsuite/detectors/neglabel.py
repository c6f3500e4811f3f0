"""Class names against words that no ID image shows."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from evalsuite.detectors._ranges import temperature, whole
from evalsuite.detectors._text import text_embeddings
from featcache.geometry import logsumexp, unit
from featcache.rows import Rows


class NegLabel(Detector):
    """Score = mean over groups of Σ_neg exp(cos/T) / (Σ_class exp(cos/T) + Σ_neg exp(cos/T)), in (0, 1); T is
    `temperature`, and each group has its own negatives and all the class names.

    `text` and `negatives` are files or stores of text embeddings by the model that embedded the images: of the class
    names, and of words far from them (the authors take 10,000 of WordNet, chosen by their cosine to the class names;
    choosing is not done here). Cosines go in as they are: 0.01 is the authors' scale of 100. The negatives are dealt
    into `groups` of equal size in an order drawn by `seed`; what remains is left out, as in the authors' code, whose
    generator is another: groups and their number change the AUROC. Fits nothing, needs no labels.

    Jiang et al. 2024, "Negative Label Guided OOD Detection with Pretrained Vision-Language Models", arXiv 2403.20078.
    """

    text: str | None = None
    negatives: str | None = None
    groups: int = 100
    temperature: float = 0.01
    seed: int = 0

    def check(self) -> None:
        """Raises `ValueError` unless the temperature is above 0 and at most 10, and groups and seed are whole numbers."""
        temperature("neglabel:temperature", self.temperature, most=10.0)
        whole("neglabel:groups", self.groups, 1)
        whole("neglabel:seed", self.seed, 0)

    def fit(self, bank: Rows) -> NegLabel:
        """Read the text embeddings; of the bank, only the dimension.

        Raises `ValueError` when the temperature is not positive, the text embeddings do not suit the bank, or there
        are fewer negatives than groups.
        """
        temperature("neglabel:temperature", self.temperature, most=10.0)
        self.text_ = text_embeddings(self.text, bank, "neglabel:text")
        negatives = text_embeddings(self.negatives, bank, "neglabel:negatives")
        if not (isinstance(self.groups, int) and 1 <= self.groups <= len(negatives)):
            raise ValueError(
                f"neglabel:groups={self.groups!r} does not suit the {len(negatives)} rows of {self.negatives}; "
                f"use groups from 1 to {len(negatives)}"
            )
        size = len(negatives) // self.groups
        order = np.random.default_rng(self.seed).permutation(len(negatives))
        self.negatives_ = negatives[order[: size * self.groups]]
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The share of the negatives."""
        width = len(self.text_) + len(self.negatives_)
        return np.concatenate([self._share(unit(x)) for x in pieces(features, width)])

    def _share(self, x: np.ndarray) -> np.ndarray:
        known = logsumexp(x @ self.text_.T / self.temperature)
        negative = x @ self.negatives_.T / self.temperature
        by_group = negative.reshape(len(x) * self.groups, len(self.negatives_) // self.groups)
        ahead = known[:, None] - logsumexp(by_group).reshape(len(x), self.groups)
        return np.exp(-np.logaddexp(0.0, ahead)).mean(axis=1)
