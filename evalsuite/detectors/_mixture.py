"""A mixture of Gaussians with a covariance each: its exact density, without every row under every component in float64."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from featcache.geometry import logsumexp

_NEGLIGIBLE = 40.0  # nats: e⁻⁴⁰ of a sum is below what float64 can tell, 2⁻⁵³


class Mixture:
    """Σ_c w_c N(x; μ_c, Σ_c), Σ_c⁻¹ = LᵀL with L lower triangular.

    Most components are so far from a row that they add nothing to its sum. Which these are is proposed by float32 products
    and proved by their error: |fl(Ly) − Ly| ≤ γ |L||y|, whatever the order of summation (Higham 2002, "Accuracy and
    Stability of Numerical Algorithms", 3.5). The others, one or two of a hundred where classes are apart, are computed in
    float64; those left out would change no sum by more than e⁻⁴⁰ of it.

    Args:
        means: μ_c.
        inverse: L of each component; kept, not copied.
        log_weight: of w_c and all of N that does not depend on x.
    """

    def __init__(
        self,
        means: Float[np.ndarray, "c d"],
        inverse: Float[np.ndarray, "c d d"],
        log_weight: Float[np.ndarray, " c"],
    ) -> None:
        self._means, self._inverse, self._log_weight = means, inverse, log_weight
        self._origin = means.mean(axis=0)
        self._size = np.array([np.linalg.norm(each) for each in inverse])

    def log_density(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """In nats."""
        of_component = np.full((len(x), len(self._means)), -np.inf)
        for c, rows in enumerate(self._counting(x).T):
            if rows.any():
                y = _product(self._inverse[c], x[rows] - self._means[c])
                of_component[rows, c] = self._log_weight[c] - 0.5 * (y**2).sum(axis=1)
        return logsumexp(of_component)

    def every_log_density(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The same the plain way, by every component."""
        pairs = zip(self._means, self._inverse, strict=True)
        squared = np.stack([(((x - mean) @ inverse.T) ** 2).sum(axis=1) for mean, inverse in pairs], axis=1)
        return logsumexp(self._log_weight - 0.5 * squared)

    def _counting(self, x: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, "n c"]:
        """Which components may add to each row's sum."""
        distance, error = self._distances(x)
        most = self._log_weight - 0.5 * np.maximum(distance - error, 0.0) ** 2
        least = self._log_weight - 0.5 * (distance + error) ** 2
        return most >= least.max(axis=1, keepdims=True) - _NEGLIGIBLE - np.log(len(self._means))

    def _distances(self, x: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, "n c"], Float[np.ndarray, "n c"]]:
        """‖L(x − μ_c)‖ by float32 products, and how wrong each may be."""
        d = x.shape[1]
        gamma = (d + 16) * 2.0**-24  # d products and their sum, the rounding of x, μ and L, the norm
        centred, means = x - self._origin, self._means - self._origin
        squared = np.empty((len(x), len(means)), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            narrow, narrow_means = centred.astype(np.float32), means.astype(np.float32)
            for c, mean in enumerate(narrow_means):
                y = _product(self._inverse[c].astype(np.float32), narrow - mean)
                squared[:, c] = np.einsum("nd,nd->n", y, y)
        known = np.isfinite(squared)  # not what is out of float32's range
        distance = np.sqrt(np.where(known, squared, 0.0), dtype=np.float64)
        reach = np.linalg.norm(centred, axis=1)[:, None] + np.linalg.norm(means, axis=1)
        return distance, np.where(known, gamma * (distance + self._size * reach), np.inf)


def _product(lower: Float[np.ndarray, "d d"], x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Each row times the lower triangle, in half the time of a product with all of it; it takes the place of `x`."""
    from scipy.linalg.blas import dtrmm, strmm

    multiply = dtrmm if x.dtype == np.float64 else strmm
    return multiply(1.0, lower.T, x.T, trans_a=1, overwrite_b=1).T  # seen in Fortran's order, so that nothing is copied
