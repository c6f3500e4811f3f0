"""Small stores and arrays shared by the evaluators' tests."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hashed import with_images

import featcache.store.from_arrays
from featcache.store import FeatureStore
from featcache.store.from_arrays import write_store


@pytest.fixture
def make_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FeatureStore]:
    """`make_store(name, embedding, ...)` writes a sealed store under the test's own folder; `images`, a name for each row,
    gives rows the hashes of images that extraction would have found. Values that are not finite, which `write_store`
    refuses, are as a store from before it did holds them."""

    def make(name: str, embedding: np.ndarray, images: Iterable[object] | None = None, **given: object) -> FeatureStore:
        with monkeypatch.context() as lenient:
            if not all(np.isfinite(values).all() for values in (embedding, given.get("logits", 0))):
                lenient.setattr(featcache.store.from_arrays, "fitting_dtype", lambda *_: "float16")
            store = write_store(tmp_path / f"{name}.zarr", embedding, **given)
        return store if images is None else with_images(store, images)

    return make


@pytest.fixture
def float64() -> Iterator[None]:
    """pytorch-ood keeps means and covariances in the default precision: in float32 near ties would flip."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def clusters(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """`clusters(centres, rows)`: `rows` points around each centre, class by class, (classes × rows, d)."""

    def draw(centres: np.ndarray, rows: int, spread: float = 0.3) -> np.ndarray:
        return np.concatenate([c + spread * rng.normal(size=(rows, centres.shape[1])) for c in centres])

    return draw
