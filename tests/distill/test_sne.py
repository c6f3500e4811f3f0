import math

import numpy as np
import pytest

from distill.mappings.sne import Sne
from distill.mappings.spectral import Spectral
from distill.objectives import TEMPERATURES


def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Directions of unequal strength about a common one, as embeddings have."""
    return 2 * np.eye(12)[0] + rng.normal(size=(rows, 12)) * np.linspace(1, 0.1, 12)


@pytest.fixture
def sne_loss(slow_relation_kl):
    """`sne_loss(mapping, rows)`: the paper's loss of the mapped rows, by loops, in float64."""

    def loss(mapping, rows: np.ndarray) -> float:
        rows = rows.astype(np.float16).astype(np.float64)
        teacher, student = (
            x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, mapping.transform(rows).astype(np.float64))
        )
        return slow_relation_kl(teacher @ teacher.T, student @ student.T, TEMPERATURES, True, True)

    return loss


def test_learning_beats_the_spectral_start_on_held_out_rows(make_store, rng, sne_loss):
    store = make_store("s", draw(rng, 200))
    held = draw(rng, 40)
    start = sne_loss(Spectral(4).fit(store), held)
    assert sne_loss(Sne(4, steps=40, batch_size=64, lr=1e-2).fit(store), held) < 0.9 * start


def test_report_says_the_loss_before_and_after(make_store, rng, sne_loss):
    """In a store smaller than the batch, the held-aside batch is every row."""
    rows = draw(rng, 40)
    store = make_store("s", rows, per_chunk=16)
    sne = Sne(4, steps=10, lr=1e-2).fit(store)
    assert sne.report_["sne_start"] == pytest.approx(sne_loss(Spectral(4).fit(store), rows), rel=1e-3)
    assert sne.report_["sne"] == pytest.approx(sne_loss(sne, rows), rel=1e-3)
    assert sne.report_["sne"] < sne.report_["sne_start"]


def test_report_says_how_far_from_orthogonal(make_store, rng):
    sne = Sne(4, steps=20, batch_size=32, lr=1e-2).fit(make_store("s", draw(rng, 100)))
    weight = sne.weight_.astype(np.float64)
    singular = np.linalg.svd(weight, compute_uv=False)
    assert sne.report_["singular_min"] == pytest.approx(singular.min(), rel=1e-6)
    assert sne.report_["singular_max"] == pytest.approx(singular.max(), rel=1e-6)
    squares = singular**2
    expected = math.sqrt(((squares / squares.mean() - 1) ** 2).sum()) / math.sqrt(4)
    assert sne.report_["deviation"] == pytest.approx(expected, rel=1e-6)
    assert set(sne.report_) == {"sne_start", "sne", "singular_min", "singular_max", "deviation"}


def test_same_seed_same_weights(make_store, rng):
    store = make_store("s", rng.normal(size=(80, 2, 12)))

    def weight(seed: int) -> np.ndarray:
        return Sne(4, steps=5, batch_size=16, seed=seed).fit(store).weight_

    np.testing.assert_array_equal(weight(3), weight(3))
    assert np.abs(weight(3) - weight(4)).max() > 1e-6


def test_no_steps_is_the_spectral_mapping(make_store, rng):
    store = make_store("s", draw(rng, 30))
    np.testing.assert_array_equal(Sne(4, steps=0).fit(store).weight_, Spectral(4).fit(store).weight_)


def test_a_random_start_is_worse_and_its_seed_counts(make_store, rng, sne_loss):
    store, held = make_store("s", draw(rng, 200)), draw(rng, 25)

    def start(seed: int) -> Sne:
        return Sne(4, start="random", steps=0, seed=seed).fit(store)

    np.testing.assert_array_equal(start(1).weight_, start(1).weight_)
    assert np.abs(start(1).weight_ - start(2).weight_).max() > 1e-3
    assert np.abs(start(1).weight_).max() <= 12**-0.5
    assert sne_loss(start(1), held) > 1.2 * sne_loss(Spectral(4).fit(store), held)
    trained = Sne(4, start="random", steps=40, batch_size=64, lr=1e-2).fit(store)
    assert sne_loss(trained, held) < sne_loss(start(0), held)


def test_another_start_is_refused(make_store, rng):
    with pytest.raises(ValueError, match="unknown start 'pca' of the sne mapping; known: spectral, random"):
        Sne(4, start="pca").fit(make_store("s", draw(rng, 5)))


def layer_normalised(rows: np.ndarray) -> np.ndarray:
    """LayerNorm without learned parameters, of what a store holds of the rows."""
    rows = rows.astype(np.float16).astype(np.float64)
    return (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-5)


def test_layer_norm_starts_from_the_spectrum_of_normalised_rows(make_store, rng):
    rows = draw(rng, 100)
    sne = Sne(3, layer_norm=True, steps=0).fit(make_store("s", rows))
    vectors = np.linalg.svd(layer_normalised(rows), full_matrices=False)[2][:3]
    np.testing.assert_allclose(np.abs(sne.weight_ @ vectors.T), np.eye(3), atol=1e-4)
    np.testing.assert_array_equal(sne.bias_, np.zeros(3))
    np.testing.assert_allclose(
        sne.transform(rows.astype(np.float16)), layer_normalised(rows) @ sne.weight_.T, atol=1e-4
    )


def test_layer_norm_learns_a_bias_and_a_scale(make_store, rng, sne_loss):
    store, held = make_store("s", draw(rng, 200)), draw(rng, 25)
    start = Sne(4, layer_norm=True, steps=0).fit(store)
    trained = Sne(4, layer_norm=True, steps=40, batch_size=64, lr=1e-2).fit(store)
    assert sne_loss(trained, held) < 0.9 * sne_loss(start, held)
    assert np.abs(trained.bias_).max() > 1e-3
    expected = layer_normalised(held) @ trained.weight_.T + trained.bias_
    np.testing.assert_allclose(trained.transform(held.astype(np.float16)), expected, atol=1e-4)
    # In a store smaller than the batch, the reported loss is of every row: the folded map is the trained head.
    few = draw(rng, 30)
    trained = Sne(4, layer_norm=True, steps=10, lr=1e-2).fit(make_store("few", few))
    assert trained.report_["sne"] == pytest.approx(sne_loss(trained, few), rel=1e-3)


def test_progress_counts_the_steps(make_store, rng):
    seen = []
    Sne(2, steps=3).fit(make_store("s", draw(rng, 8)), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_duplicates_leave_it_finite(make_store, rng):
    sne = Sne(3, steps=20, lr=1e-2).fit(make_store("s", np.repeat(draw(rng, 4), 6, axis=0)))
    assert np.isfinite(sne.weight_).all()
    assert all(math.isfinite(value) for value in sne.report_.values())


def test_failed_rows_are_left_out(make_store, rng):
    rows = draw(rng, 30)
    with_failed = np.concatenate([np.full((5, 12), 1000.0), rows])
    store = make_store("failed", with_failed, failed=dict.fromkeys(range(5), "truncated"))
    expected = Sne(3, steps=3, batch_size=16).fit(make_store("kept", rows)).weight_
    np.testing.assert_allclose(Sne(3, steps=3, batch_size=16).fit(store).weight_, expected, atol=1e-5)


def test_fewer_than_two_rows_are_refused(make_store, rng):
    store = make_store("s", draw(rng, 3), failed={0: "truncated", 2: "truncated"})
    with pytest.raises(ValueError, match=r"1 rows with features; a mapping needs two or more"):
        Sne(3).fit(store)
