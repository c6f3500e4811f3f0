"""PHI-S, the standardisation of RADIO's teachers."""

import numpy as np
from jaxtyping import Float

from distill.mappings import FeatureMapping, Frozen, Told, checked_rows
from distill.mappings._moments import leading_directions, mean_and_covariance
from featcache.rows import Rows
from featcache.store import FeatureStore


class PhiS(FeatureMapping):
    """Centre, rotate so that every dimension has the same variance, divide by one number so that it is 1.

    PHI-S (Ranzinger et al. 2024, arXiv 2410.01680): y = H Uᵀ (x − mean) / √(mean eigenvalue), with U the
    eigenvectors of the covariance and H a Hadamard matrix over √dim. An isometry up to that one scale, of the
    embeddings as they are stored: angles at the mean stay, those at the origin do not, and lengths count.

    PHI-S itself keeps the dimension. Here, for a `dim` below the teacher's, U holds the `dim` strongest principal
    directions and the mean is over their eigenvalues. H comes from the constructions of Sylvester and Paley, which have
    every usual width (all powers of two, 192, 384, 768, 1152, 1280, …). Where they have none, H is the orthonormal
    DCT-II: its entries are spread, not equal in magnitude, so variances are only near 1. For a `dim` above the teacher's,
    all this happens in the teacher's dimensions and is then lifted.

    Args:
        dim: of the student's space.
        seed: of the lift.

    Learned state:
        mean_: (teacher_dim,) float32.
        weight_: (dim, teacher_dim) float32, orthogonal rows (of a lift, columns) of one length.
    """

    def __init__(self, dim: int, *, seed: int = 0):
        self.dim, self.seed = dim, seed

    def fit(self, store: Rows | FeatureStore, progress: Told | None = None) -> "PhiS":
        """Streams once over every view of every ok row; memory O(block · D + D²).

        Args:
            progress: called with (rows done, rows), views counted.

        Raises:
            ValueError: fewer than two ok rows, `dim` less than 1, or all rows are alike.
        """
        rows = checked_rows(store, self.dim, least_rows=2)
        mean, covariance = mean_and_covariance(rows, progress)
        dim = min(self.dim, rows.embedding_dim)
        variances, directions = leading_directions(covariance, dim)
        if not variances.mean() > 0:
            raise ValueError(f"{rows.name}: all rows are alike; there is no variance to standardise")
        self.mean_ = mean.astype(np.float32)
        self.weight_ = (_spread(dim) @ directions / np.sqrt(variances.mean())).astype(np.float32)
        if self.dim > dim:
            standard = self.weight_
            self._lift(rows, self.seed)
            self.weight_ = self.weight_ @ standard
        return self

    def module(self) -> Frozen:
        return Frozen(self.weight_, mean=self.mean_, normalised="none")


def _spread(size: int) -> Float[np.ndarray, "size size"]:
    """An orthonormal matrix that spreads every direction evenly over all dimensions."""
    hadamard = _hadamard(size)
    if hadamard is not None:
        return hadamard / np.sqrt(size)
    row, column = np.arange(size)[:, None], np.arange(size)
    cosine = np.cos(np.pi * (column + 0.5) * row / size) * np.sqrt(2 / size)
    cosine[0] /= np.sqrt(2)
    return cosine


def _hadamard(size: int) -> Float[np.ndarray, "size size"] | None:
    """±1 with orthogonal rows: doubled after Sylvester, of size prime + 1 after Paley; None where neither applies."""
    if size == 1:
        return np.ones((1, 1))
    prime = size - 1
    if prime % 4 == 3 and all(prime % factor for factor in range(2, int(prime**0.5) + 1)):
        character = np.full(prime, -1.0)  # 1 for squares modulo the prime, −1 for the rest, 0 for 0
        character[np.arange(prime) ** 2 % prime] = 1
        character[0] = 0
        matrix = np.eye(size)
        matrix[0, 1:], matrix[1:, 0] = 1, -1
        matrix[1:, 1:] += character[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
        return matrix
    half = _hadamard(size // 2) if size % 2 == 0 else None
    return None if half is None else np.kron([[1, 1], [1, -1]], half)
