"""95 % intervals of everything that is measured, without resampling; where none would be honest, a word why.

What an interval covers is the sampling of the rows that were measured (queries, test images, ID and OOD rows): were
other rows drawn from the same source, in as many classes and sets, 95 of 100 such intervals would hold the value of
infinitely many. Banks, fitted detectors and heads, few-shot draws and the choice of sets are taken as they are.

An estimate is a value and, for every *source* of rows that were drawn by themselves, how far the value may lie below
and above the truth for their sake, with each row's influence on it. Sources are independent of each other, so
distances are squared and added over them; within one source two estimates correlate as their influences do. That is
the method of variance estimates recovery (Newcombe 1998, Statistics in Medicine 17, 857–872 and 2635–2650; Zou and
Donner 2008, Statistics in Medicine 27, 1693–1702): it gives means over sets and paired differences with the coverage
of the single intervals.

Single intervals of shares and areas are Wilson's score interval with continuity correction (Newcombe's method 4), n
being replaced by the effective number of rows p (1 − p) / V (Kish 1965, "Survey Sampling"; Korn and Graubard 1998,
Survey Methodology 24, 193–201). V is the estimated variance, blended with the largest that the value allows: little of
it where many rows speak for and against, all of it where none does, so that no interval has width 0. `benchmarks/intervals.py`
measures the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.metrics import measured, ranks
from evalsuite.result import Metric

LEAST_ROWS = 5
"""ID or OOD rows below which areas and FPR@95 get no interval."""

LEAST_FOR_THRESHOLD = 72
"""Rows below which no order statistic bounds their 95 % point from above: 0.95 ** 71 > 0.025."""

LEAST_FOR_MEAN = 40
"""Rows below which a mean of cosines gets no interval."""

_Z = NormalDist().inv_cdf(0.975)
_PRIOR_ROWS = 3.0  # how many rows the largest variance counts as, against the rows that speak for and against
_PRIOR_ROWS_MACRO = 5.0
_CORRECTED = 10.0  # rows that speak up to which the correction for continuity is whole
_LEAST_DECISIVE = 10  # a macro average's rows, each counted in proportion to its weight
_MOST_SINGLE = 0.25  # of a macro average's variance, the share of classes with one row


@dataclass(frozen=True)
class Part:
    """What the rows of one source do to an estimate: how far it may lie above (`down`) and below (`up`) the truth for
    their sake, and each row's influence, up to a factor and a constant."""

    down: float
    up: float
    influence: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Estimate:
    """A value in [`least`, `most`], and by source its `Part`; or, in `none`, why it has no interval."""

    value: float
    parts: Mapping[str, Part]
    none: str | None = None
    least: float = 0.0
    most: float = 1.0

    @property
    def ci95(self) -> tuple[float, float] | None:
        if self.none is not None:
            return None
        down, up = (math.sqrt(sum(getattr(part, side) ** 2 for part in self.parts.values())) for side in ("down", "up"))
        return max(self.least, self.value - down), min(self.most, self.value + up)

    def metric(self) -> Metric:
        return Metric(self.value, self.ci95, self.none)


def share(values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"], source: str = "rows") -> Estimate:
    """The mean of values in [0, 1], one a row: an accuracy (right or wrong) or a mean of shares.

    Of right and wrong answers this is Wilson's interval with continuity correction: its coverage is at least 94.7 %
    for every n and p. Of other shares there is none for fewer than `LEAST_ROWS`. Raises `ValueError` for no rows.
    """
    if values.size == 0:
        raise ValueError("there are no rows: a mean needs at least one")
    values = np.asarray(values, np.float64)
    n, value = len(values), float(values.mean())
    if ((values == 0) | (values == 1)).all():
        return Estimate(value, {source: Part(*_score(value, n, 0.5), values)})
    return _blended(value, {source: _Side(values, min(_equal(values), _equal(1 - values)), 1 / n)})


def macro_share(correct: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Estimate:
    """The unweighted mean over the classes that occur in `labels` of the accuracy within each.

    The variance is the stratified one, Σ p (1 − p) / (n − 1) over the classes (Cochran 1977, "Sampling Techniques",
    §5.9); a class with one row, whose variance nothing tells, counts as one of the mean accuracy. The largest variance
    that the mean allows puts all that is wrong into the smallest classes. There is no interval where more than a
    quarter of the variance is to be expected of classes with one row, or where the smallest classes decide with fewer
    than 10 rows. Raises `ValueError` for no rows.
    """
    if correct.size == 0:
        raise ValueError("there are no rows: a mean needs at least one")
    _, of_row, rows = np.unique(labels, return_inverse=True, return_counts=True)
    classes, right = len(rows), np.bincount(of_row, weights=correct)
    value = float((right / rows).mean())
    single = int((rows == 1).sum())
    if single > _MOST_SINGLE * (1 / rows).sum():
        return Estimate(value, {}, f"{single:,} of {classes:,} classes have one row, which tells nothing of its class")
    weight = (rows.min() / rows) ** 2  # a row's part in the variance, beside one of the smallest class
    if weight @ rows < _LEAST_DECISIVE:
        return Estimate(value, {}, f"the smallest of {classes:,} classes, with {rows.min():,} rows, decides")
    spread = value * (1 - value)
    within = np.where(rows > 1, right * (rows - right) / (rows * np.maximum(rows - 1, 1)), spread)
    variance = (within / rows).sum() / classes**2
    shifted = (value * rows.sum() + 2) / (rows.sum() + 4)  # off 0 and 1 (Agresti and Coull 1998)
    most = np.clip(classes * shifted * (1 - shifted) - np.arange(classes) / 4, 0, 0.25)
    largest = (most / np.sort(rows)).sum() / classes**2 / (shifted * (1 - shifted))
    speaking = min(weight @ right, weight @ (rows - right))
    inverse = (speaking * (variance / spread if spread else 0.0) + _PRIOR_ROWS_MACRO * largest) / (
        speaking + _PRIOR_ROWS_MACRO
    )
    return Estimate(value, {"rows": Part(*_score(value, 1 / inverse, 0.5), np.asarray(correct, np.float64))})


def cosine_mean(cosines: Float[np.ndarray, " n"]) -> Estimate:
    """The mean of cosines, one a row: Student's t. No interval for fewer than `LEAST_FOR_MEAN` rows, of which a few far
    off would not show, nor where all are the same. Raises `ValueError` for no rows."""
    if cosines.size == 0:
        raise ValueError("there are no rows: a mean needs at least one")
    n, value = len(cosines), float(cosines.mean())
    if n < LEAST_FOR_MEAN:
        return Estimate(value, {}, f"{n} rows, fewer than {LEAST_FOR_MEAN}", least=-1.0)
    half = _student(n - 1) * float(cosines.std(ddof=1)) / math.sqrt(n)
    if half == 0:
        return Estimate(value, {}, f"all of the {n:,} cosines are the same", least=-1.0)
    return Estimate(value, {"rows": Part(half, half, cosines)}, least=-1.0)


def kappa(a: Int[np.ndarray, " q"], b: Int[np.ndarray, " q"], n_classes: int) -> Estimate:
    """Cohen's kappa of the classes that two give the same rows: agreement beyond chance, (p − c) / (1 − c).

    The variance is that of the rows' influences, chance included (Fleiss, Cohen and Everitt 1969, Psychological
    Bulletin 72, 323–327); the interval is that of the agreement p with this variance, on kappa's scale. Raises
    `ValueError` where one class has every vote of both, and for no rows.
    """
    of_a, of_b = (np.bincount(votes, minlength=n_classes) / max(1, len(votes)) for votes in (a, b))
    same, chance = a == b, float(of_a @ of_b)
    if not len(a) or chance == 1:
        raise ValueError("kappa is not defined: there are no votes, or all are for one class")
    agreed = float(same.mean())
    influence = same - (1 - agreed) / (1 - chance) * (of_b[a] + of_a[b])
    found = _blended(agreed, {"rows": _Side(influence, float(min(same.sum(), (~same).sum())), 1 / len(a))})
    parts = {
        source: Part(part.down / (1 - chance), part.up / (1 - chance), influence)
        for source, part in found.parts.items()
    }
    return Estimate((agreed - chance) / (1 - chance), parts, found.none, least=-1.0)


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
        source: _Side(won, min(_equal(won), _equal(1 - won)), 1 / len(won))
        for source, won in ((id_source, won_id), (ood_source, won_ood))
    }
    found = {"auroc": _blended(values["auroc"], sides)}
    for name, (of_ood, of_id) in _precision(ood, id_, rank_ood, rank_id).items():
        found[f"{name}_out"] = _blended(values[f"{name}_out"], {id_source: of_id, ood_source: of_ood})
    below_id, below_ood = distinct - 1 - rank_id, distinct - 1 - rank_ood
    for name, (of_id, of_ood) in _precision(id_[::-1], ood[::-1], below_id, below_ood).items():
        found[f"{name}_in"] = _blended(values[f"{name}_in"], {id_source: of_id, ood_source: of_ood})
    found["fpr95_id"] = _fpr95(below_id, below_ood, (id_source, ood_source), "ID")
    found["fpr95_ood"] = _fpr95(rank_ood, rank_id, (ood_source, id_source), "OOD")
    return {name: found[name] for name in values}


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of estimates in [0, 1], whose influences are of the same rows where their source is the same."""
    if len(estimates) == 1:
        return estimates[0]
    value = float(np.mean([each.value for each in estimates]))
    for each in estimates:
        if each.none is not None:
            return Estimate(value, {}, each.none)
    parts: dict[str, Part] = {}
    for source in dict.fromkeys(source for each in estimates for source in each.parts):
        of = [each.parts[source] for each in estimates if source in each.parts]
        influence = np.stack([part.influence for part in of])
        correlation = _correlation(influence)
        down, up = (
            math.sqrt(max(0.0, far @ correlation @ far)) / len(estimates)
            for far in (np.array([part.down for part in of]), np.array([part.up for part in of]))
        )
        parts[source] = Part(down, up, influence.sum(axis=0) / len(estimates))
    return Estimate(value, parts)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """b − a, of two estimates whose influences are of the same rows: samples that were measured twice.

    Where few rows differ nothing but their number says how many might: the interval is then widened towards the
    one that no differing row among n gives, ± z² / (n + z²) (Tango 1998, Statistics in Medicine 17, 891–908).
    """
    value = b.value - a.value
    if (none := a.none or b.none) is not None:
        return Estimate(value, {}, none)
    parts: dict[str, Part] = {}
    for source in a.parts:
        ours, theirs = a.parts[source], b.parts[source]
        influence = theirs.influence - ours.influence
        together = _correlation(np.stack([ours.influence, theirs.influence]), unknown=0.0)[0, 1]
        differing, n = _equal(np.abs(influence)), len(influence)
        guard = _PRIOR_ROWS / (differing + _PRIOR_ROWS) * _Z**2 / (n + _Z**2)
        down, up = (
            math.sqrt(max(0.0, x * x - 2 * together * x * y + y * y) + guard**2)
            for x, y in ((theirs.down, ours.up), (theirs.up, ours.down))
        )
        parts[source] = Part(down, up, influence)
    return Estimate(value, parts, least=-1.0)


def _score(p: float, n: int | float, correction: float) -> tuple[float, float]:
    """How far Wilson's bounds of the share p of n rows lie below and above it, `correction` rows being moved."""

    def bound(p: float, side: int) -> float:
        half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return (p + _Z**2 / (2 * n) + side * half) / (1 + _Z**2 / n)

    low = bound(max(0.0, p - correction / n), -1) if p > 0 else 0.0
    high = bound(min(1.0, p + correction / n), 1) if p < 1 else 1.0
    return p - max(low, 0.0), min(high, 1.0) - p


@dataclass(frozen=True)
class _Side:
    """One source's rows: their influences, how many `speak` against the value or for it, whichever are fewer, and the
    `largest` variance that they can give a value p, over p (1 − p)."""

    influence: Float[np.ndarray, " n"]
    speaking: float
    largest: float


def _blended(value: float, sides: Mapping[str, _Side]) -> Estimate:
    """The score interval of a value in [0, 1]; see the module."""
    few = min(len(side.influence) for side in sides.values())
    if few < LEAST_ROWS:
        return Estimate(value, {}, f"{few} rows, fewer than {LEAST_ROWS}")
    spread = value * (1 - value)
    inverse = {}
    for source, side in sides.items():
        prior = _PRIOR_ROWS / (side.speaking + _PRIOR_ROWS)
        estimated = float(side.influence.var(ddof=1)) / len(side.influence) / spread if spread > 0 else 0.0
        inverse[source] = (1 - prior) * estimated + prior * side.largest
    total = sum(inverse.values())
    rows = 1 / min(total, max(side.largest for side in sides.values()))
    speaking = min(side.speaking for side in sides.values())
    down, up = _score(value, rows, 0.5 * min(1.0, _CORRECTED / max(speaking, _CORRECTED)))
    return Estimate(
        value,
        {
            source: Part(down * math.sqrt(part / total), up * math.sqrt(part / total), sides[source].influence)
            for source, part in inverse.items()
        },
    )


def _student(freedom: int) -> float:
    """The 97.5th percentile of Student's t (Abramowitz and Stegun 26.7.5), for 40 degrees of freedom or more to 1e-4."""
    z, v = _Z, freedom
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v * v)


def _equal(weights: Float[np.ndarray, " n"]) -> float:
    """How many rows of equal weight tell as much as these (Kish)."""
    total = float(weights.sum())
    return total * total / float(weights @ weights) if total > 0 else 0.0


def _correlation(rows: Float[np.ndarray, "e n"], unknown: float = 1.0) -> Float[np.ndarray, "e e"]:
    """Between rows; `unknown` where one of two is constant."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1)
    product = np.outer(length, length)
    found = np.divide(centred @ centred.T, product, out=np.full(product.shape, unknown), where=product > 0)
    np.fill_diagonal(found, 1.0)
    return found.clip(-1, 1)


def _precision(
    positive: Int[np.ndarray, " d"],
    negative: Int[np.ndarray, " d"],
    of_positive: Int[np.ndarray, " p"],
    of_negative: Int[np.ndarray, " n"],
) -> dict[str, tuple[_Side, _Side]]:
    """Positives and negatives of the trapezoid area `aupr` and of average precision `ap`, from histograms over the
    distinct scores in the order in which they are flagged.

    A negative that is flagged first costs (1/p + … + 1) / p, about (1 + ln p) / p: the largest variance has that factor.
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
    found = {}
    for name, own, of_p, of_n in (
        ("aupr", (precision + before) / 2, (at[0] + earlier[0]) / 2, (at[1] + earlier[1]) / 2),
        ("ap", precision, *at),
    ):
        kept = own[of_positive]
        found[name] = (
            _Side((own + of_p)[of_positive], min(_equal(kept), _equal(1 - kept)), 1 / p),
            _Side(of_n[of_negative], _equal(-of_n[of_negative]), (1 + math.log(p)) / p),
        )
    return found


def _fpr95(
    hits: Int[np.ndarray, " h"], false: Int[np.ndarray, " f"], sources: tuple[str, str], setting: str
) -> Estimate:
    """Of ranks in the order in which rows pass the threshold, `hits` of which 95 % have to; `setting` names them."""
    ordered, n = np.sort(hits), len(hits)
    threshold = ordered[-(-19 * n // 20) - 1]
    passed = false <= threshold
    value = float(passed.mean())
    if n < LEAST_FOR_THRESHOLD:
        none = f"{n} {setting} rows set the threshold; bounds on it take {LEAST_FOR_THRESHOLD}"
        return Estimate(value, {}, none)
    lowest, highest = _ranks_of_95(n)
    between = ordered[lowest - 1 : highest]
    least, most = (false <= between[0]), (false <= between[-1])
    down, up = value - float(least.mean()), float(most.mean()) - value
    at, below, above = (share(of).parts["rows"] for of in (passed, least, most))
    # Where ties leave few thresholds to choose from, the rate is another one at each: distances add, unsquared.
    ties = 1 - (len(np.unique(between)) - 1) / (len(between) - 1)
    further = max(at.down, below.down), max(at.up, above.up)
    lower, higher = (math.sqrt(r * r + 2 * ties * t * r) for r, t in zip(further, (down, up), strict=True))
    reached = (hits <= threshold).astype(np.float64)
    return Estimate(value, {sources[0]: Part(down, up, reached), sources[1]: Part(lower, higher, at.influence)})


@lru_cache(maxsize=64)
def _ranks_of_95(n: int) -> tuple[int, int]:
    """The order statistics between which the 95 % point of a distribution lies, of n rows: each misses it with a
    probability of at most 2.5 %."""
    beyond = np.arange(n + 1)  # rows beyond the point: binomial
    steps = np.log((n - beyond[:-1]) / (beyond[:-1] + 1) * (0.05 / 0.95))
    below = np.exp(n * math.log(0.95) + np.concatenate([[0.0], steps.cumsum()])).cumsum()
    # rank r is beyond the point when more than n − r rows are, and short of it when at most n − r are
    return n - int((1 - below <= 0.025).argmax()), n - int((below <= 0.025).sum() - 1)
