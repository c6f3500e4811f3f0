"""Metrics as pure functions on arrays; their intervals are in `evalsuite.intervals`.

Scores are **higher = more OOD**. Every metric depends on the scores' order only, so all of them are computed
from two integer histograms over the distinct scores, highest first. That makes ties exact: tied rows cross
the threshold together.
"""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Float, Int

Histogram = Int[np.ndarray, " distinct"]


def auroc(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> float:
    """Probability that an OOD score exceeds an ID score, ties counting one half.

    In [0, 1]; 0.5 is chance. Integer arithmetic up to the final division, so exact under ties.
    Raises `ValueError` for an empty array or NaN.
    """
    return ood_metrics(id_scores, ood_scores)["auroc"]


def ood_metrics(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> dict[str, float]:
    """All seven OOD metrics by name, each in [0, 1].

    - `auroc`: see there.
    - `aupr_out`, `aupr_in`: area under the precision-recall curve with OOD as the positive class, ranked from the highest
      score down, or with ID, from the lowest up. Trapezoid over the curve through all distinct thresholds, starting at
      recall 0, precision 1: OpenOOD's number (scikit-learn's `auc(recall, precision)`), not average precision.
    - `ap_out`, `ap_in`: average precision of the same. The precision at each distinct threshold, weighted by the recall
      gained there (scikit-learn's `average_precision_score`): no line is drawn between thresholds, so ties cannot raise it
      as they raise `aupr_in`. Above 0; chance is the share of the positive class.
    - `fpr95_id`: share of OOD accepted by the strictest threshold that accepts at least 95 % of ID; **lower is better.** The
      convention of KNN-OOD, ViM and CosPress; no interpolation between scores, and rows tied with the threshold are
      accepted.
    - `fpr95_ood`: share of ID rejected by the strictest threshold that rejects at least 95 % of OOD; **lower is better.**
      OpenOOD's convention, evaluated on the full ROC curve (OpenOOD lets scikit-learn drop collinear points, which changes
      the number only when ID and OOD scores are tied).

    Raises `ValueError` for an empty array or NaN.
    """
    rank_id, rank_ood, distinct = ranks(id_scores, ood_scores)
    return measured(*(np.bincount(rank, minlength=distinct) for rank in (rank_id, rank_ood)))


def place_of_95(n: int) -> int:
    """The place, from 0, that the threshold of `fpr95_id` has among n ID scores in rising order: the strictest one that
    accepts at least 95 % of them."""
    return -(-19 * n // 20) - 1


def lower_is_better(metric: str) -> bool:
    """Whether the lower value of this metric is the better one; `metric` may be a whole name, `knn/far/tin/fpr95_id`."""
    return bool(
        re.match(
            r"fpr95_|procrustes|(relative_)?m?ce$|ece$|nll$|aurc$|error|skewness@|never@",
            metric.rpartition("/")[2].lower(),
        )
    )


def tied(scores: Float[np.ndarray, " n"], group: Int[np.ndarray, " n"] | None = None) -> float:
    """Share of the rows whose score equals another row's; with `group`, a row's of another group. In [0, 1].

    Where `group` numbers the rows' features, ties of rows that are alike do not count: what is left is the
    detector's own doing.
    """
    if scores.size == 0:
        return 0.0
    _, of_row, rows = np.unique(scores, return_inverse=True, return_counts=True)
    if group is not None:
        pairs = np.unique(np.stack([of_row, np.unique(group, return_inverse=True)[1]]), axis=1)
        return float((np.bincount(pairs[0])[of_row] > 1).mean())
    return float((rows[of_row] > 1).mean())


def ranks(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """For every row the rank of its score among the distinct ones, 0 for the highest, and their number."""
    for name, scores in (("id_scores", id_scores), ("ood_scores", ood_scores)):
        if scores.size == 0:
            raise ValueError(f"{name} is empty: a metric needs at least one ID and one OOD score")
        if np.isnan(scores).any():
            raise ValueError(f"{name} has {int(np.isnan(scores).sum())} NaN among {scores.size} scores")
    pooled = np.concatenate([id_scores.astype(np.float64), ood_scores.astype(np.float64)])
    values, inverse = np.unique(pooled, return_inverse=True)
    rank = len(values) - 1 - inverse
    return rank[: len(id_scores)], rank[len(id_scores) :], len(values)


# Below, `id_` and `ood` are histograms over the distinct scores, highest score first.


def measured(id_: Histogram, ood: Histogram) -> dict[str, float]:
    """Every metric."""
    id_above, ood_above = id_.cumsum(), ood.cumsum()
    # OOD above each ID score, plus half of the OOD tied with it
    twice = 2 * int(id_ @ ood_above) - int(id_ @ ood)
    aupr_out, ap_out = _precision(ood, ood_above, id_above)
    id_below, ood_below = id_[::-1].cumsum(), ood[::-1].cumsum()
    aupr_in, ap_in = _precision(id_[::-1], id_below, ood_below)
    return {
        "auroc": twice / (2 * int(id_above[-1]) * int(ood_above[-1])),
        "aupr_in": aupr_in,
        "aupr_out": aupr_out,
        "ap_in": ap_in,
        "ap_out": ap_out,
        "fpr95_id": _fpr95(id_below, ood_below),
        "fpr95_ood": _fpr95(ood_above, id_above),
    }


def _precision(positive: Histogram, hits: Histogram, false: Histogram) -> tuple[float, float]:
    """Trapezoid and average precision; `hits` and `false` count positives and negatives up to each threshold."""
    precision = hits / (hits + false)
    at = float(positive @ precision)
    before = float(positive[0] + positive[1:] @ precision[:-1])
    return (at + before) / (2 * int(hits[-1])), at / int(hits[-1])


def _fpr95(hits: Histogram, false: Histogram) -> float:
    enough = 20 * hits >= 19 * hits[-1]
    return float(false[enough.argmax()] / false[-1])
