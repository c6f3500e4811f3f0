"""What every registered mapping must do."""

import inspect

import numpy as np
import pytest

from featcache.plugins import load_plugin, plugin_names
from featcache.store import write_store


@pytest.fixture(params=plugin_names("distill.mappings"))
def mapping_class(request):
    """The one class of the file."""
    module = load_plugin("distill.mappings", request.param)
    (found,) = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return found


@pytest.fixture
def build(mapping_class):
    """`build(dim)`, with few steps where there are steps."""
    few = {"steps": 3} if "steps" in inspect.signature(mapping_class).parameters else {}
    return lambda dim: mapping_class(dim, **few)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "s.zarr", np.random.default_rng(0).normal(size=(30, 2, 8)), failed={4: "truncated"})


@pytest.fixture
def rows():
    return np.random.default_rng(1).normal(size=(5, 8)).astype(np.float16)


def test_construction_only_stores_parameters(mapping_class):
    assert vars(mapping_class(4)).keys() == inspect.signature(mapping_class).parameters.keys()


def test_fit_returns_self_and_keeps_what_it_learned_in_trailing_underscores(build, store):
    mapping = build(4)
    before = vars(mapping).copy()
    assert mapping.fit(store) is mapping
    learned = vars(mapping).keys() - before.keys()
    assert learned
    assert all(name.endswith("_") for name in learned)
    assert before.items() <= vars(mapping).items()


def test_rows_are_mapped_to_finite_rows_of_the_asked_width(build, store, rows):
    for dim in (1, 4, 8):
        mapped = build(dim).fit(store).transform(rows)
        assert mapped.shape == (5, dim)
        assert np.isfinite(mapped).all()


def test_the_mapped_direction_is_of_the_row_alone(build, store, rows):
    """Neither the other rows of the batch nor a row's length turn it."""
    mapping = build(4).fit(store)
    together = mapping.transform(rows)
    alone = np.concatenate([mapping.transform(8 * rows[i : i + 1]) for i in range(5)])
    cosine = (together * alone).sum(1) / np.linalg.norm(together, axis=1) / np.linalg.norm(alone, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-5)


def test_a_zero_row_is_mapped_to_something_finite(build, store):
    assert np.isfinite(build(4).fit(store).transform(np.zeros((1, 8), np.float16))).all()


def test_fitting_twice_gives_the_same(build, store, rows):
    once = build(4).fit(store).transform(rows)
    np.testing.assert_array_equal(build(4).fit(store).fit(store).transform(rows), once)


def test_the_mapping_is_fitted_to_the_store(build, store, rows, tmp_path):
    other = write_store(tmp_path / "o.zarr", np.random.default_rng(2).normal(size=(30, 8)))
    assert not np.allclose(build(4).fit(store).transform(rows), build(4).fit(other).transform(rows))


def test_too_many_dimensions_are_refused_by_name(build, store):
    with pytest.raises(ValueError, match=str(store.path)):
        build(9).fit(store)
