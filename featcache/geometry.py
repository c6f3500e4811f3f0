"""What rows of embeddings look like as a whole: in one pass over them, and of a sample."""

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

Unit = Float32[np.ndarray, "_ d"]


def unit_rows(rows: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Rows scaled to norm 1, in float32; rows of norm zero stay zero."""
    wide = rows.astype(np.float64)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(norm > 0, norm, 1.0)).astype(np.float32)


class Values:
    """What values the dimensions of rows take, told block by block.

    Attributes:
        not_finite, zero: rows with a NaN or an infinity, and rows of norm zero.
    """

    def __init__(self, dimensions: int):
        self.not_finite = self.zero = 0
        self._least, self._most = np.full(dimensions, np.inf), np.full(dimensions, -np.inf)

    def add(self, rows: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
        """Which of these rows are finite; the others count for nothing else."""
        finite = np.isfinite(rows).all(axis=1)
        self.not_finite += int((~finite).sum())
        kept = rows if finite.all() else rows[finite]
        self.zero += int((~kept.any(axis=1)).sum())
        if len(kept):
            self._least = np.minimum(self._least, kept.min(axis=0))
            self._most = np.maximum(self._most, kept.max(axis=0))
        return finite

    @property
    def constant(self) -> int:
        """Dimensions in which all rows have one value, 0 or another; none where there are no two rows to tell."""
        return int((self._least == self._most).sum())

    @property
    def always_zero(self) -> int:
        return int(((self._least == 0) & (self._most == 0)).sum())


class Nearest:
    """The cosine of each query to the most similar of many rows of other images, told block by block.

    Args:
        queries: (q, d) of norm 1.
        images: (q,) numbers; rows of the same number are the same image and no neighbour.

    Attributes:
        cosine: (q,), −inf before there is a row of another image.
    """

    def __init__(self, queries: Unit, images: Int64[np.ndarray, " _"]):
        self._queries, self._images = queries, images
        self.cosine = np.full(len(queries), -np.inf, np.float32)

    def add(self, rows: Unit, images: Int64[np.ndarray, " _"]) -> None:
        if not (len(rows) and len(self._queries)):
            return
        cosine = self._queries @ rows.T
        cosine[self._images[:, None] == images] = -np.inf
        np.maximum(self.cosine, cosine.max(axis=1), out=self.cosine)

    @property
    def distances(self) -> Float[np.ndarray, " _"]:
        """1 − cosine, 0…2, of the queries that have a neighbour."""
        return np.maximum(1.0 - self.cosine[np.isfinite(self.cosine)].astype(np.float64), 0.0)


def median_apart(rows: Unit, images: Int64[np.ndarray, " _"]) -> float | None:
    """The median of 1 − cosine, 0…2, over all pairs of these rows of norm 1 that are of different images."""
    cosine = (rows @ rows.T)[images[:, None] < images]
    return float(np.median(1.0 - cosine.astype(np.float64))) if cosine.size else None


def effective_rank(rows: Float[np.ndarray, "n d"]) -> float | None:
    """In how many directions these rows differ from their mean: exp(−Σ p ln p) of their singular values, divided by their
    sum; 1 … min(n − 1, d), None where they do not differ.

    Roy and Vetterli 2007, "The effective rank", EUSIPCO.
    """
    wide = rows.astype(np.float64)
    wide -= wide.mean(axis=0) if len(wide) else 0.0
    gram = wide.T @ wide if wide.shape[0] > wide.shape[1] else wide @ wide.T
    values = np.linalg.eigvalsh(gram) if gram.size else np.zeros(0)
    # Squares of singular values; below this share of the largest they are rounding error.
    singular = np.sqrt(values[values > 1e-12 * values.max(initial=0.0)])
    if not singular.size:
        return None
    share = singular / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))
