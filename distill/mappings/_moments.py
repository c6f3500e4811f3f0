"""Sums over every view of every row of a store, one block at a time."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from distill.mappings import Told
from featcache.rows import Rows

Normalised = Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, "n d"]]

_BLOCK = 8192


def second_moment(rows: Rows, normalised: Normalised, progress: Told | None = None) -> Float[np.ndarray, "d d"]:
    """Σ xxᵀ over the normalised rows, float64. Not centred: cosines are angles at the origin."""
    total = np.zeros((rows.embedding_dim, rows.embedding_dim))
    for block in _every_block(rows, progress):
        x = normalised(block)
        total += (x.T @ x).astype(np.float64)
    return total


def mean_and_covariance(
    rows: Rows, progress: Told | None = None
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Of the rows as they are stored, float64; the covariance divides by the count less one.

    Blocks are centred on their own means and merged (Chan, Golub & LeVeque 1983), so that a mean far from the origin
    costs no digits.
    """
    count, mean = 0, np.zeros(rows.embedding_dim)
    scatter = np.zeros((rows.embedding_dim, rows.embedding_dim))
    for block in _every_block(rows, progress):
        here = block.mean(axis=0, dtype=np.float64)
        x = (block - here).astype(np.float32)
        shift, merged = here - mean, count + len(block)
        scatter += (x.T @ x).astype(np.float64) + np.outer(shift, shift) * (count * len(block) / merged)
        mean, count = mean + shift * (len(block) / merged), merged
    return mean, scatter / max(1, count - 1)


def leading_directions(
    symmetric: Float[np.ndarray, "d d"], dim: int
) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim d"]]:
    """The `dim` largest eigenvalues and their eigenvectors as rows, largest first.

    An eigenvector's sign is free; here its entry of largest magnitude is positive.
    """
    values, vectors = np.linalg.eigh(symmetric)
    directions = vectors[:, ::-1][:, :dim].T
    signs = np.sign(directions[np.arange(dim), np.abs(directions).argmax(1)])
    return values[::-1][:dim].clip(0), directions * signs[:, None]


def _every_block(rows: Rows, progress: Told | None) -> Iterator[np.ndarray]:
    done, total = 0, int(rows.view_counts.sum())
    for view in range(rows.view_counts.max()):
        for block in rows.blocks(_BLOCK, view):
            yield block
            done += len(block)
            if progress:
                progress(done, total)
