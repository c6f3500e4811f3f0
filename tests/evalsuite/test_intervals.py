"""Against independent formulas, and by simulation: a part of `benchmarks/intervals.py`."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, chi2, norm, t
from sklearn.metrics import average_precision_score, cohen_kappa_score, roc_auc_score

from evalsuite import Metric, Result
from evalsuite.intervals import (
    LEAST_FOR_THRESHOLD,
    LEAST_ROWS,
    aurc,
    calibration_error,
    cosine_mean,
    difference,
    kappa,
    macro_share,
    mean_of,
    nll,
    ranking,
    share,
)
from evalsuite.intervals.ranks import _ranks_of_95
from evalsuite.metrics import ood_metrics


def several(right: int, n: int) -> np.ndarray:
    return np.arange(n) < right


@pytest.mark.parametrize(("right", "n"), [(7, 10), (48, 50), (50, 50), (1437, 2000), (1998, 2000)])
def test_a_share_has_the_modified_score_interval(right, n):
    """Wilson's bounds solve |p̂ − p| = z √(p (1 − p) / n), with a continuity correction below 20 rows; where fewer than
    5 are wrong, they are at least as many as a Poisson count's lower bound (scipy's χ²)."""
    low, high = share(several(right, n)).ci95
    p, z, moved = right / n, norm.ppf(0.975), 0.5 / n if n < 20 else 0

    def excess(bound):
        return abs(p - bound) - moved - z * math.sqrt(bound * (1 - bound) / n)

    def nearer(count):
        return chi2.ppf(0.025, 2 * count) / 2 / n if count else 0.0

    assert low == pytest.approx(nearer(right) if right < 5 else brentq(excess, 1e-12, p - moved - 1e-9), abs=1e-6)
    assert high == pytest.approx(
        1 - nearer(n - right) if n - right < 5 else brentq(excess, p + moved + 1e-9, 1 - 1e-12), abs=1e-6
    )


@pytest.mark.parametrize("n", [1, 2, 3, 10, 50, 200, 1000])
def test_a_share_is_covered_whatever_it_is(n):
    """Exactly, by the binomial: for p up to .999 at least 93 %, and no more than 97 % where counts are not coarse."""
    bounds = np.array([share(several(right, n)).ci95 for right in range(n + 1)])
    for p in (0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999):
        holds = (bounds[:, 0] <= p) & (p <= bounds[:, 1])
        covered = binom.pmf(np.arange(n + 1), n, p)[holds].sum()
        assert covered > 0.93, p
        assert covered < 0.97 or n * (1 - p) < 10, p


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(5, 0, 30), (9, 3, 100), (14, 3, 60), (40, 22, 500), (40, 20, 500), (3, 0, 40)]
)
def test_a_paired_difference_is_mcnemars(gained, lost, n):
    """0 lies outside exactly where (b − c)² / (b + c) exceeds χ²'s 95 % point; the bounds solve Tango's equation."""
    a, b = np.zeros(n, bool), np.zeros(n, bool)
    b[:gained], a[gained : gained + lost] = True, True
    low, high = difference(share(a), share(b)).ci95
    assert (low > 0) == ((gained - lost) ** 2 / (gained + lost) > chi2.ppf(0.95, 1))
    for bound in (low, high):  # the likelihood's maximum under that difference, by search
        rare = np.linspace(max(0, -bound), (1 - bound) / 2, 200_001)[1:-1]
        log = gained * np.log(rare + bound) + lost * np.log(rare) + (n - gained - lost) * np.log1p(-2 * rare - bound)
        rare = rare[np.nanargmax(log)]
        z = (gained - lost - n * bound) / math.sqrt(n * (2 * rare + bound * (1 - bound)))
        assert abs(z) == pytest.approx(1.96, abs=0.01)


def test_a_paired_difference_of_areas_is_delongs(rng):
    """By the covariance of the placement values, from all pairs."""
    ids, oods = rng.normal(size=80), rng.normal(1, 1, 70)
    both = [(ids + rng.normal(size=80), oods + rng.normal(size=70)) for _ in range(2)]
    wins = [(ood[None] > id_[:, None]) * 1.0 for id_, ood in both]
    apart = wins[1] - wins[0]
    variance = apart.mean(axis=1).var(ddof=1) / 80 + apart.mean(axis=0).var(ddof=1) / 70
    found = difference(*[ranking(*each)["auroc"] for each in both])
    low, high = found.ci95
    assert found.value == pytest.approx(apart.mean())
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)


def test_an_area_has_delongs_variance(rng):
    ids, oods = rng.normal(size=900), rng.normal(1, 1, 700)
    won = (oods[None] > ids[:, None]) * 1.0
    half = 1.96 * math.sqrt(won.mean(axis=1).var(ddof=1) / 900 + won.mean(axis=0).var(ddof=1) / 700)
    low, high = ranking(ids, oods)["auroc"].ci95
    assert high - low == pytest.approx(2 * half, rel=0.03)


def test_few_distinct_scores_have_no_trapezoid(rng):
    found = ranking(rng.normal(size=90).round(), rng.normal(1, 1, 80).round())
    assert "distinct scores of 170 rows" in found["aupr_in"].none
    assert found["ap_in"].ci95 is not None


def test_a_class_average_of_one_row_a_class_has_none():
    correct = several(581, 1000)
    of_one = macro_share(correct, np.arange(1000))
    assert (of_one.value, of_one.ci95) == (0.581, None)
    assert of_one.none == "1,000 of 1,000 classes have one row, which tells nothing of its class"
    assert macro_share(several(3, 4), np.array([0, 0, 1, 1])).none == "the smallest of 2 classes, with 2 rows, decides"
    low, high = macro_share(np.ones(100, bool), np.arange(100) // 5).ci95
    assert (0.94 < low < 0.98, high) == (True, 1)


def test_many_rows_a_class_have_the_stratified_variance(rng):
    labels = np.repeat(range(4), (300, 400, 500, 2000))
    correct = rng.random(3200) < np.array([0.5, 0.6, 0.7, 0.8])[labels]
    rates = [correct[labels == c].mean() for c in range(4)]
    variance = sum(p * (1 - p) / ((labels == c).sum() - 1) for c, p in enumerate(rates)) / 16
    found = macro_share(correct, labels)
    assert found.value == pytest.approx(np.mean(rates))
    low, high = found.ci95
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.08)


def test_the_areas_influences_are_those_of_leaving_a_row_out(rng):
    """The jackknife: n − 1 times what leaving a row out takes from the metric, by scikit-learn."""
    ids, oods = rng.normal(size=60), rng.normal(1, 1, 50)
    found = ranking(ids, oods)

    def auroc(a, b):
        return roc_auc_score(np.repeat([0, 1], [len(a), len(b)]), np.concatenate([a, b]))

    slow = {
        "id": np.array([auroc(ids, oods) - auroc(np.delete(ids, i), oods) for i in range(60)]) * 59,
        "ood": np.array([auroc(ids, oods) - auroc(ids, np.delete(oods, i)) for i in range(50)]) * 49,
    }
    for source, influence in slow.items():
        got = found["auroc"].parts[source].influence
        np.testing.assert_allclose(got - got.mean(), influence, atol=1e-9)
    for metric, positive in (("ap_out", 1), ("ap_in", 0)):
        many_id, many_ood = np.sort(rng.normal(size=400)), np.sort(rng.normal(1, 1, 300))
        of = ranking(many_id, many_ood)[metric].parts

        def precision(a, b, weight_a, weight_b, positive=positive):
            is_ood, score = np.repeat([0, 1], [len(a), len(b)]), np.concatenate([a, b])
            weight = np.concatenate([weight_a, weight_b])
            return average_precision_score(is_ood == positive, score if positive else -score, sample_weight=weight)

        # the derivative by one row's weight, of weights that keep their sum
        for side, n in (("id", 400), ("ood", 300)):
            step = 1e-4
            for row in (3, n // 2, n - 3):
                weights = {"id": np.ones(400), "ood": np.ones(300)}
                before = precision(many_id, many_ood, weights["id"], weights["ood"])
                weights[side] = (weights[side] + step * n * (np.arange(n) == row)) / (1 + step)
                slope = (precision(many_id, many_ood, weights["id"], weights["ood"]) - before) / step
                got = of[side].influence
                assert got[row] - got.mean() == pytest.approx(slope, rel=5e-3, abs=2e-3)


def test_perfect_separation_is_no_certainty(rng):
    ids, oods = rng.normal(size=50), rng.normal(20, 1, 50)
    for name, found in ranking(ids, oods).items():
        if name.startswith("fpr95"):
            assert found.ci95 is None
            assert (
                f"50 {name[6:].upper()} rows set the threshold; bounds on it take {LEAST_FOR_THRESHOLD}" == found.none
            )
        else:
            assert found.value == found.ci95[1] == 1
            assert found.ci95[0] < 0.94
    assert all(0 < found.ci95[1] < 0.2 for name, found in ranking(*[np.concatenate([x] * 2) for x in (ids, oods)]).items()
               if name.startswith("fpr95"))  # fmt: skip


@pytest.mark.parametrize(("n", "m"), [(1, 1), (50, 1), (2, 50), (4, 4)])
def test_few_rows_have_no_interval_and_a_word_why(n, m):
    few = min(n, m)
    for found in ranking(np.arange(n) * 1.0, np.arange(m) + 9.5).values():
        assert found.ci95 is None
        assert found.none == f"{few} {'ID' if n == few else 'OOD'} rows, fewer than {LEAST_ROWS}"


@pytest.mark.parametrize("n", [72, 100, 1000])
def test_order_statistics_bound_the_threshold(n):
    """The ranks, between two by line, that miss the 95 % point with 2.5 % each, by scipy's binomial."""
    lowest, highest = _ranks_of_95(n)
    beyond = binom(n, 0.05)
    assert beyond.sf(n - math.floor(lowest)) <= 0.025 <= beyond.sf(n - math.ceil(lowest))
    assert beyond.cdf(n - math.ceil(highest)) <= 0.025 <= beyond.cdf(n - math.floor(highest))
    assert lowest < 0.95 * n < highest <= n


def test_means_and_differences_square_and_add(rng):
    a, b = (share(rng.random(400) < p, source) for p, source in ((0.6, "x"), (0.9, "y")))
    mean = mean_of([a, b])
    (a_low, a_high), (b_low, b_high) = a.ci95, b.ci95
    down, up = math.hypot(a.value - a_low, b.value - b_low) / 2, math.hypot(a_high - a.value, b_high - b.value) / 2
    assert mean.ci95 == pytest.approx((mean.value - down, mean.value + up))
    same = mean_of([a, a])
    assert same.ci95 == pytest.approx(a.ci95)  # nothing is gained by measuring the same rows the same way
    few = ranking(rng.normal(size=4), rng.normal(size=9))["auroc"]
    assert mean_of([a, few]).none == difference(a, few).none == "4 ID rows, fewer than 5"


def test_equal_answers_are_no_proof_of_equality():
    for right in (0, 30, 40):
        low, high = difference(*[share(several(right, 40))] * 2).ci95
        assert low <= -(1.96**2) / (40 + 1.96**2) * 0.99
        assert high >= 1.96**2 / (40 + 1.96**2) * 0.99


def test_kappa_is_cohens(rng):
    a = rng.integers(3, size=300)
    b = np.where(rng.random(300) < 0.7, a, rng.integers(3, size=300))
    found = kappa(a, b, 3)
    assert found.value == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    leave_one = np.array([cohen_kappa_score(np.delete(a, i), np.delete(b, i)) for i in range(300)])
    spread = math.sqrt(299 / 300 * ((leave_one - leave_one.mean()) ** 2).sum())
    low, high = found.ci95
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    for votes in (np.zeros(5, int), np.zeros(0, int)):
        with pytest.raises(ValueError, match="kappa is not defined"):
            kappa(votes, votes, 3)


def test_a_mean_of_cosines_is_students(rng):
    cosines = rng.beta(8, 2, 60)
    half = t.ppf(0.975, 59) * cosines.std(ddof=1) / math.sqrt(60)
    assert cosine_mean(cosines).ci95 == pytest.approx((cosines.mean() - half, cosines.mean() + half), abs=1e-5)
    assert cosine_mean(cosines[:49]).none == "49 rows, fewer than 50"
    assert cosine_mean(np.ones(50)).none == "all of the 50 values are the same"


def test_the_influences_on_the_area_under_risk_and_coverage_are_derivatives(rng):
    """By one row's weight, of weights that keep their sum, in float64: E[wrong · −ln c], no two confidences alike."""
    n = 400
    confidence, right = rng.random(n), rng.random(n) < 0.7
    order = np.argsort(-confidence)

    def area(weight):
        weight = weight / weight.sum()
        at_least = weight[order].cumsum() - weight[order] / 2
        return (weight * ~right)[order] @ -np.log(at_least)

    found = aurc(confidence, right)
    assert found.value == pytest.approx(area(np.ones(n)), abs=5e-3)
    influence = found.parts["rows"].influence
    for row in (0, 7, 100, 399):
        moved = np.ones(n)
        moved[row] += 1e-5
        slope = (area(moved) - area(np.ones(n))) * n / 1e-5
        assert slope == pytest.approx(influence[row] - influence.mean(), abs=0.02)


def test_a_mean_of_skewed_values_has_halls_interval(rng):
    """The bounds are where his transform of Student's ratio is ± t."""
    values = rng.exponential(size=200)
    low, high = nll(values).ci95
    mean, sd, bound = values.mean(), values.std(ddof=1), t.ppf(0.975, 199)
    skew = ((values - mean) ** 3).mean() / sd**3
    for at, y in ((low, bound), (high, -bound)):
        ratio = math.sqrt(200) * (mean - at) / sd
        g = ratio + skew / math.sqrt(200) * (ratio**2 / 3 + 1 / 6) + skew**2 / 200 * ratio**3 / 27
        assert g == pytest.approx(y, abs=2e-3)
    assert mean - low < high - mean


def test_few_rows_tell_nothing_of_probabilities():
    assert "49 rows, fewer than 50" in nll(np.ones(49)).none
    assert nll(np.append(np.zeros(99), 5.0)).none == "1 rows have a class of a probability under ½, fewer than 5"
    assert "149 rows in 15 bins, fewer than 150" in calibration_error(np.ones(149), np.ones(149, bool), 15).none
    assert nll(np.full(60, 2.0)).none == "all of the 60 values are the same"


def test_no_rows_are_refused():
    none = np.zeros(0, bool)
    for measure in (
        share,
        lambda rows: macro_share(rows, np.zeros(0, int)),
        lambda rows: cosine_mean(rows * 1.0),
        lambda rows: nll(rows * 1.0),
    ):
        with pytest.raises(ValueError, match="there are no rows"):
            measure(none)


def test_why_there_is_none_is_in_the_file(tmp_path):
    metrics = {"a": Metric(0.5, no_ci95="one row"), "b": Metric(0.5, (0.4, 0.6)), "c": Metric(0.5)}
    path = Result("knn", {}, {}, metrics, {}).write(tmp_path / "r.json")
    assert Result.read(path).metrics == metrics
    assert path.read_text().count("no_ci95") == 1


@pytest.mark.parametrize("part", ["accuracies", "macros", "probabilities", "rankings", "differences"])
def test_a_part_of_the_simulation(part, monkeypatch):
    """A few of the benchmark's cases, 60 samples each: 93 % less three standard errors."""
    from pathlib import Path

    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import intervals

    small: dict = {
        "rankings": {"sizes": ((500, 10), (50, 50)), "enough": 60_000},
        "probabilities": {"sizes": (200, 1000), "enough": 400_000},
    }
    given, every = small.get(part, {}), {"rankings": 14, "probabilities": 5}.get(part, 28)
    cases = [case for i, case in enumerate(getattr(intervals, part)(**given)) if i % every == 4]
    assert len(cases) >= 2
    for case in cases:
        for metric, coverage, _, none, rejected in intervals.covered(case, 60):
            assert none == 1 or coverage >= 0.93 - 3 * math.sqrt(0.93 * 0.07 / (60 * (1 - none))), (case[0], metric)
            if case[0].endswith("(null)"):
                assert none == 1 or rejected <= 0.07 + 3 * math.sqrt(0.93 * 0.07 / (60 * (1 - none))), (
                    case[0],
                    metric,
                )


def test_more_resamples_change_nothing(make_store, rng):
    """The parameters of earlier versions are accepted."""
    import evalsuite

    rows = rng.normal(size=(60, 4))
    bank, query = (
        make_store("bank", rows, labels=np.arange(60) % 3),
        make_store("query", -rows, labels=np.arange(60) % 3),
    )
    assert evalsuite.knn(bank, query, [3], resamples=5) == evalsuite.knn(bank, query, [3])


def test_single_metrics_equal_the_plain_ones(rng):
    ids, oods = rng.normal(size=90).round(1), rng.normal(1, 1, 80).round(1)
    assert {name: found.value for name, found in ranking(ids, oods).items()} == ood_metrics(ids, oods)
