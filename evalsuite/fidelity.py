"""How much of the teacher's geometry a student kept.

Every measure compares two n×n Gram matrices, yet none is formed: with rows x of one space and y of the other,
Σᵢⱼ(xᵢ·xⱼ)(yᵢ·yⱼ) = ‖XᵀY‖²_F, so sums over all pairs follow from sums over rows. Memory is O(d·d'), time
O(n·d·d').
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

from evalsuite.result import Metric, Result, versions
from evalsuite.rows import Rows, Store

Blocks = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]

_BLOCK_ROWS = 8192
_LEAST_ROWS = 4  # the debiased estimator divides by n − 3
_NO_SPREAD = 1e-12  # a variance below this share of the mean square is rounding error


def fidelity(teacher: Store, student: Store) -> Result:
    """Agreement between two stores' embeddings of the same samples; dimensions and encoders may differ.

    Rows are joined by sample id where both are ok (the count is `inputs["joined"]`). Metrics, without
    intervals (pairs of rows are not independent):

    - `gram_pearson`: Pearson correlation of the off-diagonal entries of the two cosine-similarity matrices,
      in [-1, 1];
    - `gram_pearson_centred`: the same after subtracting the mean of the unit embeddings and normalising
      again. Most embeddings share a large mean direction; this leaves it out;
    - `cka_debiased`: linear CKA of the raw embeddings with the unbiased HSIC estimator, at most 1, near 0
      (possibly below) for unrelated spaces whatever their dimensions.

    Exact in float64 in two passes over the stores.

    Raises `ValueError` when a store repeats a sample id, fewer than 4 rows join, the stores hold different
    images under one id, or all rows of a store are alike.

    Kornblith et al. 2019, arXiv 1905.00414 (CKA); Song et al. 2012, "Feature Selection via Dependence
    Maximization", JMLR 13 (unbiased HSIC).
    """
    x_rows, y_rows = Rows.of(teacher), Rows.of(student)
    left, right = _join(x_rows, y_rows)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(left), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            yield x_rows.take(left[part]), y_rows.take(right[part])

    try:
        values = compare(blocks)
    except ValueError as error:
        raise ValueError(f"cannot compare {x_rows.name} with {y_rows.name}: {error}") from error
    return Result(
        "fidelity",
        {"teacher": x_rows.record(), "student": y_rows.record(), "joined": len(left)},
        {"normalisation": "l2 for gram_pearson, none for cka_debiased"},
        {name: Metric(value) for name, value in values.items()},
        versions(),
    )


def compare(blocks: Blocks) -> dict[str, float]:
    """The three measures of `fidelity` by name, on paired blocks of rows ((b, d), (b, d')); `blocks()` is
    called twice.

    Raises `ValueError` when there are fewer than 4 rows or all rows of one side are alike.
    """
    n, x_mean, y_mean, x_unit_mean, y_unit_mean = 0, 0.0, 0.0, 0.0, 0.0
    for x, y in blocks():
        x, y = x.astype(np.float64), y.astype(np.float64)
        n += len(x)
        x_mean, y_mean = x_mean + x.sum(axis=0), y_mean + y.sum(axis=0)
        x_unit_mean, y_unit_mean = x_unit_mean + _unit(x).sum(axis=0), y_unit_mean + _unit(y).sum(axis=0)
    if n < _LEAST_ROWS:
        raise ValueError(f"{n} rows were paired, at least {_LEAST_ROWS} are needed; extract both from one corpus")
    x_mean, y_mean, x_unit_mean, y_unit_mean = x_mean / n, y_mean / n, x_unit_mean / n, y_unit_mean / n

    cosine, centred, raw = _PairSums(), _PairSums(), _PairSums()
    for x, y in blocks():
        x, y = x.astype(np.float64), y.astype(np.float64)
        cosine.add(_unit(x), _unit(y))
        centred.add(_unit(_unit(x) - x_unit_mean), _unit(_unit(y) - y_unit_mean))
        # HSIC does not change when a space is shifted; centring first keeps a large offset from eating the
        # digits.
        raw.add(x - x_mean, y - y_mean)
    return {
        "gram_pearson": cosine.pearson(),
        "gram_pearson_centred": centred.pearson(),
        "cka_debiased": raw.cka_debiased(),
    }


class _PairSums:
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


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to norm 1; rows of norm zero stay zero."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1.0)


def _join(x: Rows, y: Rows) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Positions in `x` and `y` of the samples that both have, in `x`'s order."""
    for rows in (x, y):
        if len(np.unique(rows.sample_ids)) < len(rows):
            raise ValueError(f"{rows.name} repeats a sample id; give each sample its own and extract again")
    _, left, right = np.intersect1d(x.sample_ids, y.sample_ids, assume_unique=True, return_indices=True)
    order = np.argsort(left)
    left, right = left[order], right[order]
    if len(left) < _LEAST_ROWS:
        raise ValueError(
            f"{x.name} and {y.name} share {len(left)} sample ids, at least {_LEAST_ROWS} are needed; "
            "extract both from the same corpus"
        )
    x_content, y_content = x.content[left], y.content[right]
    known = x_content.any(axis=1) & y_content.any(axis=1)  # stores made from arrays have no images to hash
    different = int((known & (x_content != y_content).any(axis=1)).sum())
    if different:
        raise ValueError(
            f"{x.name} and {y.name} hold different images under {different} of {len(left)} shared ids; "
            "extract both from the same corpus"
        )
    return left, right
