"""No mapping: for students as wide as their teacher, or wider."""

import numpy as np
from torch import Tensor, nn

from distill.mappings import FeatureMapping, Frozen, Told
from featcache.rows import Rows
from featcache.store import FeatureStore


class Identity(FeatureMapping):
    """The embedding as it is stored; for wider students lifted, its length kept.

    Args:
        dim: of the student's space.
        seed: of the lift.

    Learned state:
        weight_: (dim, teacher_dim) float32, the identity or the lift.
    """

    turns = False

    def __init__(self, dim: int, *, seed: int = 0):
        self.dim, self.seed = dim, seed

    def fit(self, store: Rows | FeatureStore, progress: Told | None = None) -> "Identity":
        """Reads no features.

        Raises:
            ValueError: `dim` is less than the teacher's.
        """
        rows = Rows.of(store)
        if self.dim < rows.embedding_dim:
            raise ValueError(
                f"{rows.name}: its embeddings have {rows.embedding_dim} dimensions, the student {self.dim}; the "
                f"identity mapping needs a student of {rows.embedding_dim} or more, another mapping does not"
            )
        if self.dim > rows.embedding_dim:
            self._lift(rows, self.seed)
        else:
            self.weight_ = np.eye(self.dim, dtype=np.float32)
        return self

    def module(self) -> nn.Module:
        dim, teacher_dim = self.weight_.shape
        return Frozen(self.weight_, normalised="none") if dim > teacher_dim else _Float()


class _Float(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.float()
