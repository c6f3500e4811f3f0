"""Metrics as pure functions on arrays, and seeded bootstrap intervals for them.

Scores are **higher = more OOD**. Every metric depends on the scores' order only, so all of them are computed
from two integer histograms over the distinct scores, highest first. That makes ties exact (tied rows cross
the threshold together) and lets one implementation serve both the point value and a whole block of bootstrap
resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Histogram = Int[np.ndarray, "*resamples distinct"]
Values = Float[np.ndarray, "*resamples"] | np.float64

_BLOCK_SCORES = 2**17  # resampled scores held at once, 1 MiB an array: measured faster than 2**14 … 2**20


def auroc(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> float:
    """Probability that an OOD score exceeds an ID score, ties counting one half.

    In [0, 1]; 0.5 is chance. Integer arithmetic up to the final division, so exact under ties.
    Raises `ValueError` for an empty array or NaN.
    """
    return ood_metrics(id_scores, ood_scores)["auroc"]


def aupr_in(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> float:
    """Area under the precision-recall curve with ID as the positive class, ranked from the lowest score up.

    Trapezoid over the curve through all distinct thresholds, starting at recall 0, precision 1: OpenOOD's
    number (scikit-learn's `auc(recall, precision)`), not average precision. In [0, 1]. Raises `ValueError`
    for an empty array or NaN.
    """
    return ood_metrics(id_scores, ood_scores)["aupr_in"]


def aupr_out(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> float:
    """Area under the precision-recall curve with OOD as the positive class, ranked from the highest score
    down.

    Same trapezoid as `aupr_in`. In [0, 1]. Raises `ValueError` for an empty array or NaN.
    """
    return ood_metrics(id_scores, ood_scores)["aupr_out"]


def ap_in(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> float:
    """Average precision with ID as the positive class, ranked from the lowest score up.

    The precision at each distinct threshold, weighted by the recall gained there (scikit-learn's
    `average_precision_score`): no line is drawn between thresholds, so ties cannot raise it as they raise
    `aupr_in`. In (0, 1]; chance is the share of ID. Raises `ValueError` for an empty array or NaN.
    """
    return ood_metrics(id_scores, ood_scores)["ap_in"]


def ap_out(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> float:
    """Average precision with OOD as the positive class, ranked from the highest score down.

    As `ap_in`. In (0, 1]; chance is the share of OOD. Raises `ValueError` for an empty array or NaN.
    """
    return ood_metrics(id_scores, ood_scores)["ap_out"]


def fpr95_id(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> float:
    """Share of OOD accepted by the strictest threshold that accepts at least 95 % of ID.

    In [0, 1]; lower is better. The convention of KNN-OOD, ViM and CosPress; no interpolation between scores,
    and rows tied with the threshold are accepted. Raises `ValueError` for an empty array or NaN.
    """
    return ood_metrics(id_scores, ood_scores)["fpr95_id"]


def fpr95_ood(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> float:
    """Share of ID rejected by the strictest threshold that rejects at least 95 % of OOD.

    In [0, 1]; lower is better. OpenOOD's convention, evaluated on the full ROC curve (OpenOOD lets
    scikit-learn drop collinear points, which changes the number only when ID and OOD scores are tied). Raises
    `ValueError` for an empty array or NaN.
    """
    return ood_metrics(id_scores, ood_scores)["fpr95_ood"]


def ood_metrics(id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]) -> dict[str, float]:
    """All seven OOD metrics by name: `auroc`, `aupr_in`, `aupr_out`, `ap_in`, `ap_out`, `fpr95_id`, `fpr95_ood`.

    Raises `ValueError` for an empty array or NaN.
    """
    return {name: float(value) for name, value in _measured(*_histograms(id_scores, ood_scores)).items()}


def lower_is_better(metric: str) -> bool:
    """Whether the lower value of this metric is the better one; `metric` may be a whole name, `knn/far/tin/fpr95_id`."""
    return metric.rpartition("/")[2].startswith("fpr95")


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


def bootstrap_ood_metrics(
    id_scores: Float[np.ndarray, " n"],
    ood_scores: Float[np.ndarray, " m"],
    *,
    resamples: int = 1000,
    seed: int = 0,
    stream: int = 0,
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """The metrics on bootstrap resamples of the rows; ID and OOD are each resampled to their own size.

    The ID draws depend on `seed` alone and the OOD draws on (`seed`, `stream`). Give each OOD set its own
    stream and resample i uses the same ID rows for every set and every detector: means over sets and
    differences between detectors may then be taken resample by resample. Raises `ValueError` for an empty
    array or NaN.
    """
    id_group, ood_group, distinct = _groups(id_scores, ood_scores)
    draws = zip(
        _resampled(id_group, distinct, resamples, len(id_group) + len(ood_group), [seed, 0]),
        _resampled(ood_group, distinct, resamples, len(id_group) + len(ood_group), [seed, 1 + stream]),
        strict=True,
    )
    blocks = [_measured(*histograms) for histograms in draws]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def bootstrap_accuracy(
    correct: Bool[np.ndarray, " n"], *, resamples: int = 1000, seed: int = 0
) -> Float[np.ndarray, " resamples"]:
    """Accuracy on bootstrap resamples of the rows, in [0, 1].

    The number of right answers among n rows drawn with replacement is binomial, so it is drawn as such.
    Raises `ValueError` when `correct` is empty.
    """
    if correct.size == 0:
        raise ValueError("correct is empty: an accuracy needs at least one row")
    return np.random.default_rng(seed).binomial(correct.size, correct.mean(), size=resamples) / correct.size


def macro_accuracy(correct: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Unweighted mean over the classes that occur in `labels` of the accuracy within each, in [0, 1].

    Raises `ValueError` when `correct` is empty.
    """
    right, rows = _per_class(correct, labels)
    return float((right / rows).mean())


def bootstrap_macro_accuracy(
    correct: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"], *, resamples: int = 1000, seed: int = 0
) -> Float[np.ndarray, " resamples"]:
    """Macro accuracy on bootstrap resamples drawn within each class, so that no class can vanish; in [0, 1].

    Raises `ValueError` when `correct` is empty.
    """
    right, rows = _per_class(correct, labels)
    draws = np.random.default_rng(seed).binomial(rows, right / rows, size=(resamples, len(rows)))
    return (draws / rows).mean(axis=1)


def interval95(samples: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    """The 2.5th and 97.5th percentiles of bootstrap `samples`."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def _per_class(correct: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if correct.size == 0:
        raise ValueError("correct is empty: an accuracy needs at least one row")
    classes, inverse = np.unique(labels, return_inverse=True)
    return np.bincount(inverse, weights=correct, minlength=len(classes)), np.bincount(inverse)


def _groups(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
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


def _histograms(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    id_group, ood_group, distinct = _groups(id_scores, ood_scores)
    return np.bincount(id_group, minlength=distinct), np.bincount(ood_group, minlength=distinct)


def _resampled(
    group: np.ndarray, distinct: int, resamples: int, scores_per_resample: int, seed: list[int]
) -> Iterator[np.ndarray]:
    """Histograms of `group` resampled with replacement, in blocks of (resamples in the block, distinct)."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_SCORES // scores_per_resample)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = group[rng.integers(len(group), size=(size, len(group)))]
        drawn += distinct * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * distinct).reshape(size, distinct)


# Below, `id_` and `ood` are histograms over the distinct scores, highest score first, along the last axis.


def _measured(id_: Histogram, ood: Histogram) -> dict[str, Values]:
    """Every metric. The counts that several of them need are taken once, for the bootstrap's sake."""
    id_above, ood_above = id_.cumsum(-1), ood.cumsum(-1)
    # OOD above each ID score, plus half of the OOD tied with it
    twice = 2 * _sum_of_products(id_, ood_above) - _sum_of_products(id_, ood)
    auroc = twice / (2 * id_above[..., -1] * ood_above[..., -1])
    aupr_out, ap_out = _precision(ood, ood_above, id_above)
    id_below, ood_below = (each[..., ::-1].cumsum(-1) for each in (id_, ood))
    aupr_in, ap_in = _precision(id_[..., ::-1], id_below, ood_below)
    return {
        "auroc": auroc,
        "aupr_in": aupr_in,
        "aupr_out": aupr_out,
        "ap_in": ap_in,
        "ap_out": ap_out,
        "fpr95_id": _fpr95(id_below, ood_below),
        "fpr95_ood": _fpr95(ood_above, id_above),
    }


def _precision(positive: Histogram, hits: Histogram, false: Histogram) -> tuple[Values, Values]:
    """Trapezoid and average precision; `hits` and `false` count positives and negatives up to each threshold."""
    flagged = hits + false
    # A resample may have no row at the first thresholds: the curve is still at its start there, precision 1.
    precision = np.divide(hits, flagged, out=np.ones(hits.shape), where=flagged > 0)
    at = _sum_of_products(positive, precision)
    before = positive[..., 0] + _sum_of_products(positive[..., 1:], precision[..., :-1])
    return (at + before) / (2 * hits[..., -1]), at / hits[..., -1]


def _fpr95(hits: Histogram, false: Histogram) -> Values:
    enough = 20 * hits >= 19 * hits[..., -1:]
    first = enough.argmax(-1)[..., None]
    return np.take_along_axis(false, first, -1)[..., 0] / false[..., -1]


def _sum_of_products(x: np.ndarray, y: np.ndarray) -> Any:
    return np.einsum("...i,...i->...", x, y)
