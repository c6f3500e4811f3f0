"""Density under one Gaussian a class."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._mixture import Mixture
from evalsuite.detectors._moments import Gaussians, Moments, moments, pieces
from featcache.geometry import logsumexp
from featcache.rows import Rows

_LIMIT = 2 * 2**30  # bytes of class covariances


class GMM(Detector):
    """Score = −log Σ_c (n_c/n) N(x; μ_c, Σ_c), any real number, in nats.

    Fitted by counting, without EM: class shares, means and covariances divided by n_c, `reg` added to their
    diagonal. `covariance` is `full`, one a class (pytorch-ood's detector), or `tied`, one for all (OpenOOD's
    choice; the better one when classes have fewer rows than dimensions). The logarithm is taken of the sum
    without leaving it: OpenOOD's `log(Σ exp(·) + 1e-45)` underflows and gives every row the same score.

    `full` holds classes × d × d float64 and refuses above 2 GiB of them; `tied` holds d × d and classes × d.
    """

    covariance: str = "full"
    reg: float = 1e-6

    def check(self) -> None:
        """Raises `ValueError` unless the covariance is known and nothing negative is added to it."""
        if self.covariance not in ("full", "tied"):
            raise ValueError(f"unknown covariance {self.covariance!r}; use gmm:covariance=full or gmm:covariance=tied")
        if not self.reg >= 0:
            raise ValueError(f"gmm:reg={self.reg!r} must be at least 0: it is added to variances")

    def fit(self, bank: Rows) -> GMM:
        """Two passes over the bank's labelled rows when `full`, one when `tied`.

        Raises `ValueError` when it has no labels, a class has a single row, the covariances are too large to
        hold, or one is not positive definite.
        """
        self.check()
        bank = bank.labelled()
        m = moments(bank)
        full = self.covariance == "full"
        if full:
            _check(m, bank)
            _warn_of_singular(m, bank)
        covariances = _class_covariances(m, bank) if full else m.within[None].copy()
        if self.reg > (variance := float(np.trace(m.within)) / len(m.within)):
            warnings.warn(
                f"{bank.name}: gmm:reg={self.reg!r} is more than the features vary ({variance:.2g} a dimension): it alone shapes the "
                "densities; give a smaller one, in the features' own unit squared",
                RuntimeWarning,
                stacklevel=2,
            )
        diagonal = np.arange(covariances.shape[-1])
        covariances[:, diagonal, diagonal] += self.reg
        half_log_det = np.empty(len(covariances))
        for c in range(len(covariances)):
            try:
                covariances[c], half_log_det[c] = _inverse_root(covariances[c])
            except np.linalg.LinAlgError:
                whose = f"class {m.classes[c]} of " if full else ""
                raise ValueError(
                    f"the covariance of {whose}{bank.name} is not positive definite; use a larger gmm:reg={self.reg!r}"
                ) from None
        self.log_weight_ = np.log(m.count / m.count.sum()) - half_log_det - 0.5 * len(diagonal) * np.log(2 * np.pi)
        if full:
            self.mixture_ = Mixture(m.class_mean, covariances, self.log_weight_)
        else:
            self.gaussians_ = Gaussians(m.class_mean, covariances[0].T)
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The negative log-likelihood."""
        return np.concatenate([-self._log_density(x) for x in pieces(features, len(self.log_weight_))])

    def _log_density(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        if self.covariance == "tied":
            return logsumexp(self.log_weight_ - 0.5 * self.gaussians_.squared_distance(x))
        # A subclass follows what is done to its rows: it is shown the formula.
        return self.mixture_.log_density(x) if type(x) is np.ndarray else self.mixture_.every_log_density(x)


def _inverse_root(covariance: Float[np.ndarray, "d d"]) -> tuple[Float[np.ndarray, "d d"], float]:
    """L⁻¹ and log det L, where LLᵀ is the covariance. Raises `LinAlgError` when it is not positive definite."""
    from scipy.linalg.lapack import dpotrf, dtrtri

    upper, failed = dpotrf(covariance.T)  # seen in Fortran's order, Lᵀ is what LAPACK is quickest with
    if failed:
        raise np.linalg.LinAlgError
    log_det = float(np.log(np.diag(upper)).sum())
    inverse, failed = dtrtri(upper, overwrite_c=1)
    assert not failed
    return inverse.T, log_det


def _check(m: Moments, bank: Rows) -> None:
    if (m.count < 2).any():
        raise ValueError(
            f"class {m.classes[m.count.argmin()]} of {bank.name} has one row, too few for a covariance of its own; "
            "use gmm:covariance=tied"
        )
    size = 8 * len(m.classes) * bank.embedding_dim**2
    if size > _LIMIT:
        raise ValueError(
            f"{len(m.classes)} class covariances of {bank.name} take {size / 2**30:.1f} GiB; use gmm:covariance=tied"
        )


def _warn_of_singular(m: Moments, bank: Rows) -> None:
    small = int((m.count <= bank.embedding_dim).sum())
    if small:
        warnings.warn(
            f"{bank.name}: {small} of {len(m.classes)} classes have no more rows than the {bank.embedding_dim} dimensions: "
            "their covariances are singular but for gmm:reg, and densities say little; use gmm:covariance=tied",
            RuntimeWarning,
            stacklevel=3,
        )


def _class_covariances(m: Moments, bank: Rows) -> np.ndarray:
    covariances = np.zeros((len(m.classes), bank.embedding_dim, bank.embedding_dim))
    start = 0
    for block in bank.blocks_of(("embedding",)):
        x = block["embedding"]
        label = np.searchsorted(m.classes, bank.labels[start : start + len(x)])
        for c in np.unique(label):
            for rows in pieces(x[label == c], bank.embedding_dim):
                centred = rows - m.class_mean[c]
                covariances[c] += centred.T @ centred
        start += len(x)
    covariances /= m.count[:, None, None]
    return covariances
