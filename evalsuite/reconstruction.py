"""How well features tell their inputs: ridge regression on rows that it was not fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.logistic import held_out
from featcache.rows import Rows

PENALTIES = tuple(10.0**e for e in range(-8, 2))
"""Times the mean square length of the centred rows; one of them is chosen."""


@dataclass(frozen=True)
class Reconstructed:
    """Of rows held out, Σ over the inputs' dimensions of (input − mean of the fitted rows)² and of (input − reconstruction)²,
    and the penalty that was chosen."""

    spread: Float[np.ndarray, " q"]
    error: Float[np.ndarray, " q"]
    penalty: float


def reconstruct(
    features: Float[np.ndarray, "n d"],
    inputs: Float[np.ndarray, "n p"],
    held: Bool[np.ndarray, " n"],
    classes: Int[np.ndarray, " n"],
    seed: int,
) -> Reconstructed:
    """The inputs of the `held` rows from their features, by the ridge regression ‖X − F W − b‖² + λ ‖W‖² fitted to the others; b is
    not penalised. λ is the one of `PENALTIES` of the least error on a tenth of each class of these, when fitted to the rest."""
    f, x, others = features[~held].astype(np.float64), inputs[~held].astype(np.float64), classes[~held]
    inner = held_out(np.unique(others, return_inverse=True)[1], seed)
    errors = [((x[inner] - of(f[inner])) ** 2).sum() for of in _ridges(f[~inner], x[~inner], PENALTIES)]
    penalty = PENALTIES[int(np.argmin(errors))]
    (fitted,) = _ridges(f, x, (penalty,))
    true = inputs[held].astype(np.float64)
    spread = ((true - x.mean(axis=0)) ** 2).sum(axis=1)
    return Reconstructed(spread, ((true - fitted(features[held].astype(np.float64))) ** 2).sum(axis=1), penalty)


class _Ridge:
    """x ≈ (f − f̄) W + x̄."""

    def __init__(
        self, centre: Float[np.ndarray, " d"], weight: Float[np.ndarray, "d p"], mean: Float[np.ndarray, " p"]
    ) -> None:
        self._centre, self._weight, self._mean = centre, weight, mean

    def __call__(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n p"]:
        return (features - self._centre) @ self._weight + self._mean


def _ridges(
    features: Float[np.ndarray, "n d"], inputs: Float[np.ndarray, "n p"], penalties: tuple[float, ...]
) -> list[_Ridge]:
    """One for each penalty, from one eigendecomposition of the features' covariance."""
    centre, mean = features.mean(axis=0), inputs.mean(axis=0)
    f, n = features - centre, len(features)
    values, vectors = np.linalg.eigh(f.T @ f / n)
    values = np.maximum(values, 0)
    scale = float(values.sum()) or 1.0  # of rows that are all alike: nothing is told
    along = vectors.T @ (f.T @ (inputs - mean) / n)
    return [_Ridge(centre, vectors @ (along / (values + each * scale)[:, None]), mean) for each in penalties]


def thumbnails(rows: Rows, side: int) -> Float[np.ndarray, "n p"]:
    """The images that the store of these rows keeps, whole, reduced to `side` × `side` px, RGB in 0…1. Raises `ValueError` where it
    keeps none, or not one of these."""
    from PIL import Image

    from featcache.inputs.images import decode

    (store,) = rows.stores
    found = np.empty((len(rows), side * side * 3), np.float32)
    for at, row in enumerate(rows.index.tolist()):
        encoded = store.pixels(row)
        if not encoded:
            raise ValueError(f"{store.path}: the image of row {row} is not kept; give --of STORE")
        small = decode(encoded).resize((side, side), Image.Resampling.BOX)
        found[at] = np.asarray(small, np.float32).reshape(-1) / 255
    return found
