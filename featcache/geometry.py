"""Rows of embeddings as directions: unit rows, cosines, votes of neighbours; and what many look like as a whole."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

Unit = Float32[np.ndarray, "_ d"]


_UNIT_FLOATS = 2**18  # float64 values scaled at once
_VOTE_FLOATS = 2**22  # (query, class) votes held at once
_NO_SPREAD = 1e-12  # a variance below this share of the mean square is rounding error


_ONE_SIDED = 0.05  # least share of what negative coordinates add up to, for them to count


def one_sided(rows: Float[np.ndarray, "n d"]) -> bool:
    """Whether rows have next to no negative coordinates, as what is pooled after a rectifier (ReLU, SiLU, …) has."""
    size = np.abs(rows).sum(dtype=np.float64)
    return bool(-np.minimum(rows, 0).sum(dtype=np.float64) <= _ONE_SIDED * size)


def unit(rows: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    """Rows scaled to norm 1, computed in the precision they are in (float16: in float32); rows of norm zero stay zero."""
    rows = rows.astype(np.float32) if rows.dtype == np.float16 else rows
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norm == 0, 1, norm)


def unit_rows(rows: Float[np.ndarray, "n d"], what: str = "rows", first: int = 0) -> Float32[np.ndarray, "n d"]:
    """Rows scaled to norm 1 in float64, as C-contiguous float32; rows of norm zero stay zero.

    Raises:
        ValueError: a row is not finite; said by its number among `what`, of which these are those from `first`.
    """
    scaled = np.empty(rows.shape, np.float32)
    step = max(1, _UNIT_FLOATS // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        wide = rows[start : start + step].astype(np.float64)
        norm = np.sqrt((wide * wide).sum(axis=1))
        if not np.isfinite(norm).all():
            bad = first + start + int(np.isfinite(norm).argmin())
            raise ValueError(f"{what} row {bad} is not finite; leave it out, or extract it again with --dtype float32")
        np.divide(wide, np.where(norm > 0, norm, 1.0)[:, None], out=scaled[start : start + step], casting="same_kind")
    return scaled


def logsumexp(x: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
    """log Σ exp of each row, without overflow."""
    top = x.max(axis=1)
    return top + np.log(np.exp(x - top[:, None]).sum(axis=1))


def softmax(x: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Probabilities of each row, in the precision that it is in."""
    weight = np.exp(x - x.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def vote_weights(similarity: Float[np.ndarray, "q k"], temperature: float) -> Float[np.ndarray, "q k"]:
    """The weights softmax(similarity / temperature) of neighbours, nearest first, up to a factor a row."""
    return np.exp((similarity.astype(np.float64) - similarity[:, :1]) / temperature)


def votes(
    weight: Float[np.ndarray, "q k"], label: Int[np.ndarray, "q k"], n_classes: int
) -> Iterator[tuple[slice, Float[np.ndarray, "b c"]]]:
    """The sum of each class's weights, block by block of queries."""
    step = max(1, _VOTE_FLOATS // n_classes)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        rows = len(weight[part])
        cell = np.arange(rows)[:, None] * n_classes + label[part]
        yield part, np.bincount(cell.ravel(), weight[part].ravel(), rows * n_classes).reshape(rows, n_classes)


def winners(weight: Float[np.ndarray, "q k"], label: Int[np.ndarray, "q k"], n_classes: int) -> Int[np.ndarray, " q"]:
    """The class with the most votes for each query; equal votes go to the lower one."""
    won = np.empty(len(weight), np.int64)
    for part, sums in votes(weight, label, n_classes):
        won[part] = sums.argmax(axis=1)
    return won


class GramSums:
    """Sums over all pairs of rows i ≠ j of the Gram matrices K = XXᵀ and L = YYᵀ, from sums over rows."""

    def __init__(self) -> None:
        self.n = 0
        self.x = self.y = np.zeros(())  # Σ x, Σ y
        self.xx = self.xy = self.yy = np.zeros(())  # XᵀX, XᵀY, YᵀY
        self.x2 = self.y2 = 0.0  # Σ|x|², the trace of K
        self.x4 = self.x2y2 = self.y4 = 0.0  # Σ|x|²|y|², the diagonals' part of Σ K∘L
        self.x2x = self.x2y = self.y2x = self.y2y = np.zeros(())  # Σ|x|² y and its like

    def add(self, x: Float[np.ndarray, "b d"], y: Float[np.ndarray, "b e"]) -> None:
        self.n += len(x)
        self.x, self.y = self.x + x.sum(axis=0), self.y + y.sum(axis=0)
        self.xx, self.xy, self.yy = self.xx + x.T @ x, self.xy + x.T @ y, self.yy + y.T @ y
        x2, y2 = (x * x).sum(axis=1), (y * y).sum(axis=1)
        self.x2, self.y2 = self.x2 + x2.sum(), self.y2 + y2.sum()
        self.x4, self.x2y2, self.y4 = self.x4 + x2 @ x2, self.x2y2 + x2 @ y2, self.y4 + y2 @ y2
        self.x2x, self.x2y = self.x2x + x2 @ x, self.x2y + x2 @ y
        self.y2x, self.y2y = self.y2x + y2 @ x, self.y2y + y2 @ y

    def pearson(self) -> float:
        """Correlation of the off-diagonal entries of K and L, in [-1, 1]."""
        pairs = self.n * (self.n - 1)
        k_mean, l_mean = (total / pairs for total in self._totals())
        kk, kl, ll = (product / pairs for product in self._products())
        k_variance, l_variance = kk - k_mean**2, ll - l_mean**2
        if not (k_variance > _NO_SPREAD * kk and l_variance > _NO_SPREAD * ll):
            raise ValueError("all pairs of rows of one store are equally similar: nothing to correlate")
        return float(np.clip((kl - k_mean * l_mean) / np.sqrt(k_variance * l_variance), -1.0, 1.0))

    def cka_debiased(self) -> float:
        """HSIC₁(K, L) / √(HSIC₁(K, K) HSIC₁(L, L)), at most 1. Rows must be centred for the digits' sake."""
        n = self.n
        k, l_ = self._totals()
        # 1ᵀKL1 = Σᵢ (x·Σx − |x|²)(y·Σy − |y|²) over zero-diagonal K and L, multiplied out into sums over rows
        k1k1 = float(self.x @ self.xx @ self.x - 2 * self.x2x @ self.x + self.x4)
        k1l1 = float(self.x @ self.xy @ self.y - self.y2x @ self.x - self.x2y @ self.y + self.x2y2)
        l1l1 = float(self.y @ self.yy @ self.y - 2 * self.y2y @ self.y + self.y4)
        kk, kl, ll = self._products()

        def hsic(product: float, totals: float, cross: float) -> float:
            return product + totals / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)

        hsic_kk, hsic_kl, hsic_ll = hsic(kk, k * k, k1k1), hsic(kl, k * l_, k1l1), hsic(ll, l_ * l_, l1l1)
        if not (hsic_kk > _NO_SPREAD * self.x4 and hsic_ll > _NO_SPREAD * self.y4):
            raise ValueError("all rows of one store are alike: CKA is not defined")
        return float(min(hsic_kl / np.sqrt(hsic_kk * hsic_ll), 1.0))

    def procrustes(self, cross: Float[np.ndarray, "d e"]) -> float:
        """min ‖aXR − Y‖² / ‖Y‖² over scales a and rotations R, in [0, 1], where XᵀY is `cross` and rows are
        centred. Symmetric in X and Y; `scipy.spatial.procrustes`'s disparity."""
        aligned = np.linalg.svd(cross, compute_uv=False).sum()
        return float(np.clip(1 - aligned**2 / (self.x2 * self.y2), 0.0, 1.0))

    def _totals(self) -> tuple[float, float]:
        """Σ over i ≠ j of K and of L."""
        return float(self.x @ self.x - self.x2), float(self.y @ self.y - self.y2)

    def _products(self) -> tuple[float, float, float]:
        """Σ over i ≠ j of K∘K, K∘L and L∘L."""
        return (
            float((self.xx**2).sum() - self.x4),
            float((self.xy**2).sum() - self.x2y2),
            float((self.yy**2).sum() - self.y4),
        )


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
