"""Means and covariances of a bank, read once and shared by every detector that asks for the same ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float, Int

from featcache.geometry import unit
from featcache.rows import Rows

_PIECE_FLOATS = 2**22  # 32 MiB of float64

_KNOWN: WeakKeyDictionary[Rows, dict[bool, Moments]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Moments:
    """First and second moments of n bank rows in float64.

    `total` is the covariance of all rows about their mean, `within` that of every row about its class's mean
    (the rows without a label form one more class); both are divided by n.
    """

    classes: Int[np.ndarray, " c"]
    count: Int[np.ndarray, " c"]
    mean: Float[np.ndarray, " d"]
    class_mean: Float[np.ndarray, "c d"]
    total: Float[np.ndarray, "d d"]
    within: Float[np.ndarray, "d d"]


def moments(bank: Rows, normalise: bool = False) -> Moments:
    """The moments of the bank's rows, of its rows scaled to norm 1 when `normalise`.

    One pass over the bank; asked again for the same `Rows`, the same object. Holds d × d and classes × d
    float64. Raises `ValueError` when a row is not finite.
    """
    known = _KNOWN.setdefault(bank, {})
    if normalise not in known:
        known[normalise] = _moments(bank, normalise)
    return known[normalise]


def _moments(bank: Rows, normalise: bool) -> Moments:
    d = bank.embedding_dim
    classes, of_row, count = np.unique(bank.labels, return_inverse=True, return_counts=True)
    sums, outer = np.zeros((len(classes), d)), np.zeros((d, d))
    pivot = None  # a rough mean: what is summed stays small, so that little is lost when means are taken off
    start = 0
    for block in bank.blocks_of(("embedding",)):
        for x in pieces(block["embedding"], d):
            x = unit(x) if normalise else x
            pivot = x.mean(axis=0) if pivot is None else pivot
            x = x - pivot
            outer += x.T @ x
            add_by_group(sums, x, of_row[start : start + len(x)])
            start += len(x)
    assert pivot is not None
    assert start == len(bank)
    mean, class_mean = sums.sum(axis=0) / start, sums / count[:, None]
    total = outer / start - np.outer(mean, mean)
    within = outer / start - (class_mean.T * (count / start)) @ class_mean
    return Moments(classes, count, mean + pivot, class_mean + pivot, total, within)


def add_by_group(
    sums: Float[np.ndarray, "groups d"], x: Float[np.ndarray, "n d"], group: Int[np.ndarray, " n"]
) -> None:
    """Add each row to its group's sum, in place."""
    order = np.argsort(group, kind="stable")
    present, first = np.unique(group[order], return_index=True)
    if len(x):
        sums[present] += np.add.reduceat(x[order], first, axis=0)


def pieces(x: Float[np.ndarray, "n d"], width: int) -> Iterator[Float[np.ndarray, "_ d"]]:
    """The rows in order as float64, so many at a time that an array of `width` columns beside them is 32 MiB."""
    step = max(1, _PIECE_FLOATS // max(width, x.shape[1]))
    for start in range(0, max(1, len(x)), step):
        yield x[start : start + step].astype(np.float64)


def whitening(covariance: Float[np.ndarray, "d d"], bank: Rows, scale: float | None = None) -> Float[np.ndarray, "d r"]:
    """W with WWᵀ the pseudo-inverse of the covariance.

    Directions in which the bank does not vary (eigenvalues within rounding of zero, relative to `scale`, by
    default the largest) are left out. Warns where the bank has no more rows than dimensions. Raises `ValueError` when no
    direction is left.
    """
    if len(bank) <= len(covariance):
        warnings.warn(
            f"{bank.name}: the covariance of {len(bank)} rows in {len(covariance)} dimensions is singular, and distances "
            "under it say little; give a larger bank, or use knn",
            RuntimeWarning,
            stacklevel=3,
        )
    value, vector = np.linalg.eigh(covariance)
    scale = float(value[-1]) if scale is None else scale
    kept = value > len(value) * np.finfo(np.float64).eps * scale
    if not kept.any():
        raise ValueError(
            f"the rows of {bank.name} do not vary about their means, so there is no covariance to measure with; "
            "use a bank with several different rows of a class"
        )
    return vector[:, kept] / np.sqrt(value[kept])


class Gaussians:
    """Squared Mahalanobis distances to several means under one covariance: ‖(x − μ)W‖², WWᵀ its inverse."""

    def __init__(self, means: Float[np.ndarray, "c d"], whiten: Float[np.ndarray, "d r"]) -> None:
        self._whiten = whiten
        self._origin = means.mean(axis=0)
        self._means = (means - self._origin) @ self._whiten
        self._mean_norm = (self._means**2).sum(axis=1)

    def squared_distance(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """From each row to each mean, not negative."""
        z = (x - self._origin) @ self._whiten
        product = z @ self._means.T
        return np.maximum((z**2).sum(axis=1)[:, None] - 2 * product + self._mean_norm, 0.0)
