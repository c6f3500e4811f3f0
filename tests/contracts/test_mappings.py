"""What every registered mapping must do, with its default options and with those that change what it learns."""

import inspect

import numpy as np
import pytest
import torch

from distill.mappings import FeatureMapping, load_mapping, orthogonality, restored
from featcache.plugins import plugin_names
from featcache.rows import Rows
from featcache.store.from_arrays import write_store

TEACHER = 8
OPTIONS = {"sne": [{"layer_norm": True}, {"start": "random"}, {"layer_norm": True, "start": "random"}]}
LENGTHS_COUNT = {"phi_s", "identity"}
DOES_NOT_LEARN = {"identity", "random_orthonormal"}
NAMES = plugin_names("distill.mappings")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(
    params=[(name, options) for name in NAMES for options in ({}, *OPTIONS.get(name, []))],
    ids=lambda case: "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())]),
)
def case(request):
    return request.param


@pytest.fixture
def build(case):
    """`build(dim)`, with few steps where there are steps."""
    name, options = case
    few = {"steps": 3, "batch_size": 32} if "steps" in inspect.signature(load_mapping(name)).parameters else {}
    return lambda dim: load_mapping(name)(dim, **few, **options)


@pytest.fixture
def dim(case):
    """A width that suits it."""
    return TEACHER if case[0] == "identity" else 4


@pytest.fixture
def store(tmp_path):
    rows = np.random.default_rng(0).normal(size=(30, 2, TEACHER))
    return write_store(tmp_path / "s.zarr", rows, failed={4: "truncated"})


@pytest.fixture
def rows():
    return np.random.default_rng(1).normal(size=(5, TEACHER)).astype(np.float16)


def test_is_a_mapping_whose_construction_only_stores_parameters(name):
    mapping_class = load_mapping(name)
    assert issubclass(mapping_class, FeatureMapping)
    parameters = inspect.signature(mapping_class).parameters
    assert vars(mapping_class(4)).keys() == parameters.keys()
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for key, p in parameters.items() if key != "dim")


def test_fit_returns_self_and_keeps_what_it_learned_in_trailing_underscores(build, store, dim):
    mapping = build(dim)
    before = vars(mapping).copy()
    assert mapping.fit(store) is mapping
    learned = vars(mapping).keys() - before.keys()
    assert learned
    assert all(name.endswith("_") for name in learned)
    assert before.items() <= vars(mapping).items()
    assert mapping.weight_.shape == (dim, TEACHER)
    assert mapping.weight_.dtype == np.float32
    assert all(type(value) is float for value in getattr(mapping, "report_", {}).values())


def test_rows_are_mapped_to_finite_rows_of_the_asked_width(case, build, store, rows):
    for dim in [TEACHER] if case[0] == "identity" else [1, 3, 4, TEACHER]:
        mapped = build(dim).fit(store).transform(rows)
        assert mapped.shape == (5, dim)
        assert mapped.dtype == np.float32
        assert np.isfinite(mapped).all()


def test_the_module_is_frozen_and_does_what_transform_does(build, store, rows, dim):
    mapping = build(dim).fit(store)
    module, expected = mapping.module(), mapping.transform(rows)
    assert list(module.parameters()) == []
    assert not any(buffer.requires_grad for buffer in module.buffers())
    np.testing.assert_allclose(module(torch.from_numpy(rows)), expected, atol=1e-5)
    np.testing.assert_allclose(module(torch.from_numpy(rows).float()), expected, atol=1e-5)


def test_the_module_maps_every_token(build, store, dim):
    tokens = np.random.default_rng(2).normal(size=(3, 7, TEACHER)).astype(np.float32)
    mapping = build(dim).fit(store)
    mapped = mapping.module()(torch.from_numpy(tokens))
    assert mapped.shape == (3, 7, dim)
    one_by_one = np.stack([mapping.transform(image) for image in tokens])
    np.testing.assert_allclose(mapped, one_by_one, atol=1e-5)


def test_the_modules_state_is_all_that_it_knows(build, store, rows, dim, tmp_path):
    module = build(dim).fit(store).module()
    other = write_store(tmp_path / "o.zarr", np.random.default_rng(2).normal(size=(30, TEACHER)))
    restored = build(dim).fit(other).module()
    restored.load_state_dict(module.state_dict())
    x = torch.from_numpy(rows)
    assert torch.equal(restored(x), module(x))


def test_loading_a_module_leaves_the_estimator_as_it_was(build, store, rows, dim):
    mapping = build(dim).fit(store)
    before = mapping.transform(rows)
    for buffer in mapping.module().buffers():
        buffer.zero_()
    np.testing.assert_array_equal(mapping.transform(rows), before)


def test_rows_do_not_see_each_other(build, store, rows, dim):
    mapping = build(dim).fit(store)
    alone = np.concatenate([mapping.transform(rows[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, mapping.transform(rows), atol=1e-5)


def test_a_rows_length_does_not_turn_it(case, build, store, rows, dim):
    mapping = build(dim).fit(store)
    once, longer = mapping.transform(rows), mapping.transform(8 * rows)
    if case[0] in LENGTHS_COUNT:
        assert not np.allclose(once, longer, atol=0.1)
    else:
        np.testing.assert_allclose(once, longer, atol=1e-4)


def test_a_zero_row_is_mapped_to_something_finite(build, store, dim):
    assert np.isfinite(build(dim).fit(store).transform(np.zeros((1, TEACHER), np.float16))).all()


def test_fitting_twice_gives_the_same(build, store, rows, dim):
    once = build(dim).fit(store).transform(rows)
    np.testing.assert_array_equal(build(dim).fit(store).fit(store).transform(rows), once)


def test_what_learns_is_fitted_to_the_store(case, build, store, rows, dim, tmp_path):
    other = write_store(tmp_path / "o.zarr", np.random.default_rng(2).normal(size=(30, TEACHER)))
    same = np.allclose(build(dim).fit(store).transform(rows), build(dim).fit(other).transform(rows))
    assert same == (case[0] in DOES_NOT_LEARN)


def angles(rows):
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("dim", [TEACHER + 1, 3 * TEACHER])
def test_more_dimensions_than_the_teacher_keep_every_angle(case, build, store, rows, dim):
    """At the origin; of `phi_s`, at the mean, as it does in the teacher's own dimensions."""
    mapping = build(dim).fit(store)
    mapped = mapping.transform(rows)
    assert mapped.shape == (5, dim)
    seen = build(TEACHER).fit(store).transform(rows) if case[0] == "phi_s" else rows
    np.testing.assert_allclose(angles(mapped), angles(seen), atol=1e-6)
    gram = mapping.weight_.astype(np.float64).T @ mapping.weight_
    np.testing.assert_allclose(gram / gram[0, 0], np.eye(TEACHER), atol=1e-5)
    assert np.linalg.matrix_rank(mapping.weight_) == TEACHER
    assert mapping.report_["lifted_from"] == TEACHER
    np.testing.assert_allclose(mapping.module()(torch.from_numpy(rows)), mapped, atol=1e-5)
    assert orthogonality(mapping.weight_)["deviation"] < 1e-5


def test_lifts_follow_the_seed(name, store, rows):
    one, again, other = (load_mapping(name)(TEACHER + 2, seed=seed).fit(store).transform(rows) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


@pytest.mark.parametrize("dim", [2, TEACHER, TEACHER + 3])
def test_a_restored_module_gives_the_same_bits(case, build, store, dim):
    """However few rows there are: a matrix in another order in memory would give others."""
    if case[0] == "identity" and dim < TEACHER:
        pytest.skip("needs a student as wide as its teacher")
    fresh = build(dim).fit(store).module()
    assert all(buffer.is_contiguous() for buffer in fresh.buffers())
    kept = {name: value.clone() for name, value in fresh.state_dict().items()}
    again = restored(build(dim), kept, TEACHER)
    if again is None:
        assert not kept  # nothing was learned
        return
    x = torch.randn(9, TEACHER, generator=torch.Generator().manual_seed(0))
    for count in (1, 2, 3, 9):
        assert torch.equal(again(x[:count]), fresh(x[:count]))


def test_no_dimensions_are_refused_by_name(build, store):
    with pytest.raises(ValueError, match=str(store.path)):
        build(0).fit(store)


class CountingRows(Rows):
    """Remembers how many rows were asked for at once."""

    def gather(self, positions, field="embedding", view=0):
        self.__dict__.setdefault("asked", []).append(len(positions))
        return super().gather(positions, field, view)


def test_fit_asks_for_few_rows_at_once_and_in_all(build, tmp_path, dim):
    """However long the store: no more than a block, and one pass and a batch a step (one more before and after)."""
    long = np.random.default_rng(0).normal(size=(30000, 2, TEACHER))
    source = CountingRows.of([write_store(tmp_path / "long.zarr", long)])
    source.asked = []
    build(dim).fit(source)
    assert max(source.asked, default=0) <= 8192
    assert sum(source.asked) <= 2 * 30000 + 4 * 32
