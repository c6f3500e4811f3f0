"""Rankings judged as trec_eval judges them, and what is refused."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import skew
from sklearn.metrics import average_precision_score

from evalsuite import compare, retrieval
from evalsuite.neighbours.exact import search
from evalsuite.ranking import skewness
from featcache.corpora import open_corpus
from featcache.qrels import read_qrels
from featcache_cli import programs

OF_TREC = {
    "ndcg": "ndcg_cut_",
    "recall": "recall_",
    "precision": "P_",
    "hit": "success_",
    "map": "map_cut_",
}
KS = (1, 3, 10, 200)
CRANFIELD = Path(__file__).parents[3] / "shared" / "data" / "cranfield.zip"


def write_qrels(path, qrels):
    lines = [f"{query}\t{document}\t{grade}" for query, of in qrels.items() for document, grade in of.items()]
    path.write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def task(rng, make_store, tmp_path):
    """Small whole numbers, so that many documents are equally similar; grades from −1 to 3, of 4 queries none above 0, and
    5 queries without any. Ids whose order is not that of the rows."""
    documents, queries = rng.integers(-2, 3, (80, 4)) + 0.0, rng.integers(-2, 3, (40, 4)) + 0.0
    documents[3] = 0
    ids = [f"{'dé'[i % 2]}{i}" for i in range(80)], [f"q{i}" for i in range(40)]
    qrels = {}
    for query in ids[1][:35]:
        judged = rng.choice(80, rng.integers(1, 30), replace=False)
        least, most = (-1, 1) if query in ("q3", "q5", "q8", "q9") else (-1, 4)
        qrels[query] = {
            ids[0][j]: int(grade) for j, grade in zip(judged, rng.integers(least, most, len(judged)), strict=True)
        }
    stores = [
        make_store(name, values, sample_ids=of)
        for name, values, of in zip(("d", "q"), (documents, queries), ids, strict=True)
    ]
    return stores, qrels, write_qrels(tmp_path / "qrels.tsv", qrels)


def run_of(stores, similarity):
    """Query id → document id → similarity, in float64 from unit rows in float32, as `neighbours.exact` has it."""
    ids, rows = [], []
    for store in stores:
        x = store.gather(np.arange(len(store)), "embedding", np.zeros(len(store), int)).astype(np.float64)
        norm = np.sqrt((x * x).sum(axis=1))
        x = x / np.where(norm > 0, norm, 1)[:, None] if similarity == "cosine" else x
        rows.append(x.astype(np.float32).astype(np.float64))
        ids.append([str(each) for each in store.sample_ids])
    scores = (rows[1][:, None] * rows[0][None]).sum(axis=2).astype(np.float32)
    return {q: dict(zip(ids[0], map(float, of), strict=True)) for q, of in zip(ids[1], scores, strict=True)}


def of_trec_eval(qrels, run):
    """Measure → value of each query that is judged, in the order of `qrels`."""
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="needs pytrec_eval")
    cuts = ",".join(map(str, KS))
    asked = {f"{name.rstrip('_')}.{cuts}" for name in OF_TREC.values()} | {"map", "recip_rank"}
    found = [pytrec_eval.RelevanceEvaluator({q: of}, asked).evaluate({q: run[q]})[q] for q, of in qrels.items()]
    values = {f"{ours}@{k}": [each[f"{theirs}{k}"] for each in found] for ours, theirs in OF_TREC.items() for k in KS}
    return values | {"map": [each["map"] for each in found], "mrr": [each["recip_rank"] for each in found]}


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_equals_trec_eval_to_the_last_digit(task, similarity):
    (documents, queries), qrels, path = task
    result = retrieval(documents, queries, qrels=path, k=KS, similarity=similarity)
    expected = of_trec_eval(qrels, run_of((documents, queries), similarity))
    assert result.samples["sample_id"].tolist() == list(qrels)
    for name, values in expected.items():
        assert result.samples[name].tolist() == values, name
        assert result.metrics[name].value == np.mean(values)
        low, high = result.metrics[name].ci95
        assert low <= np.mean(values) <= high
    within = [each if each >= 1 / 3 else 0.0 for each in expected["mrr"]]
    assert result.samples["mrr@3"].tolist() == within
    counts = result.inputs["qrels"]
    without = sum(max(of.values()) < 1 for of in qrels.values())
    assert (counts["judged"], counts["unjudged"], counts["without_relevant"]) == (35, 5, without)
    assert any(f"{without} queries have judgements, but no relevant document" in each for each in result.remarks)


@pytest.mark.skipif(not CRANFIELD.exists(), reason="needs ../shared/data")
def test_equals_trec_eval_on_the_judgements_of_a_real_collection(rng, make_store):
    """Cranfield's, of random embeddings; the collection is read as BEIR's."""
    ids = [open_corpus(f"beir:{CRANFIELD}:{part}").ids for part in ("corpus", "queries")]
    stores = [
        make_store(name, rng.normal(size=(len(of), 3)), sample_ids=of) for name, of in zip("dq", ids, strict=True)
    ]
    result, qrels = retrieval(*stores, qrels=f"beir:{CRANFIELD}", k=KS, depth=1400), read_qrels(f"beir:{CRANFIELD}")
    assert result.inputs["qrels"]["judgements"] == 1612
    for name, values in of_trec_eval({query: qrels[query] for query in ids[1]}, run_of(stores, "cosine")).items():
        assert result.samples[name].tolist() == values, name


def test_ties_are_counted_and_said(task):
    (documents, queries), qrels, path = task
    result, run = retrieval(documents, queries, qrels=path, k=(5,)), run_of(task[0], "cosine")
    tied = differing = 0
    for query, of in qrels.items():
        first = sorted(run[query], key=lambda each: (run[query][each], each), reverse=True)[:6]
        pairs = [(a, b) for a, b in pairwise(first) if run[query][a] == run[query][b]]
        tied += bool(pairs)
        differing += any(max(of.get(a, 0), 0) != max(of.get(b, 0), 0) for a, b in pairs)
    assert result.parameters["ties"] == {"queries": tied, "of_other_grades": differing}
    assert 0 < differing < tied
    assert any(f"{differing} of 35 queries have documents of one score" in each for each in result.remarks)


def test_a_query_is_not_its_own_document(task, make_store):
    """As trec_eval has it of the run and the judgements without it; other queries lose no document."""
    (documents, _), _, path = task
    ids = [str(each) for each in documents.sample_ids]
    values = documents.gather(np.arange(80), "embedding", np.zeros(80, int))
    queries = make_store("own", values[::4].astype(np.float32), sample_ids=[*ids[::4][:-2], "q1", "q2"])
    judged = {query: {ids[(7 * i + j) % 80]: j for j in range(5)} for i, query in enumerate(ids[::4][:-2])}
    judged |= {ids[0]: {ids[0]: 3, ids[9]: 1}, "q1": {ids[5]: 2}}
    path = write_qrels(documents.path.parent / "own.tsv", judged)
    run = run_of((documents, queries), "cosine")
    result = retrieval(documents, queries, qrels=path, k=KS, exclude_self=True)
    without = [{q: {d: of for d, of in each.items() if d != q} for q, each in of.items()} for of in (judged, run)]
    for name, found in of_trec_eval(*without).items():
        assert result.samples[name].tolist() == found, name
    assert result.inputs["qrels"]["own"] >= 1
    one = retrieval(documents, documents, qrels=write_qrels(documents.path.parent / "one.tsv", {ids[0]: {ids[9]: 1}}))
    assert one.parameters["exclude_self"]


def test_depth_is_that_of_the_run(task):
    (documents, queries), qrels, path = task
    run = run_of((documents, queries), "cosine")
    cut = {
        query: dict(sorted(of.items(), key=lambda each: (each[1], each[0]), reverse=True)[:12])
        for query, of in run.items()
    }
    result = retrieval(documents, queries, qrels=path, k=(3,), depth=12)
    for name in ("map", "mrr"):
        assert result.samples[name].tolist() == of_trec_eval(qrels, cut)[name]


def test_blocks_change_nothing(task, monkeypatch):
    (documents, queries), _, path = task
    whole = retrieval(documents, queries, qrels=path)
    monkeypatch.setattr("evalsuite.ranking._FLOATS", 80 * 7)
    monkeypatch.setattr("featcache.rows._BLOCK_FLOATS", 4 * 11)
    assert retrieval(documents, queries, qrels=path) == whole


def test_dot_products_are_proved_like_cosines(rng):
    bank, query = (rng.normal(size=(n, 6)) * 10.0 ** rng.integers(-2, 3, (n, 1)) for n in (300, 20))
    bank, query = bank.astype(np.float32), query.astype(np.float32)
    exact = (query[:, None].astype(np.float64) * bank[None]).sum(axis=2).astype(np.float32)
    found = [search([bank[:100], bank[100:]], query, 30, similarity="dot", backend=each) for each in ("faiss", "torch")]
    order = np.argsort(-exact, axis=1, kind="stable")[:, :30]
    for score, row in found:
        np.testing.assert_array_equal(row, order)
        np.testing.assert_array_equal(score, np.take_along_axis(exact, order, axis=1))
    with pytest.raises(ValueError, match="bank row 7 is not finite, or too long for dot products"):
        search([np.where(np.arange(300)[:, None] == 7, 1e30, bank).astype(np.float32)], query, 3, similarity="dot")


@pytest.mark.parametrize("two_stores", [False, True])
def test_by_labels_equals_scikit_learn_and_a_slow_loop(rng, clusters, make_store, two_stores):
    labels = np.repeat([0, 1, 2, 3], [12, 12, 5, 1])
    values = clusters(rng.normal(size=(4, 6)), 12, spread=1.0)[np.r_[0:12, 12:24, 24:29, 36]]
    store = make_store("a", values, labels=labels, class_names=["a", "b", "c", "d"])
    other = (
        make_store("b", values[:9] + 0.1, labels=labels[:9], class_names=["a", "b", "c", "d"]) if two_stores else None
    )
    result = retrieval(store, other, labels=True, k=(1, 4))
    run = run_of((store, other or store), "cosine")
    truth = dict(zip(map(str, store.sample_ids), labels.tolist(), strict=True))
    expected = []
    for number, (query, of) in enumerate(run.items()):
        ids = [each for each in of if two_stores or each != query]
        relevant = np.array([truth[each] == labels[number] for each in ids])
        score = np.array([of[each] for each in ids])
        first = relevant[np.argsort(-score, kind="stable")]
        mean = average_precision_score(relevant, score) if relevant.any() else 0.0
        expected.append([mean, first[:4].any(), first[:4].mean(), first[:4].sum() / max(1, relevant.sum())])
    found = [result.samples[name] for name in ("map", "hit@4", "precision@4", "recall@4")]
    np.testing.assert_allclose(np.transpose(found), expected, atol=1e-12)
    if not two_stores:
        assert "1 queries have no other document of their class: they count as 0" in result.remarks


def test_skewness_is_scipys(rng):
    counts = rng.poisson(2, 200)
    assert skewness(counts) == pytest.approx(skew(counts), abs=1e-12)
    assert skewness(np.full(5, 3)) == 0


def test_hubs_are_counted(make_store, tmp_path):
    documents = make_store("d", np.array([[1.0, 0], [0.9, 0.1], [0, -1]]), sample_ids=["a", "b", "c"])
    queries = make_store("q", np.array([[1.0, 0], [1, -0.01], [0.9, 0.1], [0.8, 0.2]]), sample_ids=list("wxyz"))
    path = write_qrels(tmp_path / "q.tsv", {query: {"a": 1} for query in "wxyz"})
    result = retrieval(documents, queries, qrels=path, k=(1, 2))
    assert result.metrics["hubness/never@1"].value == pytest.approx(1 / 3)
    assert result.metrics["hubness/skewness@1"].value == pytest.approx(skew([2, 2, 0]))


def test_another_encoder_of_the_queries_is_said(task, make_store, rng):
    (documents, _), _, path = task
    ids = [f"q{i}" for i in range(40)]
    student = make_store("s", rng.normal(size=(40, 4)), sample_ids=ids, fingerprint="student", encoder_name="small")
    with pytest.raises(ValueError, match="made by encoder"):
        retrieval(documents, student, qrels=path)
    result = retrieval(documents, student, qrels=path, asymmetric=True)
    assert result.parameters["asymmetric"]
    assert any("queries are of small (student), documents of arrays" in each for each in result.remarks)
    wide = make_store("w", rng.normal(size=(40, 5)), sample_ids=ids, fingerprint="wide")
    with pytest.raises(ValueError, match="equally wide"):
        retrieval(documents, wide, qrels=path, asymmetric=True)


def test_what_no_store_has_is_refused_or_counted(task, make_store, rng, tmp_path):
    (documents, queries), _, _ = task
    ids = [str(each) for each in documents.sample_ids]
    judged = {"q0": {ids[0]: 1, "gone": 1, "away, too": 2}, "nobody": {ids[1]: 1}}
    path = write_qrels(tmp_path / "other.tsv", judged)
    with pytest.raises(
        ValueError, match=r"judges 1 queries that .*q.zarr has not \('nobody'\) and 2 documents .*'gone', 'away, too'"
    ):
        retrieval(documents, queries, qrels=path)
    result = retrieval(documents, queries, qrels=path, missing="ignore")
    counts = result.inputs["qrels"]
    assert (counts["missing_queries"], counts["missing_documents"], counts["judgements"]) == (1, 2, 1)
    assert result.samples["recall@100"].tolist() == [1.0]
    with pytest.raises(ValueError, match="judges no document"):
        retrieval(documents, queries, qrels=write_qrels(tmp_path / "n.tsv", {"nobody": {"gone": 1}}), missing="ignore")


def test_failed_documents_can_be_missed_and_failed_queries_are_left_out(rng, make_store, tmp_path):
    documents = make_store("d", rng.normal(size=(6, 3)), sample_ids=list("abcdef"), failed={1: "no text"})
    queries = make_store("q", rng.normal(size=(3, 3)), sample_ids=list("xyz"), failed={2: "no text"})
    path = write_qrels(tmp_path / "q.tsv", {"x": {"a": 1, "b": 2}, "y": {"c": 1}, "z": {"a": 1}})
    result = retrieval(documents, queries, qrels=path)
    assert result.samples["recall@10"].tolist() == [0.5, 1.0]
    assert result.samples["ndcg@10"][0] < 1 / (2 + 1 / np.log2(3)) + 1e-12
    counts = result.inputs["qrels"]
    assert (counts["failed_queries"], counts["failed_documents"]) == (1, 1)


def test_two_results_are_compared_query_by_query(task, make_store, rng):
    (documents, queries), _, path = task
    other = make_store("e", rng.normal(size=(80, 4)), sample_ids=[str(each) for each in documents.sample_ids])
    a, b = retrieval(documents, queries, qrels=path), retrieval(other, queries, qrels=path)
    found = compare(a, b)
    assert found.metrics["ndcg@10"].value == pytest.approx(b.metrics["ndcg@10"].value - a.metrics["ndcg@10"].value)
    assert found.parameters["samples"]["all"]["paired"] == 35


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --qrels FILE, or --labels"),
        ({"qrels": "a", "labels": True}, "not both"),
        ({"qrels": "a"}, "give --query STORE"),
        ({"labels": True, "k": (0,)}, "k must hold whole numbers"),
        ({"labels": True, "depth": 3}, "depth 3 is less than k = 100"),
        ({"labels": True, "similarity": "l2"}, "unknown similarity"),
        ({"labels": True, "missing": "ignore"}, "--missing goes with --qrels"),
        ({"qrels": "a", "query": "b", "drop_identical": True}, "--drop-identical goes with --labels"),
    ],
)
def test_options_that_do_not_go_together(given, message):
    with pytest.raises(ValueError, match=message):
        retrieval("nowhere.zarr", **given)


def test_the_command(task, tmp_path, monkeypatch, capsys):
    (documents, queries), _, path = task
    line = ["evalsuite", "retrieval", "--documents", str(documents.path), "--query", str(queries.path)]
    monkeypatch.setattr("sys.argv", [*line, "--qrels", path, "--k", "5,10", "--json", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as ended:
        programs.run_evalsuite()
    assert not ended.value.code
    assert "ndcg@10" in capsys.readouterr().out
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["parameters"]["k"] == [5, 10]
