"""Of a threshold that an order statistic is: where it may lie, what share of rows it keeps, how many it lets go by chance.

The threshold is the k-th smallest of n scores of held-out rows. Whatever the distribution of the scores, the share of
further rows of the same source that are no higher is then of the beta distribution (k, n + 1 − k), and how many of m
further rows are higher of the beta-binomial one: no model, no resampling (David and Nagaraja 2003, "Order Statistics",
§7.1–7.3). With ties, more are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float

_TAIL = 0.025  # of a 95 % interval, on either side


@dataclass(frozen=True)
class Threshold:
    """The `rank`-th smallest of the scores of `rows` held-out rows, above which a row is said to be OOD.

    `low` and `high` are the 95 % interval of the quantile that it estimates, between two of the scores; None where there are
    too few rows for that side. `kept` is the share of further ID rows that it keeps on average, `kept_low` … `kept_high` the
    interval of what this very threshold keeps.
    """

    value: float
    rank: int
    rows: int
    low: float | None
    high: float | None
    kept: float
    kept_low: float
    kept_high: float


def least_rows(keep: float) -> int:
    """The fewest held-out rows that have a threshold which keeps such a share: from there on the rank is none beyond the last.

    Raises `ValueError` unless `keep` is above 0 and below 1.
    """
    if not 0 < keep < 1:
        percent = f"; for {keep:g} % give {keep / 100:g}" if 1 < keep < 100 else ""
        raise ValueError(
            f"keep={keep!r} must be above 0 and below 1: it is the share of ID images that are kept{percent}"
        )
    share = Fraction(str(keep))
    return math.ceil(share / (1 - share))


def threshold(scores: Float[np.ndarray, " n"], keep: float) -> Threshold:
    """The threshold that keeps at least the share `keep` of further rows of the same source, on average: the
    ⌈(n + 1) keep⌉-th smallest score, that of split conformal prediction (Vovk, Gammerman and Shafer 2005, "Algorithmic
    Learning in a Random World", §4.2).

    Raises `ValueError` unless `keep` is above 0 and below 1, and for fewer rows than `least_rows`.
    """
    rows = len(scores)
    if rows < least_rows(keep):
        raise ValueError(
            f"{rows:,} held-out ID rows are too few for a threshold that keeps {keep:g} of them; hold out "
            f"{least_rows(keep):,} or more, or keep less"
        )
    rank = math.ceil((rows + 1) * Fraction(str(keep)))
    rising = np.sort(np.asarray(scores, np.float64))
    at_most = _binomial(rows, keep)  # of rows no higher than the quantile
    below = int(np.searchsorted(at_most, _TAIL, side="right"))
    above = int(np.searchsorted(at_most, 1 - _TAIL, side="left")) + 1
    return Threshold(
        value=float(rising[rank - 1]),
        rank=rank,
        rows=rows,
        low=float(rising[below - 1]) if below else None,
        high=float(rising[above - 1]) if above <= rows else None,
        kept=rank / (rows + 1),
        kept_low=_beta_quantile(rank, rows, _TAIL),
        kept_high=_beta_quantile(rank, rows, 1 - _TAIL),
    )


def by_chance(higher: int, of: int, rank: int, rows: int) -> float:
    """The probability that of so many further ID rows this many or more are beyond the `rank`-th smallest of `rows` scores:
    the upper tail of the beta-binomial distribution, the uncertainty of the threshold with it."""
    log = _log_factorials(rows + of)
    x = np.arange(higher, of + 1)
    beyond, within = rows - rank + x, rank - 1 + of - x  # C(n − k + x, x) C(k − 1 + m − x, m − x) / C(n + m, m)
    ways = log[beyond] - log[x] - log[rows - rank] + log[within] - log[of - x] - log[rank - 1]
    return float(min(1.0, np.exp(ways - (log[rows + of] - log[of] - log[rows])).sum()))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several hypotheses are rejected, when the probability of rejecting any true one is to be `level` at most,
    however they depend on each other (Holm 1979, Scandinavian Journal of Statistics 6, 65–70)."""
    rejected = [False] * len(p_values)
    for step, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] > level / (len(p_values) - step):
            break
        rejected[i] = True
    return rejected


def _log_factorials(n: int) -> Float[np.ndarray, " _"]:
    """ln 0!, …, ln n!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def _binomial(n: int, p: float) -> Float[np.ndarray, " _"]:
    """The probabilities of at most 0, …, n of n."""
    log, i = _log_factorials(n), np.arange(n + 1)
    return np.cumsum(np.exp(log[n] - log[i] - log[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)))


def _beta_quantile(rank: int, rows: int, share: float) -> float:
    """Of the beta distribution (rank, rows + 1 − rank): it is below p where `rank` or more of `rows` are."""
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        p = (low + high) / 2
        low, high = (p, high) if 1 - _binomial(rows, p)[rank - 1] < share else (low, p)
    return (low + high) / 2
