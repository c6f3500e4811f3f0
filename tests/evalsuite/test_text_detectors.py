"""Detectors that compare images with text embeddings, against slow formulas in float64 and pytorch-ood."""

import numpy as np
import pytest
import torch
from pytorch_ood.detector import MCM as TheirMCM
from safetensors.numpy import save_file

from evalsuite.detectors import build
from evalsuite.metrics import auroc
from featcache.rows import Rows


@pytest.fixture
def texts(rng, tmp_path):
    """Seven class names and 23 negatives in 12 dimensions, not of length 1."""
    arrays = {"text": 3 * rng.normal(size=(7, 12)), "negatives": rng.normal(size=(23, 12))}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return arrays | {f"{name}_path": str(tmp_path / f"{name}.npy") for name in arrays}


@pytest.fixture
def bank(rng):
    return Rows.from_arrays(rng.normal(size=(5, 12)).astype(np.float32), name="train")


@pytest.fixture
def images(rng, texts):
    """ID images near their class name's embedding, OOD images anywhere."""
    near = np.repeat(texts["text"], 30, axis=0)
    return (near + 3 * rng.normal(size=near.shape)).astype(np.float32), rng.normal(size=(150, 12)).astype(np.float32)


def cosine(x, y):
    return float(np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)))


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_mcm_is_the_formula(texts, bank, images, temperature):
    detector = build("mcm", text=texts["text_path"], temperature=temperature).fit(bank)
    for x, score in zip(images[0][:20], detector.score(images[0][:20]), strict=True):
        e = [np.exp(cosine(x.astype(np.float64), t) / temperature) for t in texts["text"]]
        assert score == pytest.approx(1 - max(e) / sum(e), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_mcm_ranks_as_pytorch_ood(texts, bank, images, temperature):
    theirs = TheirMCM(None, torch.from_numpy(texts["text"]), temperature)
    ours = build("mcm", text=texts["text_path"], temperature=temperature).fit(bank)
    expected = auroc(*(theirs.predict_features(torch.from_numpy(x)).double().numpy() for x in images))
    assert auroc(*map(ours.score, images)) == pytest.approx(expected, abs=1e-6)
    assert expected > 0.6


def test_the_temperature_is_not_a_scale_of_the_score(texts, bank, images):
    found = {
        t: auroc(*map(build("mcm", text=texts["text_path"], temperature=t).fit(bank).score, images))
        for t in (1.0, 0.01)
    }
    assert abs(found[1.0] - found[0.01]) > 0.01


def test_mcm_of_very_sure_rows_does_not_saturate(texts, bank):
    """1 − p rounds to 0 in float64, the sum of the others does not."""
    x = np.linspace(0, 0.1, 5, dtype=np.float32)[:, None] * texts["text"][1] + texts["text"][0]
    score = build("mcm", text=texts["text_path"], temperature=0.002).fit(bank).score(x.astype(np.float32))
    assert len(set(score)) == 5
    assert 0 < score.max() < 1e-16


@pytest.mark.parametrize(("groups", "size"), [(1, 23), (4, 5), (23, 1)])
def test_neglabel_is_the_formula(texts, bank, images, groups, size):
    given = {"text": texts["text_path"], "negatives": texts["negatives_path"]}
    score = build("neglabel", **given, groups=groups, temperature=0.1, seed=3).fit(bank).score(images[1][:10])
    order = np.random.default_rng(3).permutation(23)
    for x, found in zip(images[1][:10].astype(np.float64), score, strict=True):
        known = sum(np.exp(cosine(x, t) / 0.1) for t in texts["text"])
        shares = []
        for g in range(groups):
            negative = sum(np.exp(cosine(x, texts["negatives"][i]) / 0.1) for i in order[g * size : (g + 1) * size])
            shares.append(negative / (known + negative))
        assert found == pytest.approx(np.mean(shares), rel=1e-9)


def test_neglabel_depends_on_the_seed_only_through_groups(texts, bank, images):
    def scores(groups, seed):
        given = {"text": texts["text_path"], "negatives": texts["negatives_path"], "temperature": 0.1}
        return build("neglabel", **given, groups=groups, seed=seed).fit(bank).score(images[1])

    np.testing.assert_array_equal(scores(4, 1), scores(4, 1))
    assert not np.allclose(scores(4, 1), scores(4, 2))
    np.testing.assert_allclose(scores(1, 1), scores(1, 2), rtol=1e-12)


def test_neglabel_does_not_overflow(texts, bank, images):
    given = {"text": texts["text_path"], "negatives": texts["negatives_path"]}
    score = build("neglabel", **given, groups=2, temperature=1e-3).fit(bank).score(images[0])  # exp(1000)
    assert np.isfinite(score).all()
    assert score.min() < 1e-50


def test_texts_may_be_a_store_or_safetensors(texts, bank, images, make_store, tmp_path):
    exact = texts["text"].astype(np.float16).astype(np.float64)
    np.save(tmp_path / "exact.npy", exact)
    save_file({"names": exact}, tmp_path / "only.safetensors")
    save_file({"embedding": exact, "other": np.ones(2)}, tmp_path / "named.safetensors")
    make_store("names", exact, fingerprint="the text tower's")
    expected = build("mcm", text=str(tmp_path / "exact.npy")).fit(bank).score(images[0])
    for name in ("only.safetensors", "named.safetensors", "names.zarr"):
        np.testing.assert_array_equal(build("mcm", text=str(tmp_path / name)).fit(bank).score(images[0]), expected)


def test_texts_that_do_not_suit_are_named(texts, bank, tmp_path):
    bad = texts["text"].copy()
    bad[4] = 0
    arrays = {
        "wide": np.ones((3, 13)),
        "flat": np.ones(12),
        "zero": bad,
        "words": np.array([["a"] * 12]),
        "one": bad[:1],
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    save_file({"a": np.ones((2, 12)), "b": np.ones((2, 12))}, tmp_path / "two.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    for name, message in (
        ("wide.npy", r"wide\.npy holds text embeddings of 13 dimensions, the images of train have 12"),
        ("flat.npy", r"flat\.npy holds no \(texts, dimensions\) array .*float64 of shape \(12,\).*mcm:text=FILE"),
        ("words.npy", r"words\.npy holds no .*array"),
        ("zero.npy", r"zero\.npy row 4 is zero or not finite"),
        ("one.npy", r"one\.npy has one class name"),
        ("two.safetensors", r"two\.safetensors holds no .*of its arrays a, b none is called 'embedding'"),
        ("damaged.safetensors", r"damaged\.safetensors holds no"),
        ("gone.npy", r"gone\.npy: no such file; give another mcm:text=FILE"),
        ("gone.zarr", r"gone\.zarr: no such store"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            build("mcm", text=str(tmp_path / name)).fit(bank)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="neglabel needs text embeddings: give neglabel:negatives=FILE"):
        build("neglabel", text=texts["text_path"]).fit(bank)
    given = {"text": texts["text_path"], "negatives": texts["negatives_path"]}
    with pytest.raises(
        ValueError, match=r"groups=100 does not suit the 23 rows of .*negatives\.npy; use groups from 1 to 23"
    ):
        build("neglabel", **given).fit(bank)
    for name in ("mcm", "neglabel"):
        with pytest.raises(ValueError, match=r"temperature=0\.0 must be above 0"):
            build(name, temperature=0.0).fit(bank)
