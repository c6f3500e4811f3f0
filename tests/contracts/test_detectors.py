"""What every registered OOD detector must do."""

import numpy as np
import pytest

from evalsuite.detectors import arguments_of, build, load, names, parameters
from featcache.head import Head
from featcache.rows import Rows


@pytest.fixture(params=names())
def name(request):
    return request.param


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """For the detectors that need them, files of text embeddings: one for each cluster, and words for none."""
    folder = tmp_path_factory.mktemp("texts")
    arrays = {"text": np.eye(4, 8), "negatives": np.roll(np.tile(np.eye(4, 8), (25, 1)), 4, axis=1)}
    arrays["negatives"] += 0.1 * np.random.default_rng(1).random((100, 8))
    for argument, array in arrays.items():
        np.save(folder / f"{argument}.npy", array)
    return {argument: str(folder / f"{argument}.npy") for argument in arrays}


@pytest.fixture
def make(name, texts):
    """An unfitted detector."""
    return lambda: build(name, **{argument: texts[argument] for argument in arguments_of(name) if argument in texts})


# It knows the four clusters.
HEAD = Head(3 * np.eye(4, 8), np.full(4, -0.1), np.arange(4))


def bank_of(embedding, labels):
    return Rows.from_arrays(embedding, labels, head=HEAD)


def score(detector, embedding):
    fields = {"embedding": embedding, "logits": HEAD.logits(embedding).astype(np.float32)}
    return detector.score(*(fields[field] for field in detector.needs))


@pytest.fixture
def data():
    """Labelled ID rows in four clusters of 40, held-out ID rows, and a far cluster in another direction: none of
    them negative, as some detectors need."""
    rng = np.random.default_rng(0)
    centres = 4 * np.eye(4, 8)

    def near(centres, rows):
        return np.abs(np.concatenate([c + 0.5 * rng.normal(size=(rows, 8)) for c in centres])).astype(np.float32)

    return (
        bank_of(near(centres, 40), np.repeat(np.arange(4), 40)),
        near(centres, 6),
        near(5 * np.eye(1, 8, 7), 5),
    )


def test_it_needs_fields_that_stores_can_have(name):
    assert set(load(name).needs) <= {"embedding", "logits"}


def test_construction_only_stores_parameters(name):
    detector = build(name)
    assert vars(detector) == parameters(detector)


def test_fit_returns_self_and_keeps_what_it_learned_in_trailing_underscores(make, data):
    detector = make()
    assert detector.fit(data[0]) is detector
    learned = vars(detector).keys() - parameters(detector).keys()
    assert all(attribute.endswith("_") or attribute.startswith("_") for attribute in learned)


def test_scores_are_one_finite_float_a_row(make, data):
    bank, id_rows, _ = data
    scores = score(make().fit(bank), id_rows)
    assert scores.shape == (len(id_rows),)
    assert np.issubdtype(scores.dtype, np.floating)
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 1


def test_far_rows_score_higher_than_id_rows(make, data):
    bank, id_rows, far_rows = data
    detector = make().fit(bank)
    assert score(detector, far_rows).min() > score(detector, id_rows).max()


def test_a_row_scores_the_same_in_any_batch(make, data):
    bank, id_rows, far_rows = data
    detector = make().fit(bank)
    rows = np.concatenate([id_rows, far_rows])
    batches = np.concatenate([score(detector, rows[:11]), score(detector, rows[11:])])
    np.testing.assert_allclose(batches, score(detector, rows), rtol=1e-6)


def test_fitting_again_forgets(make, data):
    bank, id_rows, far_rows = data
    detector = make().fit(bank_of(np.tile(far_rows, (32, 1)), np.repeat(np.arange(4), 40)))
    again = score(detector.fit(bank), id_rows)
    np.testing.assert_array_equal(again, score(make().fit(bank), id_rows))


def test_a_zero_row_has_a_finite_score(make, data):
    assert np.isfinite(score(make().fit(data[0]), np.zeros((1, 8), dtype=np.float32))).all()
