"""No mapping: for students as wide as their teacher."""

import numpy as np
from torch import Tensor, nn

from distill.mappings._mapping import Mapping, Progress
from distill.source import Source
from featcache.store import FeatureStore


class Identity(Mapping):
    """The embedding as it is stored.

    Learned state:
        weight_: (dim, dim) float32, the identity.
    """

    def __init__(self, dim: int):
        self.dim = dim

    def fit(self, store: Source | FeatureStore, progress: Progress | None = None) -> "Identity":
        """Reads no features.

        Raises:
            ValueError: `dim` is not the teacher's.
        """
        source = Source.of(store)
        if self.dim != source.embedding_dim:
            raise ValueError(
                f"{source.path}: its embeddings have {source.embedding_dim} dimensions, the student {self.dim}; the "
                f"identity mapping needs a student of {source.embedding_dim}, another mapping does not"
            )
        self.weight_ = np.eye(self.dim, dtype=np.float32)
        return self

    def module(self) -> nn.Module:
        return _Float()


class _Float(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.float()
