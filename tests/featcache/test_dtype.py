"""Features in float16 or float32: what decides, and that everything that reads a store follows."""

import json
import logging

import numpy as np
import pytest
import torch
from tiny import tiny_encoder

from featcache.extraction.extract import extract
from featcache.rows import Rows
from featcache.store import open_store
from featcache.store.rounding import Rounding

EXACT = {"device": "cpu", "precision": "fp32"}


def far_encoder(offset: float = 1000.0, scale: float = 0.1):
    """Its embeddings are those of the tiny one, times `scale`, plus `offset`."""
    encoder = tiny_encoder()
    inner = encoder.module.forward

    def forward(images):
        features = inner(images)
        return features | {"embedding": features["embedding"] * scale + offset}

    encoder.module.forward = forward
    encoder.name, encoder.output = "far", f"mean pool times {scale} plus {offset}"
    return encoder


def test_float32_keeps_what_float16_rounds_away(make_images, tmp_path):
    images = make_images(5)
    near = extract(images, tiny_encoder(), tmp_path / "near.zarr", **EXACT)
    wide = extract(images, far_encoder(), tmp_path / "wide.zarr", dtype="float32", **EXACT)
    assert near.gather([0]).dtype == np.float16
    assert wide.gather([0]).dtype == np.float32
    np.testing.assert_allclose((wide.gather(range(5)) - 1000) * 10, near.gather(range(5)), atol=2e-3)
    np.testing.assert_array_equal(wide.gather_portable([3, 0, 3]), wide.gather([3, 0, 3]))
    assert wide.verify() == []
    rows = Rows.of(wide).take(np.arange(5))
    np.testing.assert_array_equal(rows, wide.gather(range(5)))
    assert Rows.of(wide).gather([1, 4]).dtype == np.float32
    np.testing.assert_array_equal(Rows.of(wide).gather([1, 4]), wide.gather([1, 4]))


def test_stores_of_both_dtypes_are_one_source(make_images, tmp_path):
    images = make_images(4)
    half, wide = (
        extract(images, tiny_encoder(), tmp_path / f"{dtype}.zarr", dtype=dtype, **EXACT)
        for dtype in ("float16", "float32")
    )
    joined = Rows.of([half, wide]).gather(range(8))
    np.testing.assert_array_equal(joined[:4], half.gather(range(4)))
    np.testing.assert_array_equal(joined[4:], wide.gather(range(4)))


def test_every_field_and_view_has_the_dtype_and_chunks_hold_as_many_bytes(make_images, tmp_path, monkeypatch):
    monkeypatch.setattr("featcache.store.layout.CHUNK_BYTES", 200)
    images = make_images(9)
    made = {"views": 2, "augment": "flip", "fields": ["embedding", "tokens", "logits"], **EXACT}
    half = extract(images, tiny_encoder(), tmp_path / "half.zarr", **made)
    wide = extract(images, tiny_encoder(), tmp_path / "wide.zarr", dtype="float32", **made)
    for name in ("embedding", "tokens", "logits"):
        for view in (0, 1):
            values = wide.gather(range(9), name, view)
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values.astype(np.float16), half.gather(range(9), name, view))
    assert (half.manifest.chunk_rows, wide.manifest.chunk_rows) == (8, 4)
    assert wide.verify() == []


def test_a_store_of_another_dtype_is_neither_resumed_nor_reused(make_images, tmp_path):
    images = make_images(3)
    extract(images, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    with pytest.raises(ValueError, match=r"was made in float16, not float32 \(--dtype\); choose another --out, or"):
        extract(images, tiny_encoder(), tmp_path / "s.zarr", dtype="float32", **EXACT)
    again = tiny_encoder()
    wide = extract(images, again, tmp_path / "wide.zarr", dtype="float32", **EXACT)
    exact = again.encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))["embedding"].numpy()
    assert exact.dtype == wide.gather([0]).dtype
    assert not np.array_equal(wide.gather(range(3)), wide.gather(range(3)).astype(np.float16))  # not rows of the first
    other = tiny_encoder()
    extract(images, other, tmp_path / "third.zarr", dtype="float32", **EXACT)
    assert not set(other.module.seen[-3:]) - set(again.module.seen)
    with pytest.raises(ValueError, match="--dtype float64: unknown; known: float16, float32"):
        extract(images, tiny_encoder(), tmp_path / "t.zarr", dtype="float64", **EXACT)


def test_overflowing_features_name_a_remedy_that_exists(make_images, tmp_path, caplog):
    images = make_images(3)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="float32"):
        extract(images, far_encoder(1e5, 1e5), tmp_path / "s.zarr", **EXACT)
    assert (
        "far: float16 loses much of what tells one embedding from another; extract with --dtype float32" in caplog.text
    )
    store = extract(images, far_encoder(1e5, 1e5), tmp_path / "wide.zarr", dtype="float32", **EXACT)
    assert len(store.failed) == 0
    assert store.gather(range(3)).min() > 65504


def test_an_encoder_whose_features_float16_rounds_away_is_named(make_images, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        extract(make_images(4), far_encoder(), tmp_path / "s.zarr", **EXACT)
        assert "extract with --dtype float32" in caplog.text
        caplog.clear()
        extract(make_images(4), tiny_encoder(), tmp_path / "t.zarr", **EXACT)
    assert "float32" not in caplog.text


def test_features_that_are_not_finite_name_no_dtype(make_images, tmp_path):
    with pytest.raises(ValueError, match="its embedding is not finite"):
        extract(make_images(2), far_encoder(float("nan")), tmp_path / "s.zarr", dtype="float32", **EXACT)


def test_a_featcache_that_knows_float16_alone_does_not_open_wider_features(make_images, tmp_path):
    images = make_images(2)
    stores = [extract(images, tiny_encoder(), tmp_path / d, dtype=d, **EXACT) for d in ("float16", "float32")]
    said = [json.loads((s.path / "zarr.json").read_text())["attributes"]["featcache"] for s in stores]
    assert [each["format"] for each in said] == [2, 3]
    assert "dtypes" not in said[0]
    assert open_store(stores[1].path).manifest.dtypes == {"embedding": "float32"}


def spread(rng, rows=600, width=16):
    return rng.normal(size=(rows, width))


CASES = {
    "around zero": (lambda x, rng: x, ""),
    "small": (lambda x, rng: 1e-4 * x, ""),
    "off by ten times the spread": (lambda x, rng: x + 10, ""),
    "rectified": (lambda x, rng: np.maximum(x, 0), ""),
    "a constant dimension": (lambda x, rng: np.where(np.arange(16) == 3, 0.3, x), ""),
    "copies": (lambda x, rng: x[rng.integers(5, size=600)], ""),
    "one row": (lambda x, rng: x[:1], ""),
    "zeros": (lambda x, rng: 0 * x, ""),
    "off by ten thousand times the spread": (lambda x, rng: 1000 + 0.1 * x, "what varies in dimension"),
    "one dimension off": (lambda x, rng: np.where(np.arange(16) == 3, 5 + 0.001 * x, x), "what varies in dimension 3"),
    "tiny": (lambda x, rng: 1e-8 * x, "moves a row"),
    "large": (lambda x, rng: 1e5 * x, "beyond float16 (±65504)"),
    "rows off": (lambda x, rng: x + 1000 * rng.normal(size=(600, 1)), "what varies within rows"),
    "tight clusters": (lambda x, rng: 100 * x[rng.integers(20, size=600)] + 0.01 * x, "what tells near rows apart"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("blocks", [1, 7])
def test_what_float16_loses(rng, case, blocks):
    make, lost = CASES[case]
    values = make(spread(rng), rng)
    rounding = Rounding(len(values))
    for block in np.array_split(values, blocks):
        rounding.update(block)
    assert lost in rounding.loses()
    assert bool(rounding.loses()) == bool(lost)
