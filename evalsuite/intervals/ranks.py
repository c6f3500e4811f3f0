"""Areas under curves and the FPR@95, from the order of ID and OOD scores."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from evalsuite.intervals.estimate import LEAST_ROWS, Estimate, Part, Side, Z, blended, equal_rows
from evalsuite.intervals.shares import share
from evalsuite.metrics import measured, place_of_95, ranks

LEAST_FOR_THRESHOLD = 72
"""Rows below which no order statistic bounds their 95 % point from above: 0.95 ** 71 > 0.025."""


def ranking(
    id_scores: Float[np.ndarray, " n"],
    ood_scores: Float[np.ndarray, " m"],
    *,
    id_source: str = "id",
    ood_source: str = "ood",
) -> dict[str, Estimate]:
    """The seven metrics of `evalsuite.metrics.ood_metrics` by name, with influences in the order of the rows.

    Areas: the variance is that of the rows' influences, for the AUROC DeLong, DeLong and Clarke-Pearson's (1988,
    Biometrics 44, 837–845); the largest that an AUROC allows, θ (1 − θ) / min(n, m), is Birnbaum and Klose's (1957,
    Annals of Mathematical Statistics 28, 933–945). The FPR@95: order statistics bound the threshold (David and Nagaraja
    2003, "Order Statistics", §7.1), Wilson's interval the rate at it. No interval where one side has fewer than
    `LEAST_ROWS`, nor of the FPR@95 where fewer than `LEAST_FOR_THRESHOLD` rows set the threshold.

    Raises `ValueError` for an empty array or NaN.
    """
    rank_id, rank_ood, distinct = ranks(id_scores, ood_scores)
    id_, ood = (np.bincount(rank, minlength=distinct) for rank in (rank_id, rank_ood))
    values = measured(id_, ood)
    few = min(len(rank_id), len(rank_ood))
    if few < LEAST_ROWS:
        none = f"{few} {'ID' if few == len(rank_id) else 'OOD'} rows, fewer than {LEAST_ROWS}"
        return {name: Estimate(value, {}, none) for name, value in values.items()}
    won_id = ((ood.cumsum() - ood / 2) / len(rank_ood))[rank_id]  # share of OOD above each row
    won_ood = (1 - (id_.cumsum() - id_ / 2) / len(rank_id))[rank_ood]  # share of ID below
    sides = {
        source: Side(won, min(equal_rows(won), equal_rows(1 - won)), 1 / len(won))
        for source, won in ((id_source, won_id), (ood_source, won_ood))
    }
    found = {"auroc": blended(values["auroc"], sides)}
    for name, (of_ood, of_id, bias) in _precision(ood, id_, rank_ood, rank_id).items():
        found[f"{name}_out"] = blended(values[f"{name}_out"], {id_source: of_id, ood_source: of_ood}, bias)
    below_id, below_ood = distinct - 1 - rank_id, distinct - 1 - rank_ood
    for name, (of_id, of_ood, bias) in _precision(id_[::-1], ood[::-1], below_id, below_ood).items():
        found[f"{name}_in"] = blended(values[f"{name}_in"], {id_source: of_id, ood_source: of_ood}, bias)
    found["fpr95_id"] = _fpr95(below_id, below_ood, (id_source, ood_source), "ID")
    found["fpr95_ood"] = _fpr95(rank_ood, rank_id, (ood_source, id_source), "OOD")
    if 2 * distinct < len(rank_id) + len(rank_ood):
        few_scores = (
            f"{distinct:,} distinct scores of {len(rank_id) + len(rank_ood):,} rows: lines between few points; see ap"
        )
        found |= {name: Estimate(values[name], {}, few_scores) for name in ("aupr_in", "aupr_out")}
    return {name: found[name] for name in values}


def _precision(
    positive: Int[np.ndarray, " d"],
    negative: Int[np.ndarray, " d"],
    of_positive: Int[np.ndarray, " p"],
    of_negative: Int[np.ndarray, " n"],
) -> dict[str, tuple[Side, Side, float]]:
    """Positives and negatives of the trapezoid area `aupr` and of average precision `ap`, from histograms over the
    distinct scores in the order in which they are flagged; and how far both are too high, since a positive counts
    itself in the precision at its own score.

    Where a share x of negatives, beside positives, is flagged first, an area loses about −x ln x with a variance of
    x (ln x)² / p: −ln x / p over what is lost is what unseen negatives may do.
    """
    p, n = len(of_positive), len(of_negative)
    hits, false = positive.cumsum(), negative.cumsum()
    flagged = hits + false
    precision = hits / flagged
    by_hits, by_false = p * false / flagged**2, -n * hits / flagged**2  # derivatives by the shares flagged
    weight = positive / p

    def of_threshold(here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a row of each score does to the mean of precision, `here` weighing its thresholds."""
        return tuple((here * by)[::-1].cumsum()[::-1] for by in (by_hits, by_false))

    before = np.concatenate([[1.0], precision[:-1]])
    at, earlier = of_threshold(weight), of_threshold(np.append(weight[1:], 0.0))
    itself = float(weight @ ((1 - precision) / np.maximum(flagged, 1)))  # what itself adds to a positive's precision
    found = {}
    for name, own, of_p, of_n in (
        ("aupr", (precision + before) / 2, (at[0] + earlier[0]) / 2, (at[1] + earlier[1]) / 2),
        ("ap", precision, *at),
    ):
        kept = own[of_positive]
        lost = max(1 - float(weight @ own), 1 / p)
        found[name] = (
            Side((own + of_p)[of_positive], min(equal_rows(kept), equal_rows(1 - kept)), 1 / p),
            Side(of_n[of_negative], equal_rows(-of_n[of_negative]), (1 - math.log(lost)) / p),
            itself,
        )
    return found


def _fpr95(
    hits: Int[np.ndarray, " h"], false: Int[np.ndarray, " f"], sources: tuple[str, str], setting: str
) -> Estimate:
    """Of ranks in the order in which rows pass the threshold, `hits` of which 95 % have to; `setting` names them."""
    ordered, n = np.sort(hits), len(hits)
    threshold = ordered[place_of_95(n)]
    passed = false <= threshold
    value = float(passed.mean())
    if n < LEAST_FOR_THRESHOLD:
        none = f"{n} {setting} rows set the threshold; bounds on it take {LEAST_FOR_THRESHOLD}"
        return Estimate(value, {}, none)
    lowest, highest = _ranks_of_95(n)
    between = ordered[math.floor(lowest) - 1 : math.ceil(highest)]
    rates = np.searchsorted(np.sort(false), between, side="right") / len(false)
    low_rate, high_rate = np.interp([lowest, highest], math.floor(lowest) + np.arange(len(between)), rates)
    least, most = (false <= between[0]), (false <= between[-1])
    down, up = max(0.0, value - float(low_rate)), max(0.0, float(high_rate) - value)
    at, below, above = (share(of).parts["rows"] for of in (passed, least, most))
    # Where ties leave few thresholds to choose from, the rate is another one at each: distances add, unsquared.
    ties = 1 - (len(np.unique(between)) - 1) / (len(between) - 1)
    further = max(at.down, below.down), max(at.up, above.up)
    lower, higher = (math.sqrt(r * r + 2 * ties * t * r) for r, t in zip(further, (down, up), strict=True))
    slope = (down + up) / 2 / (Z * math.sqrt(0.05 * 0.95 / n))  # of the rate, by the share of rows beyond a threshold
    beyond = np.where(hits <= threshold, 0.0, slope)
    return Estimate(value, {sources[0]: Part(down, up, beyond), sources[1]: Part(lower, higher, at.influence)})


@lru_cache(maxsize=64)
def _ranks_of_95(n: int) -> tuple[float, float]:
    """The order statistics, between two of them by line, that lie beyond the 95 % point and short of it with 2.5 %."""
    beyond = np.arange(n + 1)  # rows beyond the point: binomial
    steps = np.log((n - beyond[:-1]) / (beyond[:-1] + 1) * (0.05 / 0.95))
    below = np.exp(n * math.log(0.95) + np.concatenate([[0.0], steps.cumsum()])).cumsum()
    # P(rank r lies beyond the point) = P(more than n − r rows do) = 1 − below[n − r]
    lowest = n - float(np.interp(0.975, below, beyond))
    highest = n - float(np.interp(0.025, below, beyond))
    return lowest, highest
