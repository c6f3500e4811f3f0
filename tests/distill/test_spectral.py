import numpy as np
import pytest

from distill.mappings.spectral import Spectral
from featcache.geometry import unit


@pytest.fixture
def embedding(rng):
    """(300, 10), directions of unequal strength, rows of unequal length."""
    return rng.normal(size=(300, 10)) * np.linspace(3, 0.3, 10) * rng.uniform(0.2, 5, size=(300, 1))


def svd(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and right singular vectors of the unit rows of what the store holds."""
    rows = stored.astype(np.float16).astype(np.float64)
    return np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True), full_matrices=False)[1:]


def test_weight_holds_the_top_right_singular_vectors(make_store, embedding):
    weight = Spectral(4).fit(make_store("s", embedding)).weight_
    assert weight.shape == (4, 10)
    assert weight.dtype == np.float32
    agreement = weight @ svd(embedding)[1][:4].T
    np.testing.assert_allclose(np.abs(agreement), np.eye(4), atol=1e-4)
    np.testing.assert_allclose(weight @ weight.T, np.eye(4), atol=1e-5)


def test_at_full_width_every_cosine_is_kept(make_store, embedding):
    mapped = Spectral(10).fit(make_store("s", embedding)).transform(embedding)
    rows = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(mapped @ mapped.T, rows @ rows.T, atol=1e-5)


def test_no_linear_map_leaves_a_closer_gram_matrix(make_store, embedding, rng):
    mapped = Spectral(4).fit(make_store("s", embedding)).transform(embedding.astype(np.float16))
    rows = unit(embedding.astype(np.float16)).astype(np.float64)
    error = np.linalg.norm(mapped @ mapped.T - rows @ rows.T)
    eckart_young = np.sqrt((svd(embedding)[0][4:] ** 4).sum())
    assert error == pytest.approx(eckart_young, rel=1e-4)
    for _ in range(20):
        random = rows @ np.linalg.qr(rng.normal(size=(10, 4)))[0]
        assert np.linalg.norm(random @ random.T - rows @ rows.T) > 1.05 * error


def test_every_view_counts_and_chunks_do_not(make_store, rng):
    """Views lie in different planes, so leaving one out would show; more rows than one block."""
    views = np.zeros((9000, 2, 6))
    views[:, 0, :3] = rng.normal(size=(9000, 3)) * [3, 1, 0.1]
    views[:, 1, 3:] = rng.normal(size=(9000, 3)) * [2, 1.5, 0.1]
    many = Spectral(3).fit(make_store("many", views, per_chunk=1024))
    one = Spectral(3).fit(make_store("one", views, per_chunk=9000))
    np.testing.assert_array_equal(many.weight_, one.weight_)
    vectors = svd(views.reshape(-1, 6))[1][:3]
    np.testing.assert_allclose(np.abs(many.weight_ @ vectors.T), np.eye(3), atol=1e-3)


def test_failed_rows_are_left_out(make_store, embedding):
    with_failed = embedding.copy()
    with_failed[::3] = 1000 * np.eye(10)[9]
    failed = dict.fromkeys(range(0, 300, 3), "truncated")
    weight = Spectral(3).fit(make_store("failed", with_failed, failed=failed)).weight_
    kept = np.delete(embedding, range(0, 300, 3), axis=0)
    np.testing.assert_allclose(weight, Spectral(3).fit(make_store("kept", kept)).weight_, atol=1e-6)


def test_lengths_do_not_count(make_store, embedding, rng):
    powers = 2.0 ** rng.integers(-3, 4, size=(300, 1))  # exact in float16
    weight = Spectral(3).fit(make_store("a", embedding)).weight_
    np.testing.assert_allclose(Spectral(3).fit(make_store("b", powers * embedding)).weight_, weight, atol=1e-3)


def test_float16_rows_are_scaled_in_float32(rng):
    rows = rng.normal(size=(5, 40)).astype(np.float16) * np.float16(200)  # squares overflow float16
    rows[2] = 0
    scaled = unit(rows)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), [1, 1, 0, 1, 1], rtol=1e-6)


def test_progress_counts_the_rows_of_every_view(make_store, rng):
    seen = []
    store = make_store("s", rng.normal(size=(9000, 2, 4)), failed={0: "truncated"})
    Spectral(2).fit(store, lambda done, total: seen.append((done, total)))
    assert seen == [(8192, 17998), (8999, 17998), (17191, 17998), (17998, 17998)]
