"""A random projection: what a mapping that learns must beat."""

import numpy as np

from distill.mappings import FeatureMapping, Frozen, Told, checked_rows, lift
from featcache.rows import Rows
from featcache.store import FeatureStore


class RandomOrthonormal(FeatureMapping):
    """Orthonormal rows (for wider students, columns), uniform over all such: QR of a Gaussian, R's diagonal positive (Mezzadri 2007,
    arXiv math-ph/0609050). Rows are mapped at length one. Of the store it takes the width alone.

    Args:
        dim: of the student's space.
        seed: of the draw.

    Learned state:
        weight_: (dim, teacher_dim) float32, orthonormal rows or columns, whichever are fewer.
    """

    def __init__(self, dim: int, *, seed: int = 0):
        self.dim, self.seed = dim, seed

    def fit(self, store: Rows | FeatureStore, progress: Told | None = None) -> "RandomOrthonormal":
        """Reads no features.

        Raises:
            ValueError: `dim` is less than 1.
        """
        rows = checked_rows(store, self.dim)
        if self.dim > rows.embedding_dim:
            self._lift(rows, self.seed)
        else:
            self.weight_ = np.ascontiguousarray(lift(rows.embedding_dim, self.dim, self.seed).T)
        return self

    def module(self) -> Frozen:
        return Frozen(self.weight_)
