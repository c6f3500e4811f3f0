"""How alike two spaces score the same rows: rank correlation, and decisions, each at its own threshold."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float

from evalsuite.intervals.estimate import LEAST_ROWS, PRIOR_ROWS, Estimate, Part, Z, equal_rows, score_bounds, student
from evalsuite.intervals.ranks import LEAST_FOR_THRESHOLD
from evalsuite.intervals.shares import kappa, share
from evalsuite.metrics import place_of_95

Scores = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]
"""Of the same rows by the first and the second space, **higher = more OOD**; no NaN."""
Flags = tuple[Bool[np.ndarray, " _"], Bool[np.ndarray, " _"]]
"""Which rows each space takes for OOD."""


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> Estimate:
    """Spearman's rank correlation, ties having the mean of their ranks; in [-1, 1].

    The interval is Fisher's z with the variance of the rows' influences, which is that of the rank correlation under any
    distribution (Hoeffding 1948, Annals of Mathematical Statistics 19, 293–325). The variance (1 + r² / 2) / (n − 3) of
    Bonett and Wright (2000, Psychometrika 65, 23–28) is that of normal scores: intervals by it held the truth in 35 to 91 of
    100 samples of 1,000 rows with heavy tails, or of which some are far off, and in 97 to 100 of ID and OOD rows together.
    Where few rows speak against the value, it is widened towards what n rows in perfect order leave open, as a share of n
    rows that are all right.

    Raises `ValueError` where all scores of one side are the same, which have no order.
    """
    for scores in (a, b):
        if len(scores) == 0 or (scores == scores[0]).all():
            raise ValueError(f"one side gives all of the {len(scores):,} rows the same score")
    (u, tied_u), (v, tied_v) = _places(a), _places(b)
    n, of_u, of_v = len(u), float((u * u).mean()), float((v * v).mean())
    length = math.sqrt(of_u * of_v)
    value = float((u * v).mean()) / length
    if n < LEAST_ROWS:
        return Estimate(value, {}, f"{n} rows, fewer than {LEAST_ROWS}", least=-1.0)
    # A row moves the product by its own, and by the ranks of all rows above it; a longer tie shortens the ranks.
    product = u * v + _above(a, v) + _above(b, u)
    influence = product / length + value * (tied_u**2 / of_u + tied_v**2 / of_v) / 8
    most = 1 - 1e-9
    z = math.atanh(min(max(value, -most), most))
    half = student(n - 1) * float(influence.std(ddof=1)) / math.sqrt(n) / (1 - math.tanh(z) ** 2)
    down, up = (
        math.hypot(distance, 2 * PRIOR_ROWS / (equal_rows((apart**2).round(20)) + PRIOR_ROWS) * Z**2 / (n + Z**2))
        for distance, apart in ((value - math.tanh(z - half), u - v), (math.tanh(z + half) - value, u + v))
    )
    return Estimate(value, {"rows": Part(down, up, influence)}, least=-1.0)


def decisions(known: Scores, others: Scores | None = None, together: bool = False) -> tuple[dict[str, Estimate], float]:
    """How often two spaces decide alike whether a row is OOD, `agreement` in [0, 1], and Cohen's `kappa` of the decisions
    (left out where both decide the same of every row); and how often they would agree by chance.

    A space takes for OOD what scores above the strictest threshold that accepts at least 95 % of `known`, the ID rows.
    Measured are these rows, or `others`, or both `together`.

    Thresholds vary with the ID rows, and with them the decisions. Of ID rows as many are flagged as before: what varies is
    how many both spaces flag, and the interval is that of their share. Of others it is that of the agreement or of kappa,
    with a part for each of two independent ways in which thresholds move, the same way and apart: as far as, in 95 of 100
    samples, their places among ID scores do, which correlate as the flags of the ID rows. None for fewer ID rows than
    `LEAST_FOR_THRESHOLD`.
    """
    n, ordered = len(known[0]), [np.sort(scores) for scores in known]

    def flags(rows: Scores, moved: tuple[float, float] = (0.0, 0.0)) -> Flags:
        """With each threshold so many standard errors of its place further up."""
        places = [place_of_95(n) + round(each * math.sqrt(0.05 * 0.95 * n)) for each in moved]
        a, b = (each > of[min(max(place, 0), n - 1)] for each, of, place in zip(rows, ordered, places, strict=True))
        return a, b

    of_known = flags(known)

    def measured(moved: tuple[float, float] = (0.0, 0.0)) -> Flags:
        if others is None:
            return of_known
        found = flags(others, moved)
        return (np.append(of_known[0], found[0]), np.append(of_known[1], found[1])) if together else found

    a, b = measured()
    found, chance = _alike(a, b), float(a.mean() * b.mean() + (~a).mean() * (~b).mean())
    if n < LEAST_FOR_THRESHOLD:
        none = f"{n} ID rows set the thresholds; bounds on them take {LEAST_FOR_THRESHOLD}"
        return {name: Estimate(each.value, {}, none, each.least) for name, each in found.items()}, chance
    if others is None:
        return _of_flagged(found, a & b, int(max(a.sum(), b.sum())), chance), chance
    varied = of_known[0].std() > 0 and of_known[1].std() > 0
    alike = float(np.corrcoef(of_known)[0, 1]) if varied else 0.0
    for way, sign in (("same way", 1), ("apart", -1)):
        far = Z * math.sqrt(max(0.0, (1 + sign * alike) / 2))
        moved = [_alike(*measured((up, sign * up))) for up in (far, -far)]
        beyond = of_known[0] + sign * of_known[1].astype(np.float64)
        for name, each in found.items():
            apart = [other[name].value - each.value for other in moved if name in other]
            part = Part(max(0.0, *(-x for x in apart)), max(0.0, *apart), beyond)
            found[name] = Estimate(each.value, {**each.parts, f"thresholds, {way}": part}, each.none, each.least)
    return found, chance


def _alike(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"]) -> dict[str, Estimate]:
    found = {"agreement": share(a == b)}
    if (a | b).any() and not (a & b).all():
        found["kappa"] = kappa(a.astype(np.int64), b.astype(np.int64), 2)
    return found


def _of_flagged(
    found: dict[str, Estimate], both: Bool[np.ndarray, " n"], flagged: int, chance: float
) -> dict[str, Estimate]:
    """The same values with the intervals that follow from how many of the `flagged` rows are flagged by both."""
    if not flagged:
        return found
    down, up = (2 * flagged / len(both) * each for each in score_bounds(float(both.sum()) / flagged, flagged))
    scale = {"agreement": 1.0, "kappa": 1 - chance}
    return {
        name: Estimate(
            each.value, {"rows": Part(down / scale[name], up / scale[name], both.astype(np.float64))}, least=each.least
        )
        for name, each in found.items()
    }


def _places(scores: Float[np.ndarray, " n"]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Each row's place from -½ (the lowest score) to ½, ties having the mean of theirs; and the share of rows tied with it."""
    _, of_row, rows = np.unique(scores, return_inverse=True, return_counts=True)
    return ((rows.cumsum() - rows / 2) / len(scores) - 0.5)[of_row], (rows / len(scores))[of_row]


def _above(scores: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """For each row the sum of the values of rows with higher scores, and half of those with the same, over all rows."""
    _, of_row = np.unique(scores, return_inverse=True)
    at = np.bincount(of_row, weights=values)
    sums: np.ndarray = ((at[::-1].cumsum()[::-1] - at / 2) / len(scores))[of_row]
    return sums
