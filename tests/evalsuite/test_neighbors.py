import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evalsuite.neighbours import exact as neighbors
from evalsuite.neighbours.exact import import_faiss, search

BACKENDS = ["faiss", "torch"]
faiss = import_faiss()


def slow_search(bank, query, k, own=None):
    """Every pair in float64, one at a time; similarity rounded to float32, ties lowest row first."""

    def unit(x):
        x = x.astype(np.float64)
        norm = np.sqrt((x * x).sum())
        return (x / norm if norm > 0 else x).astype(np.float32).astype(np.float64)

    similarity, row = [], []
    for i, q in enumerate(query):
        pairs = []
        for j, b in enumerate(bank):
            if own is None or own[i] != j:
                pairs.append((-np.float32(np.clip((unit(q) * unit(b)).sum(), -1, 1)), j))
        pairs.sort()
        similarity.append([-s for s, _ in pairs[:k]])
        row.append([j for _, j in pairs[:k]])
    return np.array(similarity, dtype=np.float32), np.array(row, dtype=np.int64)


def cut(bank, size):
    return (bank[i : i + size] for i in range(0, len(bank), size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [1, 7, 30, 64])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_equals_the_slow_loop(rng, backend, block, k):
    bank, query = rng.normal(size=(60, 8)).astype(np.float16), rng.normal(size=(9, 8)).astype(np.float32)
    similarity, row = search(cut(bank, block), query, k, backend=backend)
    expected_similarity, expected_row = slow_search(bank, query, k)
    assert (similarity.dtype, row.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(row, expected_row)
    np.testing.assert_array_equal(similarity, expected_similarity)


few = st.sampled_from([-1.0, 0.0, 0.5, 1.0])  # many ties, many zero rows


@given(
    bank=arrays(np.float32, st.tuples(st.integers(1, 40), st.just(2)), elements=few),
    query=arrays(np.float32, st.tuples(st.integers(1, 5), st.just(2)), elements=few),
    block=st.integers(1, 41),
    backend=st.sampled_from(BACKENDS),
    data=st.data(),
)
def test_ties_go_to_the_lowest_row(bank, query, block, backend, data):
    k = data.draw(st.integers(1, len(bank)))
    found = search(cut(bank, block), query, k, backend=backend)
    for got, expected in zip(found, slow_search(bank, query, k), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_ties_than_were_proposed(rng, backend):
    """200 copies of one row: the proposal is widened until the lowest rows are certain."""
    bank = np.concatenate([rng.normal(size=(20, 6)), np.tile(rng.normal(size=6), (200, 1))])[rng.permutation(220)]
    query = bank[[3, 100, 219]]
    for got, expected in zip(search([bank], query, 4, backend=backend), slow_search(bank, query, 4), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_may_be_among_the_k_is_scored_again(rng, monkeypatch, backend):
    scored = []
    cosine = neighbors.cosine
    monkeypatch.setattr(neighbors, "cosine", lambda q, i, b, j: scored.append(len(i)) or cosine(q, i, b, j))
    bank, query = rng.normal(size=(500, 16)), rng.normal(size=(20, 16))
    search([bank], query, 3, backend=backend)
    assert scored == [20 * 3]
    search([bank], bank[:20], 3, exclude_self=np.arange(20), backend=backend)
    assert scored[1:] == [20 * 3]  # the fourth was the query itself


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [5, 50])
def test_a_row_is_not_its_own_neighbour(rng, backend, block):
    bank = rng.normal(size=(40, 5))
    bank[17] = bank[4]  # a true duplicate must still be found
    own = np.arange(10, 30)
    similarity, row = search(cut(bank, block), bank[own], 39, exclude_self=own, backend=backend)
    assert (row != own[:, None]).all()
    assert row[17 - 10, 0] == 4
    for got, expected in zip((similarity, row), slow_search(bank, bank[own], 39, own), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_scores_the_same_alone(rng, backend):
    bank, query = rng.normal(size=(300, 33)), rng.normal(size=(50, 33))
    together = search([bank], query, 10, backend=backend)[0]
    alone = np.concatenate([search([bank], q[None], 10, backend=backend)[0] for q in query])
    np.testing.assert_array_equal(together, alone)


def test_zero_rows_have_similarity_zero():
    similarity, row = search([np.array([[0.0, 0.0], [3.0, 0.0]])], np.array([[2.0, 0.0], [0.0, 0.0]]), 2)
    np.testing.assert_array_equal(similarity, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(row, [[1, 0], [0, 1]])


def test_works_without_faiss(rng, monkeypatch):
    bank, query = rng.normal(size=(30, 4)), rng.normal(size=(3, 4))
    expected = search([bank], query, 3, backend="faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)
    np.testing.assert_array_equal(search([bank], query, 3)[1], expected[1])
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        search([bank], query, 3, backend="faiss")


@pytest.mark.parametrize(("k", "on_gpu"), [(5, True), (2040, False)])  # of its candidates, a GPU sorts 2,048
def test_a_gpu_proposes_and_rounding_is_undone(rng, monkeypatch, k, on_gpu):
    bank, query = rng.normal(size=(2100, 4)), rng.normal(size=(3, 4))
    expected, searched, resources = search([bank], query, k, backend="torch"), [], object()

    def knn_gpu(given, xq, xb, width, metric):
        assert given is resources
        searched.append(width)
        similarity, row = faiss.knn(xq, xb, width, metric=metric)
        return similarity + rng.uniform(-1, 1, similarity.shape).astype(np.float32) * 2**-23, row

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu, raising=False)
    monkeypatch.setattr(neighbors, "_gpu_resources", lambda: resources)
    found = search([bank], query, k)
    assert bool(searched) == on_gpu
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_bad_input_is_refused(rng):
    bank = rng.normal(size=(5, 3))
    with pytest.raises(ValueError, match="at least 1"):
        search([bank], bank, 0)
    with pytest.raises(ValueError, match=r"k=6 .* 5 rows"):
        search([bank], bank, 6)
    with pytest.raises(ValueError, match=r"k=5 .* left out"):
        search([bank], bank, 5, exclude_self=np.arange(5))
    with pytest.raises(ValueError, match="3 dimensions, queries 2"):
        search(iter([bank]), bank[:, :2], 1)
    with pytest.raises(ValueError, match="unknown backend"):
        search([bank], bank, 1, backend="annoy")
    bad = bank.copy()
    bad[3, 1] = np.inf
    with pytest.raises(ValueError, match="bank row 8 is not finite"):
        search([bank, bad], bank, 1)
    with pytest.raises(ValueError, match="query row 3 is not finite"):
        search([bank], bad, 1)


def test_a_lower_matmul_precision_of_the_caller_s_changes_nothing(rng):
    bank, query = rng.normal(size=(300, 64)), rng.normal(size=(20, 64))
    expected, before = search([bank], query, 5, backend="torch"), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = search([bank], query, 5, backend="torch")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
