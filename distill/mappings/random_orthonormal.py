"""A random projection: what a mapping that learns must beat."""

import numpy as np

from distill.mappings._mapping import Frozen, Mapping, Progress, checked_source
from distill.source import Source
from featcache.store import FeatureStore


class RandomOrthonormal(Mapping):
    """Orthonormal rows, uniform over all such: QR of a Gaussian, R's diagonal positive (Mezzadri 2007,
    arXiv math-ph/0609050). Rows are mapped at length one. Of the store it takes the width alone.

    Args:
        dim: of the student's space.
        seed: of the draw.

    Learned state:
        weight_: (dim, teacher_dim) float32, orthonormal rows.
    """

    def __init__(self, dim: int, *, seed: int = 0):
        self.dim, self.seed = dim, seed

    def fit(self, store: Source | FeatureStore, progress: Progress | None = None) -> "RandomOrthonormal":
        """Reads no features.

        Raises:
            ValueError: `dim` is larger than the teacher's.
        """
        source = checked_source(store, self.dim)
        drawn = np.random.default_rng(self.seed).normal(size=(source.embedding_dim, self.dim))
        q, r = np.linalg.qr(drawn)
        self.weight_ = (q * np.sign(np.diagonal(r))).T.astype(np.float32)
        return self

    def module(self) -> Frozen:
        return Frozen(self.weight_)
