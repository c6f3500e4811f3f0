"""Mahalanobis distance between rows of norm 1."""

from __future__ import annotations

from evalsuite.detectors.mahalanobis import Mahalanobis


class MahalanobisPP(Mahalanobis):
    """`mahalanobis` after every row, of the bank too, is scaled to norm 1: score = min_c (z − μ_c)ᵀ Σ⁻¹ (z − μ_c)
    with z = x/‖x‖, at least 0. Also called `mahalanobis++`.

    Feature norms differ a lot within a class, and a shared covariance fits that badly. Fitted: class means and
    shared covariance of the scaled rows (pseudo-inverse where singular). Neither OpenOOD nor pytorch-ood has
    it. Holds d × d and classes × d float64. A row of norm zero stays zero.

    Mueller and Hein 2025, "Mahalanobis++", arXiv 2505.18032.
    """

    normalise = True
