"""The mappings that learn no neighbourhoods: `identity`, `random_orthonormal`; and `orthogonal`, held to a manifold."""

import numpy as np
import pytest

from distill.mappings.identity import Identity
from distill.mappings.orthogonal import Orthogonal
from distill.mappings.random_orthonormal import RandomOrthonormal
from distill.mappings.spectral import Spectral


def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Directions of unequal strength about a common one, as embeddings have."""
    return 2 * np.eye(12)[0] + rng.normal(size=(rows, 12)) * np.linspace(1, 0.1, 12)


def test_identity_gives_back_what_is_stored(make_store, rng):
    store = make_store("s", draw(rng, 20))
    rows = store.gather(range(20))
    identity = Identity(12).fit(store)
    np.testing.assert_array_equal(identity.transform(rows), rows.astype(np.float32))
    np.testing.assert_array_equal(identity.weight_, np.eye(12))


def test_identity_between_different_widths_is_refused(make_store, rng):
    with pytest.raises(
        ValueError, match="have 12 dimensions, the student 6; the identity mapping needs a student of 12"
    ):
        Identity(6).fit(make_store("s", draw(rng, 20)))


def test_random_orthonormal_is_orthonormal_and_drawn_from_its_seed(make_store, rng):
    store = make_store("s", draw(rng, 20))
    weight = RandomOrthonormal(5).fit(store).weight_
    np.testing.assert_allclose(weight @ weight.T, np.eye(5), atol=1e-6)
    np.testing.assert_array_equal(RandomOrthonormal(5).fit(store).weight_, weight)
    assert np.abs(RandomOrthonormal(5, seed=1).fit(store).weight_ - weight).max() > 0.1


def test_random_orthonormal_prefers_no_direction(make_store, rng):
    store = make_store("s", draw(rng, 20))
    projections = [RandomOrthonormal(3, seed=seed).fit(store).weight_ for seed in range(600)]
    assert np.abs(np.mean(projections, axis=0)).max() < 0.06
    np.testing.assert_allclose(np.mean([w.T @ w for w in projections], axis=0), np.eye(12) * 3 / 12, atol=0.06)


def test_orthogonal_stays_orthonormal_and_learns(make_store, rng):
    """Every batch is the whole store, so the loss that is reported is the one that was lowered."""
    store = make_store("s", draw(rng, 100))
    mapping = Orthogonal(4, steps=60, batch_size=100, lr=1e-2).fit(store)
    weight = mapping.weight_.astype(np.float64)
    assert np.linalg.norm(weight @ weight.T - np.eye(4)) < 1e-5
    assert mapping.report_["deviation"] < 1e-5
    assert mapping.report_["sne"] < 0.95 * mapping.report_["sne_start"]


def test_orthogonal_without_steps_is_spectral(make_store, rng):
    store = make_store("s", draw(rng, 30))
    expected = Spectral(4).fit(store).weight_
    np.testing.assert_allclose(Orthogonal(4, steps=0).fit(store).weight_, expected, atol=1e-6)


def test_orthogonal_reports_progress_and_needs_two_rows(make_store, rng):
    seen = []
    Orthogonal(2, steps=3).fit(make_store("s", draw(rng, 8)), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match=r"1 rows with features; a mapping needs two or more"):
        Orthogonal(2).fit(make_store("one", draw(rng, 1)))
