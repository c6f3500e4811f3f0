"""Only the largest logits kept: what comes back, from the array to the command line."""

import json

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from tiny import tiny_encoder
from typer.testing import CliRunner

import featcache
from featcache.interchange import export_store
from featcache.rows import Rows
from featcache.store.top_k import outside, pack, unpack, words
from featcache_cli import programs


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("classes", [40, 70_000])
def test_the_largest_come_back_and_the_rest_is_spread_evenly(rng, dtype, classes):
    logits = 4 * rng.normal(size=(6, classes)).astype(np.float32)
    packed = pack(torch.from_numpy(logits), 5, dtype)
    assert packed.dtype == np.uint16
    assert packed.shape == (6, words(classes, 5, dtype))
    found, p = unpack(packed, classes, 5, dtype), softmax(logits.astype(np.float64), axis=1)
    tolerance = 5e-3 if dtype == "float16" else 2e-5
    for row in range(6):
        top = np.argsort(-logits[row])[:5]
        others = np.setdiff1d(np.arange(classes), top)
        np.testing.assert_allclose(found[row, top], np.log(p[row, top]), rtol=tolerance, atol=tolerance)
        left = p[row, others].sum()
        np.testing.assert_allclose(np.exp(found[row, others]), left / (classes - 5), rtol=3 * tolerance)
        assert outside(packed, classes, 5, dtype)[row] == pytest.approx(left, rel=2 * tolerance)
        assert np.exp(found[row].astype(np.float64)).sum() == pytest.approx(1, abs=tolerance)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e5, 0.0, -1e5, 3.0]])
    found = unpack(pack(logits, 2, "float16"), 4, 2, "float16")
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found.argmax(axis=1), [0])


@pytest.fixture
def folder(make_images):
    return make_images(8)


@pytest.fixture
def stores(folder, tmp_path):
    """With all three logits, and with the largest two."""
    given = {"fields": ["logits", "embedding"], "views": 2, "augment": "flip", "device": "cpu"}
    whole = featcache.extract(folder, tiny_encoder(), tmp_path / "whole.zarr", **given)
    return whole, featcache.extract(folder, tiny_encoder(), tmp_path / "top.zarr", top_k=2, **given), given


def test_an_extraction_keeps_them_and_says_what_is_left_out(stores, folder, tmp_path):
    whole, top, given = stores
    assert top.manifest.top_k == {"logits": 2}
    assert top.manifest.format == 4
    assert top.manifest.fields == whole.manifest.fields
    assert top.verify() == []
    left = []
    for view in range(2):
        logits, found = (store.gather(store.ok, "logits", view).astype(np.float64) for store in (whole, top))
        p = softmax(logits, axis=1)
        least = logits.argmin(axis=1)[:, None]
        np.testing.assert_allclose(found, log_softmax(logits, axis=1), atol=4e-3)  # of three, two and what is left
        np.testing.assert_array_equal(found.argmin(axis=1)[:, None], least)
        np.testing.assert_array_equal(top.gather_portable(top.ok, "logits", view), top.gather(top.ok, "logits", view))
        left.append(np.take_along_axis(p, least, axis=1))
    said = top.manifest.extraction
    assert said.outside_mean == pytest.approx(np.mean(left), rel=5e-3)
    assert said.outside_worst == pytest.approx(np.max(left), rel=5e-3)
    assert whole.manifest.extraction.outside_mean is None
    again = featcache.extract(folder, tiny_encoder(), tmp_path / "again.zarr", top_k=2, **given)
    for row in top.ok.tolist():
        np.testing.assert_array_equal(again.row("logits", row), top.row("logits", row))
    with pytest.raises(ValueError, match="with other top_k"):
        featcache.extract(folder, tiny_encoder(), top.path, **given)


def test_what_reads_logits_reads_them(stores, tmp_path):
    whole, top, _ = stores
    rows = Rows.of(top)
    assert rows.shape_of("logits") == [3]
    assert rows.take(np.arange(len(rows)), "logits").shape == (len(rows), 3)
    mean = featcache.derive("mean", [whole, top], tmp_path / "mean.zarr", of="probabilities", dtype="float32")
    p = (softmax(whole.gather(whole.ok, "logits"), axis=1) + softmax(top.gather(top.ok, "logits"), axis=1)) / 2
    np.testing.assert_allclose(mean.gather(mean.ok, "embedding"), p, atol=1e-3)
    with pytest.raises(ValueError, match="keeps the 2 largest logits only, which no format holds"):
        export_store(top, tmp_path / "top.npy", "npy")


def test_logits_that_are_not_finite_fail(folder, tmp_path):
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.module.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"not one row has features .*not finite"):
        featcache.extract(
            folder, encoder, tmp_path / "nan.zarr", fields=["logits"], top_k=2, device="cpu", precision="fp32"
        )


def test_too_many_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="--top-k 3: tiny has 3 logits; leave it out"):
        featcache.extract(folder, tiny_encoder(), tmp_path / "a.zarr", fields=["logits"], top_k=3, device="cpu")
    with pytest.raises(ValueError, match="--top-k 2: of the logits at least 1 is kept, where --fields names them"):
        featcache.extract(folder, tiny_encoder(), tmp_path / "a.zarr", top_k=2, device="cpu")


def test_info_says_it(stores, tmp_path):
    ran = CliRunner().invoke(
        programs.app("featcache"), ["info", str(stores[1].path), "--json", str(tmp_path / "i.json")]
    )
    assert "the 2 largest kept" in " ".join(ran.output.split())
    assert "outside_mean" in ran.output
    assert json.loads((tmp_path / "i.json").read_text())["manifest"]["top_k"] == {"logits": 2}


def test_on_the_command_line(folder, tmp_path, monkeypatch):
    (tmp_path / "my_teacher.py").write_text("from tiny import tiny_encoder\n")
    monkeypatch.syspath_prepend(tmp_path)
    command = f"extract {folder} --teacher my_teacher:tiny_encoder --trust-code --out {tmp_path}/top.zarr --device cpu"
    ran = CliRunner().invoke(programs.app("featcache"), f"{command} --fields logits --top-k 1".split())
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert "probability outside the largest logits: mean 0." in ran.output
    whole = CliRunner().invoke(programs.app("featcache"), f"{command} --fields logits".split())
    assert "with other top_k" in str(whole.exception) + whole.output
