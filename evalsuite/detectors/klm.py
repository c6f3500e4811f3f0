"""Distance of the softmax to the nearest class's usual softmax."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from evalsuite.detectors import Detector
from evalsuite.detectors._moments import add_by_group, pieces
from featcache.geometry import logsumexp
from featcache.rows import Rows


class KLM(Detector):
    """Score = min over classes k of KL(p ‖ d_k), p the softmax of a row's logits, at least 0 up to rounding.

    Fitted: d_k, the mean softmax of the bank rows *predicted* as k; classes never predicted are left out, as in
    pytorch-ood (OpenOOD puts a one-hot vector there). Fitted on the ID training rows, as ViM's authors do;
    OpenOOD and the paper fit on ID validation rows, so their numbers differ a little. Needs no labels. Holds
    classes × classes float64.

    Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection for Real-World Settings", arXiv 1911.11132.
    """

    needs = ("logits",)

    def fit(self, bank: Rows) -> KLM:
        """One pass over the bank's logits.

        Raises `ValueError` when it has none.
        """
        sums = count = None
        for block in bank.blocks_of(("logits",)):
            for logits in pieces(block["logits"], 1):
                if sums is None or count is None:
                    sums, count = np.zeros((logits.shape[1], logits.shape[1])), np.zeros(logits.shape[1])
                predicted = logits.argmax(axis=1)
                add_by_group(sums, np.exp(logits - logsumexp(logits)[:, None]), predicted)
                count += np.bincount(predicted, minlength=len(count))
        assert sums is not None
        assert count is not None
        # A probability that is zero in float64 is taken as the least positive one: the divergence stays finite.
        usual = np.maximum(sums[count > 0] / count[count > 0, None], np.finfo(np.float64).tiny)
        self.log_usual_ = np.log(usual)
        return self

    def score(self, logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
        """The least divergence."""
        return np.concatenate([self._divergence(x).min(axis=1) for x in pieces(logits, len(self.log_usual_))])

    def _divergence(self, logits: np.ndarray) -> np.ndarray:
        log_p = logits - logsumexp(logits)[:, None]
        p = np.exp(log_p)
        return (p * log_p).sum(axis=1)[:, None] - p @ self.log_usual_.T
