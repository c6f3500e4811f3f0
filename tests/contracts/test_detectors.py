"""What every registered OOD detector must do."""

import numpy as np
import pytest

from evalsuite.detectors import build, load, names, parameters
from evalsuite.rows import Rows


@pytest.fixture(params=names())
def name(request):
    return request.param


@pytest.fixture
def data():
    """Labelled ID rows in four clusters of 40, held-out ID rows, and a far cluster in another direction."""
    rng = np.random.default_rng(0)
    centres = 4 * np.eye(4, 8)

    def near(centres, rows):
        return np.concatenate([c + 0.5 * rng.normal(size=(rows, 8)) for c in centres]).astype(np.float32)

    return (
        Rows.from_arrays(near(centres, 40), np.repeat(np.arange(4), 40)),
        near(centres, 6),
        near(-12 * np.eye(1, 8, 7), 5),
    )


def test_construction_only_stores_parameters(name):
    detector = build(name)
    assert vars(detector) == parameters(detector)


def test_fit_returns_self_and_keeps_what_it_learned_in_trailing_underscores(name, data):
    detector = build(name)
    assert detector.fit(data[0]) is detector
    learned = vars(detector).keys() - parameters(detector).keys()
    assert all(attribute.endswith("_") or attribute.startswith("_") for attribute in learned)


def test_scores_are_one_finite_float_a_row(name, data):
    bank, id_rows, _ = data
    scores = build(name).fit(bank).score(id_rows)
    assert scores.shape == (len(id_rows),)
    assert np.issubdtype(scores.dtype, np.floating)
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 1


def test_far_rows_score_higher_than_id_rows(name, data):
    bank, id_rows, far_rows = data
    detector = build(name).fit(bank)
    assert detector.score(far_rows).min() > detector.score(id_rows).max()


def test_a_row_scores_the_same_in_any_batch(name, data):
    bank, id_rows, far_rows = data
    detector = build(name).fit(bank)
    rows = np.concatenate([id_rows, far_rows])
    batches = np.concatenate([detector.score(rows[:11]), detector.score(rows[11:])])
    np.testing.assert_allclose(batches, detector.score(rows), rtol=1e-6)


def test_fitting_again_forgets(name, data):
    bank, id_rows, far_rows = data
    detector = build(name).fit(Rows.from_arrays(np.tile(far_rows, (32, 1)), np.repeat(np.arange(4), 40)))
    again = detector.fit(bank).score(id_rows)
    np.testing.assert_array_equal(again, load(name)().fit(bank).score(id_rows))


def test_a_zero_row_has_a_finite_score(name, data):
    assert np.isfinite(build(name).fit(data[0]).score(np.zeros((1, 8), dtype=np.float32))).all()
