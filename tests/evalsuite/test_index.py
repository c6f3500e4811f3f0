import importlib
import sys

import numpy as np
import pytest

import featcache.rows
from evalsuite import knn
from evalsuite.neighbours.exact import import_faiss, search
from evalsuite.neighbours.index import Index
from featcache.rows import Rows

D = 12
faiss = import_faiss()


@pytest.fixture
def bank(rng, clusters):
    """2,000 rows about 40 centres, shuffled; row 1999 repeats row 0."""
    rows = rng.permutation(clusters(rng.normal(size=(40, D)), 50, spread=0.5)).astype(np.float32)
    rows[1999] = rows[0]
    return rows


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(featcache.rows, "_BLOCK_FLOATS", D * 300)
    monkeypatch.setattr("evalsuite.neighbours.index._CANDIDATE_FLOATS", D * 40 * 7)


def cosines(bank, query, own=None):
    """(q, n) in float64, the query itself at −∞."""
    bank, query = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None] for x in (bank, query))
    cosine = query @ bank.T
    if own is not None:
        cosine[np.arange(len(query)), own] = -np.inf
    return cosine


def slow_recall(cosine, found, k):
    """Share of the k rows found that are among the k best, query by query."""
    return np.mean([len(set(np.argsort(-c)[:k]) & set(f[:k])) / k for c, f in zip(cosine, found, strict=True)])


@pytest.mark.parametrize("spec", ["IVF32,Flat;nprobe=32", "Flat", "IVF32_HNSW8,Flat;nprobe=32,quantizer_efSearch=32"])
def test_an_index_searched_whole_is_exact(bank, small_blocks, spec):
    index, own = Index(Rows.from_arrays(bank), spec), np.arange(0, 2000, 7)
    for query, left_out in ((bank[own], own), (bank[own] + 0.1, None)):
        found = index.search(query, 20, exclude_self=left_out)
        for got, expected in zip(found, search([bank], query, 20, exclude_self=left_out), strict=True):
            np.testing.assert_array_equal(got, expected)
        assert index.recall(query, (1, 20), exclude_self=left_out) == {1: 1.0, 20: 1.0}


@pytest.mark.parametrize("spec", ["HNSW4", "IVF32,Flat", "IVF32,Flat;nprobe=3", "PCA4,IVF16,SQ8;nprobe=4"])
def test_recall_equals_a_slow_count(bank, small_blocks, spec):
    own = np.arange(0, 2000, 5)
    index, cosine = Index(Rows.from_arrays(bank), spec), cosines(bank, bank[own], own)
    similarity, row = index.search(bank[own], 10, exclude_self=own)
    np.testing.assert_allclose(similarity, np.take_along_axis(cosine, row, axis=1), atol=1e-6)
    assert (np.diff(similarity, axis=1) <= 0).all()
    assert all(len({*found}) == 10 for found in row)
    assert row[0, 0] == 1999  # not row 0 itself, but the one that is like it
    recall = index.recall(bank[own], (1, 5, 10), exclude_self=own)
    assert recall == pytest.approx({k: slow_recall(cosine, row, k) for k in (1, 5, 10)}, abs=1e-12)
    assert 0.3 < recall[10] < 1


def test_more_of_the_index_finds_more(bank):
    index = {
        n: Index(Rows.from_arrays(bank), f"IVF32,Flat;nprobe={n}").recall(bank[:300], [10])[10] for n in (1, 4, 32)
    }
    assert index[1] < index[4] < index[32] == 1


def test_equal_rows_are_as_good_as_each_other():
    """60 equal rows: any ten of them are all that an exact search would find."""
    bank = np.concatenate([np.tile([1.0, 0.0], (60, 1)), np.tile([0.0, 1.0], (40, 1))])
    assert Index(Rows.from_arrays(bank), "Flat").recall(np.array([[1.0, 0.1]]), [10]) == {10: 1.0}


def test_learns_from_rows_spread_over_the_bank(bank, monkeypatch):
    monkeypatch.setattr("evalsuite.neighbours.index._TRAINING_ROWS", 500)
    taken = []
    take = Rows.take
    monkeypatch.setattr(Rows, "take", lambda self, at, *rest: taken.append(at) or take(self, at, *rest))
    Index(Rows.from_arrays(bank), "IVF4,Flat")
    np.testing.assert_array_equal(taken[0], np.arange(500) * 4)
    assert sum(len(at) for at in taken[1:]) == 2000


@pytest.fixture
def stores(bank, rng, make_store):
    labels = np.argmax(bank[:, :6], axis=1)
    query = bank[::9] + rng.normal(size=bank[::9].shape)
    return make_store("bank", bank, labels=labels), make_store("query", query, labels=labels[::9])


def test_knn_with_the_whole_index_equals_exact_knn(stores):
    exact, whole = (knn(*stores, k=(1, 10), index=index) for index in ("exact", "IVF32,Flat;nprobe=32"))
    assert (exact.parameters["index"], whole.parameters["index"]) == ("exact", "IVF32,Flat;nprobe=32")
    recall = {name: whole.metrics.pop(name).value for name in ("recall@1", "recall@10")}
    assert recall == {"recall@1": 1, "recall@10": 1}
    assert whole.metrics == exact.metrics
    assert 0.3 < exact.metrics["top1@10"].value < 1


@pytest.mark.parametrize("same", [True, False])
def test_knn_tells_the_recall_of_evenly_spread_queries(stores, monkeypatch, same):
    monkeypatch.setattr(importlib.import_module("evalsuite.votes"), "_RECALL_QUERIES", 50)
    bank, query = (stores[0], stores[0]) if same else stores
    result = knn(bank, query, k=[10], index="IVF32,Flat")
    some = np.array([i * len(query) // 50 for i in range(50)])
    b, q = (store.gather(np.arange(len(store))).astype(np.float32) for store in (bank, query))
    own = some if same else None
    _, found = Index(Rows.from_arrays(b), "IVF32,Flat").search(q[some], 10, exclude_self=own)
    expected = slow_recall(cosines(b, q[some], own), found, 10)
    assert result.metrics["recall@10"].value == pytest.approx(expected, abs=0.01)  # half-precision rows may tie
    assert result.metrics["recall@10"].value < 1


@pytest.mark.parametrize(("spec", "on_gpu"), [("IVF32,Flat;nprobe=32", True), ("HNSW32;efSearch=2000", False)])
def test_an_index_goes_to_the_gpus_where_faiss_can(bank, monkeypatch, spec, on_gpu):
    moved, steered = [], []

    def to_gpus(index):
        if not faiss.try_extract_index_ivf(index):
            raise RuntimeError("This index type is not implemented on GPU.")
        moved.append(index)
        return index

    class GpuParameters(faiss.ParameterSpace):
        def set_index_parameters(self, index, parameters):
            steered.append(parameters)
            super().set_index_parameters(index, parameters)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus, raising=False)
    monkeypatch.setattr(faiss, "GpuParameterSpace", GpuParameters, raising=False)
    index = Index(Rows.from_arrays(bank), spec)
    assert (bool(moved), steered) == (on_gpu, ["nprobe=32"] if on_gpu else [])
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert index.recall(bank[:50], [5])[5] == 1


def test_what_cannot_be_is_explained(bank, monkeypatch):
    rows = Rows.from_arrays(bank, name="bank.zarr")
    with pytest.raises(ValueError, match=r"index Tree9: FAISS refuses it \(could not parse index string Tree9\)"):
        Index(rows, "Tree9")
    with pytest.raises(ValueError, match=r"index PQ5: FAISS refuses it .*multiple of the number of subquantizers"):
        Index(rows, "PQ5")
    with pytest.raises(ValueError, match=r"HNSW4;nprobe=3: FAISS refuses it .*could not set parameter nprobe"):
        Index(rows, "HNSW4;nprobe=3")
    with pytest.raises(ValueError, match=r"needs 9,984 rows for its 256 lists, bank\.zarr has 2,000; use at most 51"):
        Index(rows, "PCA4,IVF256,Flat")
    with pytest.raises(ValueError, match=r"finds only \d+ of k=300 neighbours .* in bank\.zarr; .*higher ;nprobe"):
        Index(rows, "IVF32,Flat").search(bank[:3], 300)
    with pytest.raises(ValueError, match=r"nprobe=0: FAISS refuses it .*nprobe > 0"):
        Index(rows, "IVF32,Flat;nprobe=0").search(bank[:3], 1)
    bad = bank.copy()
    bad[1204, 3] = np.nan
    for spec in ("IVF32,Flat", "HNSW4"):
        with pytest.raises(ValueError, match=r"array row 1204: embedding is not finite; extract it again"):
            Index(Rows.from_arrays(bad), spec)
    with pytest.raises(ValueError, match="query row 1204 is not finite"):
        Index(rows, "HNSW4").search(bad, 1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"index HNSW4: FAISS is not installed; `pip install faiss-cpu`, or leave"):
        Index(rows, "HNSW4")
