"""Thresholds by order statistics: against slow loops, SciPy's distributions and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from evalsuite.intervals.order import by_chance, holm, least_rows, threshold


@pytest.mark.parametrize(
    ("rows", "keep"), [(19, 0.95), (20, 0.95), (200, 0.95), (77, 0.9), (1000, 0.99), (9, 0.5), (3, 0.7)]
)
def test_the_threshold_is_the_least_score_that_keeps_enough(rows, keep):
    scores = np.random.default_rng(rows).normal(size=rows)
    slow = next(
        value for value in sorted(scores) if sum(other <= value for other in scores) >= round((rows + 1) * keep, 9)
    )
    found = threshold(scores, keep)
    assert found.value == slow
    assert found.rank == sum(other <= slow for other in scores)
    assert found.kept == found.rank / (rows + 1) >= keep


@pytest.mark.parametrize(("rows", "keep"), [(200, 0.95), (77, 0.9), (5000, 0.99), (40, 0.5)])
def test_intervals_are_scipys(rows, keep):
    rising = np.arange(1.0, rows + 1)
    found = threshold(rising, keep)
    low, high = (stats.beta.ppf(q, found.rank, rows + 1 - found.rank) for q in (0.025, 0.975))
    assert (found.kept_low, found.kept_high) == pytest.approx((low, high), abs=1e-7)
    below, above = int(found.low), int(found.high)  # scores are their ranks
    assert stats.binom.cdf(below - 1, rows, keep) <= 0.025 < stats.binom.cdf(below, rows, keep)
    assert stats.binom.sf(above - 1, rows, keep) <= 0.025 < stats.binom.sf(above - 2, rows, keep)


@pytest.mark.parametrize("of", [stats.norm(), stats.expon()], ids=["normal", "exponential"])
def test_what_intervals_say_is_so_in_95_of_100_fits(of):
    """Threshold and the share it keeps; of any distribution."""
    rng, rows, keep, fits = np.random.default_rng(0), 100, 0.9, 500
    quantile, inside, kept, average = of.ppf(keep), 0, 0, 0.0
    for _ in range(fits):
        found = threshold(of.rvs(size=rows, random_state=rng), keep)
        inside += found.low <= quantile <= found.high
        share = of.cdf(found.value)
        kept += found.kept_low <= share <= found.kept_high
        average += share / fits
    assert inside / fits > 0.93
    assert 0.93 < kept / fits < 0.975
    assert average == pytest.approx(found.kept, abs=0.005)


def test_too_few_rows_have_no_side_or_no_threshold():
    assert least_rows(0.95) == 19
    assert least_rows(0.99) == 99
    assert threshold(np.arange(19.0), 0.95).high is None
    assert threshold(np.arange(19.0), 0.95).low is not None
    with pytest.raises(ValueError, match=r"18 held-out ID rows are too few .* hold out 19"):
        threshold(np.arange(18.0), 0.95)


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.1, 95.0, math.nan])
def test_keep_is_a_share(keep):
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        threshold(np.arange(100.0), keep)


def test_a_percentage_is_told_what_it_is():
    with pytest.raises(ValueError, match=r"for 95 % give 0\.95"):
        least_rows(95.0)


def test_ties_keep_more():
    found = threshold(np.repeat([0.0, 1.0], 50), 0.6)
    assert found.value == 1.0


@pytest.mark.parametrize(
    ("higher", "of", "rank", "rows"), [(0, 10, 96, 100), (3, 10, 96, 100), (10, 10, 50, 60), (7, 500, 950, 999)]
)
def test_chance_is_scipys_beta_binomial(higher, of, rank, rows):
    expected = stats.betabinom.sf(higher - 1, of, rows + 1 - rank, rank)
    assert by_chance(higher, of, rank, rows) == pytest.approx(expected, rel=1e-9)


def test_chance_holds_for_rows_that_are_drawn():
    """Of 40 further rows, with the threshold of 60: as often as it says."""
    rng, rank = np.random.default_rng(0), threshold(np.arange(60.0), 0.9).rank
    values = np.sort(rng.random((4000, 60)), axis=1)[:, rank - 1 : rank]
    higher = (rng.random((4000, 40)) > values).sum(axis=1)
    upper = np.array([(higher >= x).mean() for x in range(41)])
    said = [by_chance(x, 40, rank, 60) for x in range(41)]
    assert np.abs(upper - said).max() < 0.02


def test_holm_by_hand():
    assert holm([0.03, 0.01, 0.04, 0.002]) == [False, True, False, True]
    assert holm([0.2, 0.001]) == [False, True]
    assert holm([]) == []
    # by hand: 0.002 ≤ 0.05/4, 0.01 ≤ 0.05/3, 0.03 > 0.05/2: that one and all larger ones stay
