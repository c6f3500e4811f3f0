"""The best linear compression of the teacher's cosine Gram matrix, in closed form."""

import numpy as np

from distill.mappings import FeatureMapping, Frozen, Told, checked_rows
from distill.mappings._moments import leading_directions, second_moment
from featcache.geometry import unit
from featcache.rows import Rows
from featcache.store import FeatureStore


class Spectral(FeatureMapping):
    """Top right singular vectors of the L2-normalised embeddings.

    By Eckart–Young (1936) no linear map to `dim` dimensions leaves a Gram matrix closer, in Frobenius norm, to the
    teacher's. Not centred: cosines are angles at the origin. Rows are mapped at length one.

    Args:
        dim: of the student's space; with more than the teacher has, the matrix stays as it is, and a lift does it.
        seed: of the lift.

    Learned state:
        weight_: (dim, teacher_dim) float32, orthonormal rows, strongest direction first; the lift's columns.
    """

    def __init__(self, dim: int, *, seed: int = 0):
        self.dim, self.seed = dim, seed

    def fit(self, store: Rows | FeatureStore, progress: Told | None = None) -> "Spectral":
        """Streams once over every view of every ok row; memory O(block · D + D²).

        Args:
            progress: called with (rows done, rows), views counted.

        Raises:
            ValueError: `dim` is less than 1.
        """
        rows = checked_rows(store, self.dim)
        if self.dim > rows.embedding_dim:
            self._lift(rows, self.seed)
            return self
        _, directions = leading_directions(second_moment(rows, unit, progress), self.dim)
        self.weight_ = np.ascontiguousarray(directions, np.float32)
        return self

    def module(self) -> Frozen:
        return Frozen(self.weight_)
