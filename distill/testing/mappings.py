"""What every mapping must be."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from jaxtyping import Float

from distill.mappings import FeatureMapping, load_mapping, orthogonality, restored
from featcache.rows import Rows
from featcache.store import FeatureStore
from featcache.store.from_arrays import write_store

TEACHER = 8
Case = tuple[str, Mapping[str, Any]]
"""A mapping's name, and its options."""
Build = Callable[[int], FeatureMapping]


class CountingRows(Rows):
    """Remembers how many rows were asked for at once."""

    def gather(self, positions: Any, field: str = "embedding", view: Any = 0) -> Float[np.ndarray, "n ..."]:
        self.__dict__.setdefault("asked", []).append(len(positions))
        return super().gather(positions, field, view)


def cosines(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return unit @ unit.T


class MappingContract:
    """Of the mapping `name` with `options`, with few steps where it has `steps`."""

    name: str
    options: ClassVar[Mapping[str, Any]] = {}

    narrowing: ClassVar[bool] = True
    """Whether it maps to fewer dimensions than the teacher's."""
    learns: ClassVar[bool] = True
    """Whether what it is depends on the store."""
    lengths_count: ClassVar[bool] = False
    """Whether a longer row is mapped elsewhere."""
    about_the_mean: ClassVar[bool] = False
    """Whether a lift keeps the angles that it sees from the mean, rather than from the origin."""

    @pytest.fixture
    def case(self) -> Case:
        return self.name, self.options

    @pytest.fixture
    def build(self, case: Case) -> Build:
        name, options = case
        made = load_mapping(name)
        few = {"steps": 3, "batch_size": 32} if "steps" in inspect.signature(made).parameters else {}
        return lambda dim: made(dim, **few, **options)  # type: ignore[call-arg]

    @property
    def dim(self) -> int:
        """A width that suits it."""
        return 4 if self.narrowing else TEACHER

    @pytest.fixture
    def store(self, tmp_path: Path) -> FeatureStore:
        rows = np.random.default_rng(0).normal(size=(30, 2, TEACHER))
        return write_store(tmp_path / "s.zarr", rows, failed={4: "truncated"})

    @pytest.fixture
    def other(self, tmp_path: Path) -> FeatureStore:
        return write_store(tmp_path / "o.zarr", np.random.default_rng(2).normal(size=(30, TEACHER)))

    @pytest.fixture
    def rows(self) -> Float[np.ndarray, "5 8"]:
        return np.random.default_rng(1).normal(size=(5, TEACHER)).astype(np.float16)

    def test_it_is_a_mapping_whose_construction_only_stores_parameters(self, case: Case) -> None:
        made = load_mapping(case[0])
        assert issubclass(made, FeatureMapping)
        parameters = inspect.signature(made).parameters
        assert vars(made(4)).keys() == parameters.keys()  # type: ignore[call-arg]
        options = [each for key, each in parameters.items() if key != "dim"]
        assert all(each.kind is each.KEYWORD_ONLY and each.default is not each.empty for each in options)

    def test_fit_returns_self_and_keeps_what_it_learned_in_trailing_underscores(
        self, build: Build, store: FeatureStore
    ) -> None:
        mapping = build(self.dim)
        before = vars(mapping).copy()
        assert mapping.fit(store) is mapping
        learned = vars(mapping).keys() - before.keys()
        assert learned
        assert all(name.endswith("_") for name in learned)
        assert before.items() <= vars(mapping).items()
        assert mapping.weight_.shape == (self.dim, TEACHER)
        assert mapping.weight_.dtype == np.float32
        assert all(type(value) is float for value in getattr(mapping, "report_", {}).values())

    def test_rows_are_mapped_to_finite_rows_of_the_asked_width(
        self, build: Build, store: FeatureStore, rows: np.ndarray
    ) -> None:
        for dim in [1, 3, 4, TEACHER] if self.narrowing else [TEACHER]:
            mapped = build(dim).fit(store).transform(rows)
            assert mapped.shape == (5, dim)
            assert mapped.dtype == np.float32
            assert np.isfinite(mapped).all()

    def test_the_module_is_frozen_and_does_what_transform_does(
        self, build: Build, store: FeatureStore, rows: np.ndarray
    ) -> None:
        mapping = build(self.dim).fit(store)
        module, expected = mapping.module(), mapping.transform(rows)
        assert list(module.parameters()) == []
        assert not any(buffer.requires_grad for buffer in module.buffers())
        np.testing.assert_allclose(module(torch.from_numpy(rows)), expected, atol=1e-5)
        np.testing.assert_allclose(module(torch.from_numpy(rows).float()), expected, atol=1e-5)

    def test_the_module_maps_every_token(self, build: Build, store: FeatureStore) -> None:
        tokens = np.random.default_rng(2).normal(size=(3, 7, TEACHER)).astype(np.float32)
        mapping = build(self.dim).fit(store)
        mapped = mapping.module()(torch.from_numpy(tokens))
        assert mapped.shape == (3, 7, self.dim)
        one_by_one = np.stack([mapping.transform(image) for image in tokens])
        np.testing.assert_allclose(mapped, one_by_one, atol=1e-5)

    def test_the_modules_state_is_all_that_it_knows(
        self, build: Build, store: FeatureStore, other: FeatureStore, rows: np.ndarray
    ) -> None:
        module = build(self.dim).fit(store).module()
        again = build(self.dim).fit(other).module()
        again.load_state_dict(module.state_dict())
        x = torch.from_numpy(rows)
        assert torch.equal(again(x), module(x))

    def test_loading_a_module_leaves_the_estimator_as_it_was(
        self, build: Build, store: FeatureStore, rows: np.ndarray
    ) -> None:
        mapping = build(self.dim).fit(store)
        before = mapping.transform(rows)
        for buffer in mapping.module().buffers():
            buffer.zero_()
        np.testing.assert_array_equal(mapping.transform(rows), before)

    def test_rows_do_not_see_each_other(self, build: Build, store: FeatureStore, rows: np.ndarray) -> None:
        mapping = build(self.dim).fit(store)
        alone = np.concatenate([mapping.transform(rows[i : i + 1]) for i in range(5)])
        np.testing.assert_allclose(alone, mapping.transform(rows), atol=1e-5)

    def test_a_rows_length_does_not_turn_it(self, build: Build, store: FeatureStore, rows: np.ndarray) -> None:
        mapping = build(self.dim).fit(store)
        once, longer = mapping.transform(rows), mapping.transform(8 * rows)
        if self.lengths_count:
            assert not np.allclose(once, longer, atol=0.1)
        else:
            np.testing.assert_allclose(once, longer, atol=1e-4)

    def test_a_zero_row_is_mapped_to_something_finite(self, build: Build, store: FeatureStore) -> None:
        assert np.isfinite(build(self.dim).fit(store).transform(np.zeros((1, TEACHER), np.float16))).all()

    def test_fitting_twice_gives_the_same(self, build: Build, store: FeatureStore, rows: np.ndarray) -> None:
        once = build(self.dim).fit(store).transform(rows)
        np.testing.assert_array_equal(build(self.dim).fit(store).fit(store).transform(rows), once)

    def test_what_learns_is_fitted_to_the_store(
        self, build: Build, store: FeatureStore, other: FeatureStore, rows: np.ndarray
    ) -> None:
        one, two = (build(self.dim).fit(each).transform(rows) for each in (store, other))
        assert np.allclose(one, two) != self.learns

    @pytest.mark.parametrize("dim", [TEACHER + 1, 3 * TEACHER])
    def test_more_dimensions_than_the_teacher_keep_every_angle(
        self, build: Build, store: FeatureStore, rows: np.ndarray, dim: int
    ) -> None:
        mapping = build(dim).fit(store)
        mapped = mapping.transform(rows)
        assert mapped.shape == (5, dim)
        seen = build(TEACHER).fit(store).transform(rows) if self.about_the_mean else rows
        np.testing.assert_allclose(cosines(mapped), cosines(seen), atol=1e-6)
        gram = mapping.weight_.astype(np.float64).T @ mapping.weight_
        np.testing.assert_allclose(gram / gram[0, 0], np.eye(TEACHER), atol=1e-5)
        assert np.linalg.matrix_rank(mapping.weight_) == TEACHER
        assert mapping.report_["lifted_from"] == TEACHER
        np.testing.assert_allclose(mapping.module()(torch.from_numpy(rows)), mapped, atol=1e-5)
        assert orthogonality(mapping.weight_)["deviation"] < 1e-5

    def test_lifts_follow_the_seed(self, case: Case, store: FeatureStore, rows: np.ndarray) -> None:
        made: Any = load_mapping(case[0])
        one, again, other = (made(TEACHER + 2, seed=seed).fit(store).transform(rows) for seed in (3, 3, 4))
        np.testing.assert_array_equal(one, again)
        assert not np.allclose(one, other)

    @pytest.mark.parametrize("dim", [2, TEACHER, TEACHER + 3])
    def test_a_restored_module_gives_the_same_bits(self, build: Build, store: FeatureStore, dim: int) -> None:
        """However few rows there are: a matrix in another order in memory would give others."""
        if dim < TEACHER and not self.narrowing:
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

    def test_no_dimensions_are_refused_by_name(self, build: Build, store: FeatureStore) -> None:
        with pytest.raises(ValueError, match=str(store.path)):
            build(0).fit(store)

    def test_fit_asks_for_few_rows_at_once_and_in_all(self, build: Build, tmp_path: Path) -> None:
        """However long the store: no more than a block, and one pass and a batch a step (one more before and after)."""
        long = np.random.default_rng(0).normal(size=(30000, 2, TEACHER))
        rows = CountingRows.of([write_store(tmp_path / "long.zarr", long)])
        asked: Sequence[int] = rows.__dict__.setdefault("asked", [])
        build(self.dim).fit(rows)
        assert max(asked, default=0) <= 8192
        assert sum(asked) <= 2 * 30000 + 4 * 32
