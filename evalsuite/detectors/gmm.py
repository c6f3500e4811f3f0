"""Density under one Gaussian a class."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors._moments import Moments, moments, pieces
from evalsuite.rows import Rows

_LIMIT = 2 * 2**30  # bytes of class covariances


class GMM:
    """Score = −log Σ_c (n_c/n) N(x; μ_c, Σ_c), any real number, in nats.

    Fitted by counting, without EM: class shares, means and covariances divided by n_c, `reg` added to their
    diagonal. `covariance` is `full`, one a class (pytorch-ood's detector), or `tied`, one for all (OpenOOD's
    choice; the better one when classes have fewer rows than dimensions). The logarithm is taken of the sum
    without leaving it: OpenOOD's `log(Σ exp(·) + 1e-45)` underflows and gives every row the same score.

    `full` holds classes × d × d float64 and refuses above 2 GiB; `tied` holds d × d and classes × d.
    """

    def __init__(self, covariance: str = "full", reg: float = 1e-6) -> None:
        self.covariance = covariance
        self.reg = reg

    def fit(self, bank: Rows) -> GMM:
        """Two passes over the bank's labelled rows when `full`, one when `tied`.

        Raises `ValueError` when it has no labels, a class has a single row, the covariances are too large to
        hold, or one is not positive definite.
        """
        if self.covariance not in ("full", "tied"):
            raise ValueError(f"unknown covariance {self.covariance!r}; use gmm:covariance=full or gmm:covariance=tied")
        bank = bank.labelled()
        m = moments(bank)
        if self.covariance == "full":
            _check(m, bank)
            covariances = _class_covariances(m, bank)
        else:
            covariances = m.within[None]
        diagonal = np.arange(covariances.shape[-1])
        covariances[:, diagonal, diagonal] += self.reg
        # Each is replaced by W, WWᵀ its inverse.
        half_log_det = np.empty(len(covariances))
        for c in range(len(covariances)):
            try:
                lower = np.linalg.cholesky(covariances[c])
            except np.linalg.LinAlgError:
                whose = f"class {m.classes[c]} of " if self.covariance == "full" else ""
                raise ValueError(
                    f"the covariance of {whose}{bank.name} is not positive definite; use a larger gmm:reg={self.reg!r}"
                ) from None
            half_log_det[c] = np.log(np.diag(lower)).sum()
            covariances[c] = np.linalg.solve(lower, np.eye(len(lower))).T
        self.means_ = m.class_mean
        self.whiten_ = covariances
        self.log_weight_ = (
            np.log(m.count / m.count.sum()) - half_log_det - 0.5 * bank.embedding_dim * np.log(2 * np.pi)
        )
        return self

    def score(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The negative log-likelihood."""
        return np.concatenate([-self._log_likelihood(x) for x in pieces(features, len(self.means_))])

    def _log_likelihood(self, x: np.ndarray) -> np.ndarray:
        log_density = np.empty((len(x), len(self.means_)))
        shared = len(self.whiten_) == 1 and len(self.means_) > 1
        origin = self.means_.mean(axis=0)
        z = (x - origin) @ self.whiten_[0] if shared else None
        for c, mean in enumerate(self.means_):
            at = z - (mean - origin) @ self.whiten_[0] if z is not None else (x - mean) @ self.whiten_[c]
            log_density[:, c] = self.log_weight_[c] - 0.5 * (at**2).sum(axis=1)
        top = log_density.max(axis=1)
        return top + np.log(np.exp(log_density - top[:, None]).sum(axis=1))


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


def _class_covariances(m: Moments, bank: Rows) -> np.ndarray:
    covariances = np.zeros((len(m.classes), bank.embedding_dim, bank.embedding_dim))
    start = 0
    for block in bank.blocks_of(("embedding",)):
        for x in pieces(block["embedding"], bank.embedding_dim):
            label = np.searchsorted(m.classes, bank.labels[start : start + len(x)])
            for c in np.unique(label):
                centred = x[label == c] - m.class_mean[c]
                covariances[c] += centred.T @ centred
            start += len(x)
    return covariances / m.count[:, None, None]
