"""The best linear compression of the teacher's cosine Gram matrix, in closed form."""

import numpy as np
from jaxtyping import Float

from distill.source import Source
from featcache.store import FeatureStore


class Spectral:
    """Top right singular vectors of the L2-normalised embeddings.

    By Eckart–Young no linear map to `dim` dimensions leaves a Gram matrix closer, in Frobenius norm, to the
    teacher's. Not centred: cosines are angles at the origin.

    Learned state:
        weight_: (dim, teacher_dim) float32, orthonormal rows, strongest direction first.
    """

    def __init__(self, dim: int):
        self.dim = dim

    def fit(self, store: Source | FeatureStore) -> "Spectral":
        """Streams once over every view of every ok row; memory O(block · D + D²).

        Raises:
            ValueError: `dim` is larger than the teacher's.
        """
        source = Source.of(store)
        width = source.embedding_dim
        if self.dim > width:
            raise ValueError(
                f"{source.path}: its embeddings have {width} dimensions, a mapping cannot make {self.dim} of them"
            )
        second_moment = np.zeros((width, width))
        for view in range(source.view_counts.max()):
            for block in source.blocks(view=view):
                unit = unit_rows(block)
                second_moment += (unit.T @ unit).astype(np.float64)
        _, vectors = np.linalg.eigh(second_moment)
        directions = vectors[:, ::-1][:, : self.dim].T
        signs = np.sign(directions[np.arange(self.dim), np.abs(directions).argmax(1)])
        self.weight_ = (directions * signs[:, None]).astype(np.float32)
        return self

    def transform(self, embedding: Float[np.ndarray, "n teacher_dim"]) -> Float[np.ndarray, "n dim"]:
        return unit_rows(embedding) @ self.weight_.T


def unit_rows(embedding: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """float32 rows of length one; a row of zeros stays zero."""
    embedding = embedding.astype(np.float32)
    length = np.linalg.norm(embedding, axis=1, keepdims=True)
    return embedding / np.where(length > 0, length, 1)
