import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import evalsuite
from evalsuite.fidelity import compare, fidelity


def dense(x, y):
    """The same measures from n×n matrices."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    off = ~np.eye(len(x), dtype=bool)

    def unit(a):
        norm = np.linalg.norm(a, axis=1, keepdims=True)
        return np.divide(a, norm, out=np.zeros_like(a), where=norm > 0)

    def pearson(a, b):
        return np.corrcoef((a @ a.T)[off], (b @ b.T)[off])[0, 1]

    def centred(a):
        return unit(unit(a) - unit(a).mean(axis=0))

    def hsic(a, b):
        """Song et al. 2012, equation 5."""
        n = len(a)
        k, l_ = a @ a.T * off, b @ b.T * off
        one = np.ones(n)
        total = np.trace(k @ l_) + (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (one @ k @ l_ @ one)) / (n * (n - 3))

    return {
        "gram_pearson": pearson(unit(x), unit(y)),
        "gram_pearson_centred": pearson(centred(x), centred(y)),
        "cka_debiased": hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)),
    }


def related(n, d, e, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.linspace(0.2, 2, d) + rng.normal(size=d)
    return x, x @ rng.normal(size=(d, e)) + 0.5 * rng.normal(size=(n, e))


def in_blocks(x, y, size):
    return lambda: ((x[i : i + size], y[i : i + size]) for i in range(0, len(x), size))


@given(
    n=st.integers(5, 60),
    d=st.integers(2, 12),
    e=st.integers(2, 12),
    block=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_equals_the_dense_formulas(n, d, e, block, seed):
    x, y = related(n, d, e, seed)
    assert compare(in_blocks(x, y, block)) == pytest.approx(dense(x, y), rel=1e-8, abs=1e-8)


def test_a_large_offset_does_not_eat_the_digits():
    x, y = related(200, 10, 7, 0)
    value = compare(in_blocks(x + 200, y, 64))["cka_debiased"]
    assert value == pytest.approx(dense(x, y)["cka_debiased"], abs=1e-10)


def test_zero_rows_are_no_obstacle():
    x, y = related(30, 5, 4, 1)
    x[3] = y[3] = y[9] = 0
    assert compare(in_blocks(x, y, 8)) == pytest.approx(dense(x, y), rel=1e-8)


def test_rotation_and_scale_change_nothing(rng):
    x, _ = related(50, 8, 2, 2)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert compare(in_blocks(x, 3 * x @ rotation, 50)) == pytest.approx(
        {"gram_pearson": 1, "gram_pearson_centred": 1, "cka_debiased": 1}, abs=1e-10
    )


def test_unrelated_spaces_score_near_zero(rng):
    """Biased CKA of these is 0.6; the debiased one stays within a few standard errors of 0."""
    values = compare(in_blocks(rng.normal(size=(256, 384)), rng.normal(size=(256, 384)), 256))
    assert all(abs(value) < 0.03 for value in values.values())


def test_centring_removes_a_shared_direction(rng):
    """Two clouds related only by how far each row lies along the common direction."""
    direction = 6 * np.eye(1, 16)
    stretch = rng.normal(1, 0.8, size=(200, 1))
    x, y = (rng.normal(size=(200, 16)) + stretch * direction for _ in range(2))
    values = compare(in_blocks(x, y, 200))
    assert values["gram_pearson"] > 0.5
    assert values["gram_pearson_centred"] < values["gram_pearson"]


def test_stores_are_joined_by_sample_id(make_store, monkeypatch):
    x, y = related(12, 6, 3, 3)
    ids = [f"image-{i}" for i in range(12)]
    order = np.array([7, 2, 11, 0, 5, 9, 3, 1, 10, 6])
    monkeypatch.setattr(importlib.import_module("evalsuite.fidelity"), "_BLOCK_ROWS", 4)
    teacher = make_store("teacher", x, sample_ids=ids, failed={2: "truncated"}, fingerprint="t")
    student = make_store(
        "student", y[order], sample_ids=[ids[i] for i in order], failed={0: "truncated"}, fingerprint="s"
    )
    result = evalsuite.fidelity(teacher, student.path)
    joined = np.setdiff1d(order, [2, 7])
    half = [a[joined].astype(np.float16) for a in (x, y)]
    assert {name: m.value for name, m in result.metrics.items()} == pytest.approx(dense(*half), rel=1e-8)
    assert all(m.ci95 is None for m in result.metrics.values())
    assert result.inputs["joined"] == 8
    assert (result.inputs["teacher"]["rows"], result.inputs["teacher"]["failed"]) == (11, 1)
    assert result.inputs["student"]["fingerprint"] == "s"


def test_other_images_under_the_same_ids_are_refused(make_store, monkeypatch):
    x, y = related(6, 3, 3, 4)
    teacher, student = make_store("teacher", x), make_store("student", y)
    monkeypatch.setattr(teacher, "content", np.arange(6 * 16, dtype=np.uint8).reshape(6, 16), raising=False)
    assert fidelity(teacher, student).inputs["joined"] == 6  # the student was made from arrays: nothing to compare
    other = teacher.content.copy()
    other[2] += 1
    monkeypatch.setattr(student, "content", other, raising=False)
    with pytest.raises(ValueError, match="different images under 1 of 6 shared ids; extract both"):
        fidelity(teacher, student)


def test_wrong_input_names_the_stores_and_the_remedy(make_store):
    x, y = related(6, 3, 3, 5)
    teacher = make_store("teacher", x)
    with pytest.raises(ValueError, match=r"teacher\.zarr and .*few\.zarr share 3 sample ids.*extract both"):
        fidelity(teacher, make_store("few", y[:3]))
    with pytest.raises(ValueError, match=r"twice\.zarr repeats a sample id"):
        fidelity(teacher, make_store("twice", y, sample_ids=list("aabcde")))
    with pytest.raises(ValueError, match=r"cannot compare .*teacher\.zarr with .*flat\.zarr: all pairs"):
        fidelity(teacher, make_store("flat", np.ones((6, 3))))
    with pytest.raises(ValueError, match="3 rows were paired"):
        compare(in_blocks(x[:3], y[:3], 3))
