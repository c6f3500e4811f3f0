import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import (
    auc,
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from evalsuite.metrics import auroc, lower_is_better, ood_metrics, tied

few = st.sampled_from([-1.5, -1.0, 0.0, 0.25, 0.5, 1.0, 3.0])
finite = st.floats(-1e6, 1e6)
scores = st.one_of(
    arrays(np.float64, st.integers(1, 60), elements=few),
    arrays(np.float64, st.integers(1, 60), elements=finite),
)


def pooled(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat([0, 1], [len(id_scores), len(ood_scores)]), np.concatenate([id_scores, ood_scores])


def trapezoid_aupr(is_positive: np.ndarray, score: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(is_positive, score)
    return auc(recall, precision)


def fpr_at_95(is_positive: np.ndarray, score: np.ndarray, drop_intermediate: bool = False) -> float:
    """OpenOOD's formula."""
    fpr, tpr, _ = roc_curve(is_positive, score, drop_intermediate=drop_intermediate)
    return fpr[np.argmax(tpr >= 0.95)]


@given(scores, scores)
def test_metrics_equal_scikit_learn(id_scores, ood_scores):
    is_ood, score = pooled(id_scores, ood_scores)
    assert auroc(id_scores, ood_scores) == pytest.approx(roc_auc_score(is_ood, score), abs=1e-12)
    assert ood_metrics(id_scores, ood_scores)["aupr_out"] == pytest.approx(trapezoid_aupr(is_ood, score), abs=1e-12)
    assert ood_metrics(id_scores, ood_scores)["aupr_in"] == pytest.approx(trapezoid_aupr(1 - is_ood, -score), abs=1e-12)
    assert ood_metrics(id_scores, ood_scores)["ap_out"] == pytest.approx(
        average_precision_score(is_ood, score), abs=1e-12
    )
    assert ood_metrics(id_scores, ood_scores)["ap_in"] == pytest.approx(
        average_precision_score(1 - is_ood, -score), abs=1e-12
    )
    assert ood_metrics(id_scores, ood_scores)["fpr95_ood"] == fpr_at_95(is_ood, score)
    assert ood_metrics(id_scores, ood_scores)["fpr95_id"] == fpr_at_95(1 - is_ood, -score)


@given(scores, scores)
def test_fpr_is_the_least_over_thresholds(id_scores, ood_scores):
    """The words of the definitions, threshold by threshold."""
    thresholds = np.concatenate([id_scores, ood_scores])
    accepts = [t for t in thresholds if 20 * (id_scores <= t).sum() >= 19 * len(id_scores)]
    rejects = [t for t in thresholds if 20 * (ood_scores >= t).sum() >= 19 * len(ood_scores)]
    assert ood_metrics(id_scores, ood_scores)["fpr95_id"] == min((ood_scores <= t).mean() for t in accepts)
    assert ood_metrics(id_scores, ood_scores)["fpr95_ood"] == min((id_scores >= t).mean() for t in rejects)


@given(scores, scores)
def test_average_precision_is_the_mean_over_positives_of_the_precision_at_their_score(id_scores, ood_scores):
    """Row by row; rows tied with a positive are all flagged with it."""
    out = [(ood_scores >= s).sum() / ((ood_scores >= s).sum() + (id_scores >= s).sum()) for s in ood_scores]
    in_ = [(id_scores <= s).sum() / ((id_scores <= s).sum() + (ood_scores <= s).sum()) for s in id_scores]
    assert ood_metrics(id_scores, ood_scores)["ap_out"] == pytest.approx(np.mean(out), abs=1e-12)
    assert ood_metrics(id_scores, ood_scores)["ap_in"] == pytest.approx(np.mean(in_), abs=1e-12)


@given(scores, st.data())
def test_tied_counts_rows_that_share_a_score(score, data):
    others = [[j for j in range(len(score)) if j != i and score[j] == s] for i, s in enumerate(score)]
    assert tied(score) == np.mean([bool(with_i) for with_i in others])
    group = data.draw(arrays(np.int64, len(score), elements=st.integers(-2, 2)))
    assert tied(score, group) == np.mean([any(group[j] != group[i] for j in js) for i, js in enumerate(others)])


def test_tied_of_no_rows():
    assert tied(np.array([])) == 0


def test_only_fpr_is_better_low():
    names = [*ood_metrics(np.zeros(1), np.zeros(1)), "knn/far/fpr95_set/auroc", "top1@10"]
    assert [name for name in names if lower_is_better(name)] == ["fpr95_id", "fpr95_ood"]
    assert lower_is_better("knn/far/mean/fpr95_id")


def test_fpr95_ood_is_openoods_on_untied_scores(rng):
    id_scores, ood_scores = rng.normal(size=300), rng.normal(1, 1, size=200)
    expected = fpr_at_95(*pooled(id_scores, ood_scores), drop_intermediate=True)
    assert ood_metrics(id_scores, ood_scores)["fpr95_ood"] == expected
    assert ood_metrics(id_scores, ood_scores)["fpr95_id"] != expected  # the two conventions differ


def test_orientation_and_golden_values():
    low, high = np.array([0.0, 1.0]), np.array([2.0, 3.0])
    assert ood_metrics(low, high) == {
        "auroc": 1, "aupr_in": 1, "aupr_out": 1, "ap_in": 1, "ap_out": 1, "fpr95_id": 0, "fpr95_ood": 0,
    }  # fmt: skip
    reversed_ = ood_metrics(high, low)
    assert (reversed_["auroc"], reversed_["fpr95_id"], reversed_["fpr95_ood"]) == (0, 1, 1)
    assert auroc(np.array([0.0, 1.0, 1.0]), np.array([1.0, 2.0])) == 5 / 6  # 4 wins and 2 ties among 6 pairs


def test_all_tied_is_chance():
    same = np.ones(7)
    assert auroc(same, same[:3]) == 0.5
    assert ood_metrics(same, same[:3])["fpr95_id"] == ood_metrics(same, same[:3])["fpr95_ood"] == 1
    assert (ood_metrics(same, same[:3])["ap_in"], ood_metrics(same, same[:3])["ap_out"]) == (0.7, 0.3)
    assert ood_metrics(same, same[:3])["aupr_out"] == 0.65  # what the trapezoid makes of precision 1 at recall 0


def test_infinite_scores_are_ordered():
    assert auroc(np.array([-np.inf, 0.0]), np.array([np.inf, np.inf])) == 1


@pytest.mark.parametrize("metric", [auroc, ood_metrics])
def test_bad_scores_are_named(metric):
    good, empty, nan = np.array([0.0, 1.0]), np.array([]), np.array([0.0, np.nan])
    for bad, reason in ((empty, "empty"), (nan, "1 NaN")):
        with pytest.raises(ValueError, match=f"id_scores.*{reason}"):
            metric(bad, good)
        with pytest.raises(ValueError, match=f"ood_scores.*{reason}"):
            metric(good, bad)
