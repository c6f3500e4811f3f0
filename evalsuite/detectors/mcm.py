"""Maximum concept matching: how clearly an image matches one class name."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import pieces
from evalsuite.detectors._ranges import temperature
from evalsuite.detectors._text import text_embeddings
from featcache.geometry import unit
from featcache.rows import Rows


class MCM(Detector):
    """Score = 1 − max over class names of softmax(cos(image, text) / temperature), in [0, 1).

    `text` is a file or store of one embedding a class name, by the text tower of the model that embedded the images
    (`mcm:text=names.npy`). Cosines go in as they are, in [-1, 1]: the paper's and OpenOOD's temperature is 1. Code that
    multiplies cosines by CLIP's learned scale of 100 first, and then divides by a temperature of 1, has 0.01 here, and
    another ranking. Summed from the *other* classes' probabilities, as in `msp`. Fits nothing, needs no labels.

    Ming et al. 2022, "Delving into Out-of-Distribution Detection with Vision-Language Representations",
    arXiv 2211.13445.
    """

    text: str | None = None
    temperature: float = 1.0

    def check(self) -> None:
        """Raises `ValueError` unless the temperature is above 0 and at most 10."""
        temperature("mcm:temperature", self.temperature, most=10.0)

    def fit(self, bank: Rows) -> MCM:
        """Read the text embeddings; of the bank, only the dimension.

        Raises `ValueError` when the temperature is not positive, or the text embeddings do not suit the bank or are
        of one class only.
        """
        self.check()
        self.text_ = text_embeddings(self.text, bank, "mcm:text")
        if len(self.text_) < 2:
            raise ValueError(f"{self.text} has one class name; mcm needs two at least, as one always has probability 1")
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The probability of not being the class that matches best."""
        return np.concatenate([self._others(unit(x) @ self.text_.T) for x in pieces(features, len(self.text_))])

    def _others(self, cosine: np.ndarray) -> np.ndarray:
        rising = np.sort(cosine, axis=1)
        others = np.exp((rising[:, :-1] - rising[:, -1:]) / self.temperature).sum(axis=1)
        return others / (1.0 + others)
