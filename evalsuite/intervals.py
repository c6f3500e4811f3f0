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

Single intervals of shares and areas are Wilson's score interval, n being replaced by the effective number of rows
p (1 − p) / V, with Student's quantile (Kish 1965, "Survey Sampling"; Korn and Graubard 1998, Survey Methodology 24,
193–201). V is the estimated variance, blended with one row's worth of what it may be where no row speaks against the
value (a unit of information: Kass and Wasserman 1995, JASA 90, 928–934), so that no interval has width 0. For counts
under 5 the score interval is modified as Brown, Cai and DasGupta (2001, Statistical Science 16, 101–133) do.
`benchmarks/intervals.py` measures the coverage.
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

LEAST_FOR_MEAN = 50
"""Rows below which a mean of cosines gets no interval."""

_Z = NormalDist().inv_cdf(0.975)
_PRIOR_ROWS = 1.0  # what the variance where no row speaks counts as, against the rows that speak for and against
_FEW = 5.0  # right or wrong rows under which the nearer bound is that of a Poisson count
_CORRECTED = 20.0  # rows below which Wilson's bounds are corrected for continuity (Newcombe's method 4)
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
    counts: bool = False  # of rows that are right or wrong, and nothing else

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

    Of right and wrong answers this is the score interval: its coverage is at least 92.8 % for every n and p, and 93 to
    97 % where ten rows or more are to be expected right and wrong. Of other shares there is none for fewer than `LEAST_ROWS`. Raises `ValueError` for no rows.
    """
    if values.size == 0:
        raise ValueError("there are no rows: a mean needs at least one")
    values = np.asarray(values, np.float64)
    n, value = len(values), float(values.mean())
    if ((values == 0) | (values == 1)).all():
        return Estimate(value, {source: Part(*_score(value, n), values)}, counts=True)
    return _blended(value, {source: _Side(values, min(_equal(values), _equal(1 - values)), 1 / n)})


def macro_share(correct: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> Estimate:
    """The unweighted mean over the classes that occur in `labels` of the accuracy within each.

    The variance is the stratified one, Σ p (1 − p) / (n − 1) over the classes (Cochran 1977, "Sampling Techniques",
    §5.9); a class with one row, whose variance nothing tells, counts as one of the mean accuracy. Where no row
    speaks, classes are taken to be alike. There is no interval where more than a
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
    alike = (1 / rows).sum() / classes**2
    speaking = min(weight @ right, weight @ (rows - right))
    inverse = _shrunk(variance / spread if spread else 0.0, alike, speaking)
    return Estimate(value, {"rows": Part(*_score(value, 1 / inverse), np.asarray(correct, np.float64))})


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
    for name, (of_ood, of_id, bias) in _precision(ood, id_, rank_ood, rank_id).items():
        found[f"{name}_out"] = _blended(values[f"{name}_out"], {id_source: of_id, ood_source: of_ood}, bias)
    below_id, below_ood = distinct - 1 - rank_id, distinct - 1 - rank_ood
    for name, (of_id, of_ood, bias) in _precision(id_[::-1], ood[::-1], below_id, below_ood).items():
        found[f"{name}_in"] = _blended(values[f"{name}_in"], {id_source: of_id, ood_source: of_ood}, bias)
    found["fpr95_id"] = _fpr95(below_id, below_ood, (id_source, ood_source), "ID")
    found["fpr95_ood"] = _fpr95(rank_ood, rank_id, (ood_source, id_source), "OOD")
    if 2 * distinct < len(rank_id) + len(rank_ood):
        few_scores = (
            f"{distinct:,} distinct scores of {len(rank_id) + len(rank_ood):,} rows: lines between few points; see ap"
        )
        found |= {name: Estimate(values[name], {}, few_scores) for name in ("aupr_in", "aupr_out")}
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

    Of rows that are right or wrong this is Tango's score interval (1998, Statistics in Medicine 17, 891–908), which
    leaves out 0 where McNemar's test tells the two apart. Else it is Student's of the influences' differences, for the
    AUROC DeLong, DeLong and Clarke-Pearson's; where few rows differ, it is widened towards what no differing row among
    n gives, ± z² / (n + z²) (Tango).
    """
    value = b.value - a.value
    if (none := a.none or b.none) is not None:
        return Estimate(value, {}, none)
    if a.counts and b.counts:
        ((source, ours),), (theirs,) = a.parts.items(), b.parts.values()
        influence = theirs.influence - ours.influence
        return Estimate(value, {source: Part(*_tango(influence), influence)}, least=-1.0)
    parts: dict[str, Part] = {}
    for source in a.parts:
        influence = b.parts[source].influence - a.parts[source].influence
        differing, n = _equal(np.abs(influence)), len(influence)
        guard = _PRIOR_ROWS / (differing + _PRIOR_ROWS) * _Z**2 / (n + _Z**2)
        half = math.hypot(_student(n - 1) * float(influence.std(ddof=1)) / math.sqrt(n), guard) if n > 1 else 1.0
        parts[source] = Part(half, half, influence)
    return Estimate(value, parts, least=-1.0)


def _tango(difference: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Tango's score interval of a paired difference of shares, as distances below and above it."""
    n, gained, lost = len(difference), int((difference > 0).sum()), int((difference < 0).sum())

    def distance(up: bool) -> float:
        more, less = (gained, lost) if up else (lost, gained)
        value = (more - less) / n
        low, high = value, 1.0
        for _ in range(50):
            delta = (low + high) / 2
            b, c = (2 * n - more + less) * delta - more - less, -less * delta * (1 - delta)
            rare = (math.sqrt(b * b - 8 * n * c) - b) / (4 * n)
            spread = math.sqrt(max(0.0, n * (2 * rare + delta * (1 - delta))))
            low, high = (delta, high) if n * delta - (more - less) <= _Z * spread else (low, delta)
        return high - value

    return distance(up=False), distance(up=True)


def _score(p: float, n: int | float) -> tuple[float, float]:
    """How far Wilson's bounds of the share p of n rows, which need not be whole, lie below and above it. Of the rows
    that are right or wrong, where they are fewer than `_FEW`, the least number is Garwood's of a Poisson count, as Brown,
    Cai and DasGupta modify the score interval."""
    if p > 0.5:
        return _score(1 - p, n)[::-1]
    moved = 0.5 / n if n < _CORRECTED else 0.0

    def bound(p: float, side: int) -> float:
        half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return (p + _Z**2 / (2 * n) + side * half) / (1 + _Z**2 / n)

    low = bound(max(p - moved, 0.0), -1) if n * p >= _FEW else _least_count(n * p) / n
    return p - max(low, 0.0), min(bound(p + moved, 1), 1.0) - p


def _least_count(found: float) -> float:
    """The mean under which a Poisson count reaches `found`, which need not be whole, with a probability of 2.5 %
    (Garwood 1936, Biometrika 28, 437–442)."""
    if found < 1e-9:
        return 0.0
    low, high = 0.0, found
    while high - low > 1e-7 * found:
        mean = (low + high) / 2
        term = math.exp(found * math.log(mean) - mean - math.lgamma(found + 1))
        reached, i = term, found
        while term > 1e-9:
            i += 1
            term *= mean / i
            reached += term
        low, high = (low, mean) if reached > 0.025 else (mean, high)
    return low


@dataclass(frozen=True)
class _Side:
    """One source's rows: their influences, how many `speak` against the value or for it, whichever are fewer, and the
    variance that a value p may have where none does, over p (1 − p)."""

    influence: Float[np.ndarray, " n"]
    speaking: float
    model: float


def _shrunk(estimated: float, model: float, speaking: float) -> float:
    """The variance of `speaking` rows and that of the model, which counts as one row."""
    return (speaking * estimated + _PRIOR_ROWS * model) / (speaking + _PRIOR_ROWS)


def _blended(value: float, sides: Mapping[str, _Side], bias: float = 0.0) -> Estimate:
    """The score interval of a value in [0, 1] that is `bias` too high; see the module."""
    few = min(len(side.influence) for side in sides.values())
    if few < LEAST_ROWS:
        return Estimate(value, {}, f"{few} rows, fewer than {LEAST_ROWS}")
    spread = value * (1 - value)
    inverse = {
        source: _shrunk(
            float(side.influence.var(ddof=1)) / len(side.influence) / spread if spread > 0 else 0.0,
            side.model,
            side.speaking,
        )
        for source, side in sides.items()
    }
    total = sum(inverse.values())
    rows = 1 / min(total, max(side.model for side in sides.values()))
    down, up = _score(value, rows * (_Z / _student(few - 1)) ** 2)
    down = min(down + bias, value)
    return Estimate(
        value,
        {
            source: Part(down * math.sqrt(part / total), up * math.sqrt(part / total), sides[source].influence)
            for source, part in inverse.items()
        },
    )


def _exponential(theta: float) -> float:
    """H-M: the ID rows' part."""
    # Var of the ID side, n Var / (θ(1−θ))
    return theta / (1 + theta)


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
) -> dict[str, tuple[_Side, _Side, float]]:
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
    itself = float(
        weight @ ((1 - precision) / np.maximum(flagged, 1))
    )  # what counting itself adds to a positive's precision
    found = {}
    for name, own, of_p, of_n in (
        ("aupr", (precision + before) / 2, (at[0] + earlier[0]) / 2, (at[1] + earlier[1]) / 2),
        ("ap", precision, *at),
    ):
        kept = own[of_positive]
        lost = max(1 - float(weight @ own), 1 / p)
        found[name] = (
            _Side((own + of_p)[of_positive], min(_equal(kept), _equal(1 - kept)), 1 / p),
            _Side(of_n[of_negative], _equal(-of_n[of_negative]), (1 - math.log(lost)) / p),
            itself,
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
    slope = (down + up) / 2 / (_Z * math.sqrt(0.05 * 0.95 / n))  # of the rate, by the share of rows beyond a threshold
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
