"""Banks that hold rows many times over: detectors that look at neighbours or covariances."""

import numpy as np
import pytest
from sklearn.neighbors import LocalOutlierFactor

from evalsuite import ood
from evalsuite.detectors import build
from evalsuite.metrics import auroc
from featcache.rows import Rows


@pytest.fixture
def task(rng, clusters):
    centres = 2 * rng.normal(size=(4, 16))
    train, test = clusters(centres, 30, spread=1.0), clusters(centres, 20, spread=1.0)
    return [x.astype(np.float32) for x in (train, test, 2.2 * rng.normal(size=(80, 16)))]


def scikit_learns(k, bank, rows):
    bank, rows = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, rows))
    return -LocalOutlierFactor(n_neighbors=k, novelty=True).fit(bank).score_samples(rows)


def quality(detector, bank, task):
    fitted = build(detector).fit(Rows.from_arrays(bank, name="train"))
    scores = [fitted.score(x) for x in task[1:]]
    assert np.isfinite(scores[0]).all()
    assert np.isfinite(scores[1]).all()
    return auroc(*scores)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_lof_with_few_duplicates_is_scikit_learns(task, copies):
    train, test, far = task
    bank = np.repeat(train, copies, axis=0)
    lof = build("lof").fit(Rows.from_arrays(bank))
    for rows in (test, far):
        np.testing.assert_allclose(lof.score(rows), scikit_learns(20, bank, rows), rtol=1e-4)


@pytest.mark.parametrize("copies", [21, 22, 60])
def test_lof_with_more_than_k_duplicates_is_scikit_learns_of_the_distinct_rows(task, copies):
    """Of the bank as it is, scikit-learn's has infinite densities."""
    train, test, far = task
    bank = np.repeat(train, copies, axis=0)
    lof = build("lof").fit(Rows.from_arrays(bank[np.random.default_rng(1).permutation(len(bank))]))
    for rows in (test, far):
        np.testing.assert_allclose(lof.score(rows), scikit_learns(20, train, rows), rtol=1e-4)


@pytest.mark.parametrize(
    "made",
    [
        lambda x: np.concatenate([x, np.repeat(x[:1], 50, axis=0)]),
        lambda x: np.concatenate([x, np.repeat(x[:30], 21, axis=0)]),
        lambda x: np.concatenate([x, x[:1] * np.linspace(0.2, 3, 40, dtype=np.float32)[:, None]]),  # one direction
        lambda x: np.repeat(x, 21, axis=0) * np.tile(np.linspace(0.5, 2, 21, dtype=np.float32), len(x))[:, None],
        lambda x: np.concatenate([x, np.zeros((40, 16), np.float32)]),
    ],
)
def test_lof_stays_as_good_as_on_the_bank_without_duplicates(task, made):
    plain = quality("lof", task[0], task)
    assert plain > 0.95
    assert quality("lof", made(task[0]), task) > plain - 0.02
    assert quality("lof", made(task[0]), task) > quality("knn:k=20", made(task[0]), task) - 0.03


def test_lof_of_fewer_distinct_rows_than_k_takes_all_of_them(task):
    lof = build("lof").fit(Rows.from_arrays(np.repeat(task[0][:6], 30, axis=0)))
    np.testing.assert_allclose(lof.score(task[1]), scikit_learns(5, task[0][:6], task[1]), rtol=1e-4)
    with pytest.raises(ValueError, match="all rows of train are at one place"):
        build("lof").fit(Rows.from_arrays(np.ones((30, 4), np.float32), name="train"))


@pytest.mark.parametrize(
    "spec", ["knn:k=20", "knn:k=20,mean=true", "mahalanobis", "rmd", "ssd", "gmm", "cosine_mean", "residual"]
)
def test_every_row_many_times_over_changes_little(task, spec):
    """Means and covariances are the same; of neighbours, the nearest are repeated."""
    labels = np.repeat(np.arange(4), 30)
    scores = []
    for copies in (1, 30):
        bank = Rows.from_arrays(np.repeat(task[0], copies, axis=0), np.repeat(labels, copies))
        detector = build(spec).fit(bank)
        scores.append(auroc(detector.score(task[1]), detector.score(task[2])))
    assert scores[1] == pytest.approx(scores[0], abs=0.03)


def test_a_bank_of_few_rows_many_times_over_is_remarked_on(task, make_store):
    """It has more rows than dimensions, but hardly any that differ."""
    few, many = (np.repeat(task[0][::step], 20, axis=0) for step in (10, 5))
    test, far = make_store("test", task[1]), make_store("far", task[2])
    for name, bank, expected in (("few", few, 12), ("many", many, 24)):
        labels = np.repeat(np.arange(4), len(bank) // 4)
        train = make_store(name, bank, labels=labels)
        remarks = ood(id_train=train, id_test=test, far={"far": far}, detectors=["mahalanobis"], resamples=5).remarks
        said = [f"id_train {train.path}: only {expected} of {len(bank)} rows differ, no more than the 16 dimensions: "]
        assert [remark.partition("covariances")[0] for remark in remarks if "differ" in remark] == said[: expected < 17]


def test_gmm_warns_where_a_class_has_no_more_rows_than_dimensions(task):
    bank = Rows.from_arrays(task[0][::3], np.repeat(np.arange(4), 10), name="train")
    with pytest.warns(
        RuntimeWarning, match=r"train: 4 of 4 classes have no more rows than the 16 .*gmm:covariance=tied"
    ):
        scores = build("gmm").fit(bank).score(task[1])
    assert np.isfinite(scores).all()
