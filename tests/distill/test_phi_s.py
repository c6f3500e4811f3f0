import numpy as np
import pytest
import torch

from distill.mappings.phi_s import PhiS, _hadamard, _spread


@pytest.fixture
def embedding(rng):
    """(400, 12), correlated, dimensions of unequal variance, far from the origin."""
    return rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12)) * np.linspace(2, 0.2, 12) + 20


def stored(embedding: np.ndarray) -> np.ndarray:
    return embedding.astype(np.float16).astype(np.float64)


def test_at_full_width_it_is_the_papers_formula(make_store, embedding):
    phi = PhiS(12).fit(make_store("s", embedding))
    rows = stored(embedding)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    np.testing.assert_allclose(phi.mean_, rows.mean(0), rtol=1e-5)
    scale = 1 / np.sqrt(values.mean())
    np.testing.assert_allclose(phi.weight_ @ phi.weight_.T, scale**2 * np.eye(12), atol=1e-5)
    # Undoing the rotation by the eigenvectors leaves the Hadamard matrix, but for the eigenvectors' signs.
    np.testing.assert_allclose(np.abs(phi.weight_ @ vectors) / scale, np.full((12, 12), 12**-0.5), atol=1e-3)


@pytest.mark.parametrize("dim", [1, 2, 4, 8, 12])
def test_every_dimension_has_variance_one_and_mean_zero(make_store, embedding, dim):
    mapped = PhiS(dim).fit(make_store("s", embedding)).transform(stored(embedding)).astype(np.float64)
    np.testing.assert_allclose(mapped.var(axis=0, ddof=1), 1, rtol=1e-3)
    np.testing.assert_allclose(mapped.mean(axis=0), 0, atol=1e-4)


@pytest.mark.parametrize("dim", [3, 7, 9])
def test_where_there_is_no_hadamard_matrix_the_mean_variance_is_one(make_store, embedding, dim):
    mapped = PhiS(dim).fit(make_store("s", embedding)).transform(stored(embedding)).astype(np.float64)
    assert mapped.var(axis=0, ddof=1).mean() == pytest.approx(1, rel=1e-3)


def test_fewer_dimensions_are_the_strongest_principal_ones(make_store, embedding):
    phi, rows = PhiS(4).fit(make_store("s", embedding)), stored(embedding)
    centred = rows - rows.mean(0)
    vectors = np.linalg.svd(centred, full_matrices=False)[2][:4]
    kept = centred @ vectors.T
    mapped = phi.transform(rows).astype(np.float64)
    scale = (mapped**2).sum() / (kept**2).sum()
    np.testing.assert_allclose(mapped @ mapped.T, scale * kept @ kept.T, atol=5e-3)


def test_blocks_and_views_make_one_covariance(make_store, rng):
    """A mean that moves from block to block and from view to view, and rows far from the origin."""
    drift = 500 + np.arange(20000).reshape(10000, 2, 1) * np.array([0.01, 0.005, 0, -0.01])
    views = drift + rng.normal(size=(10000, 2, 4)) * [4, 2, 1, 8]
    phi = PhiS(4).fit(make_store("s", views, dtype="float16"))
    rows = stored(views).reshape(-1, 4)
    np.testing.assert_allclose(phi.mean_, rows.mean(0), rtol=1e-6)
    expected = np.linalg.eigvalsh(np.cov(rows.T)).mean()
    assert 1 / np.linalg.norm(phi.weight_[0]) ** 2 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 64, 160, 192, 384])
def test_hadamard(size):
    matrix = _hadamard(size)
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size))


@pytest.mark.parametrize("size", [768, 1024, 1152, 1280, 1408, 1536, 2048])
def test_the_usual_widths_have_a_hadamard_matrix(size):
    assert _hadamard(size) is not None


@pytest.mark.parametrize("size", [3, 5, 6, 10, 36, 100])
def test_every_size_has_an_orthonormal_matrix(size):
    np.testing.assert_allclose(_spread(size) @ _spread(size).T, np.eye(size), atol=1e-12)


def test_rows_that_are_all_alike_are_refused(make_store):
    with pytest.raises(ValueError, match=r"s\.zarr: all rows are alike"):
        PhiS(2).fit(make_store("s", np.ones((5, 4))))


def test_it_is_about_embeddings_as_they_are_stored(make_store, embedding):
    phi = PhiS(8).fit(make_store("s", embedding))
    origin = phi.transform(np.zeros((1, 12)))
    once, twice = (phi.transform(scale * stored(embedding)[:5]) - origin for scale in (1, 2))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-3, atol=1e-3)
    assert isinstance(phi.module().get_buffer("mean"), torch.Tensor)
