"""EmbedDistill: the formula in float64 pair by pair, which documents a query is scored with, and bits that resume."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fit_cases import Interrupted, interrupt_at, without_speed
from small_world import make_images, make_teacher
from torch import nn

import distill
from distill.methods.embed_distill import Documents, EmbedDistill, once
from distill.testing import MethodContract
from distill.testing.methods import ROWS, batch_of, teacher_batch, write_token_store
from distill.training import loop
from featcache import extract, open_corpus
from featcache.inputs.texts import Texts
from featcache.rows import Rows
from featcache.store import open_store

WIDTH, QUERIES, DOCUMENTS, T = 4, 5, 9, 0.5
IDS = ["a", "b", "d3#0", "d3#1", "free"]
QRELS = "a\td0\t2\na\td7\t1\nb\td7\t3\nb\td1\t0\n"
"""b has one document, a two, generated queries one, `free` none."""


@pytest.fixture
def world(make_store, tmp_path, rng):
    """Queries, a store of documents of the same encoder, of which d5 failed, and qrels."""
    (tmp_path / "qrels.tsv").write_text(QRELS)
    ids = [f"d{number}" for number in range(DOCUMENTS)]
    documents = make_store("documents", rng.normal(size=(DOCUMENTS, WIDTH)), sample_ids=ids, failed={5: "blank"})
    queries = make_store("queries", rng.normal(size=(QUERIES, WIDTH)), sample_ids=IDS)
    return {"rows": Rows.of(queries), "documents": str(documents.path), "qrels": str(tmp_path / "qrels.tsv")}


def prepared(world, **options):
    given = {"documents": world["documents"], "qrels": world["qrels"], "temperature": T, **options}
    method = EmbedDistill(WIDTH, WIDTH, **given)
    return method, method.prepare(world["rows"], seed=0)


def batch(world, row=range(QUERIES), weight=None):
    embedding = torch.from_numpy(world["rows"].take(np.array(row)))
    found = batch_of({"embedding": embedding}, torch.tensor(row))
    return found if weight is None else replace(found, weight=torch.tensor(weight))


STUDENT = torch.tensor([[1.0, 0, 0, 2], [0, 1, 0, -1], [0.5, 0, 1, 0], [1, 1, 1, 0], [0, -1, 0, 1]])


def slow(world, student, candidates, weight, similarity):
    """Both terms of the scores, one query and one document at a time."""
    documents, rows = open_store(world["documents"]), world["rows"]
    grades = {"a": {"d0": 2, "d7": 1}, "b": {"d7": 3}, "d3#0": {"d3": 1}, "d3#1": {"d3": 1}, "free": {}}
    names = documents.sample_ids.tolist()
    vectors = {name: documents.gather([names.index(name)])[0].astype(np.float64) for name in candidates}

    def scores(query):
        found = []
        for name in candidates:
            score = float(query @ vectors[name])
            found.append(
                score / (np.linalg.norm(query) * np.linalg.norm(vectors[name])) if similarity == "cosine" else score
            )
        return np.array(found) / T

    def log_softmax(x):
        return x - np.log(np.exp(x).sum())

    kls, ces, known = [], [], []
    for number, query in enumerate(IDS):
        p, q = (
            log_softmax(scores(rows.take(np.array([number]))[0].astype(np.float64))),
            log_softmax(scores(student[number])),
        )
        kls.append((np.exp(p) * (p - q)).sum())
        share = np.array([grades[query].get(name, 0) for name in candidates], float)
        known.append(weight[number] * (share.sum() > 0))
        ces.append(-(share / max(share.sum(), 1) * q).sum())
    return np.average(kls, weights=weight), np.average(ces, weights=known)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("nearest", [0, 2])
def test_the_terms_are_the_formula(world, similarity, nearest):
    method, report = prepared(world, similarity=similarity, nearest=nearest, scores=2.0, labels=0.5, match=3.0)
    assert report == {"answered": pytest.approx(4 / 5)}
    weight = [1.0, 2.0, 0.5, 3.0, 1.0]
    documents = Rows.of(world["documents"])
    table = world["rows"].take(np.arange(QUERIES)).astype(np.float64) @ documents.take(np.arange(DOCUMENTS - 1)).T
    if similarity == "cosine":
        table = table / np.linalg.norm(documents.take(np.arange(DOCUMENTS - 1)), axis=1)
    near = np.argsort(-table, axis=1)[:, :nearest]
    names = documents.sample_ids
    candidates = sorted({"d0", "d7", "d3", *names[near].ravel()})  # the first of each query's own, and the nearest
    terms = method.loss({"embedding": STUDENT}, batch(world, weight=weight))
    relation, labels = slow(world, STUDENT.double().numpy(), candidates, weight, similarity)
    distance = np.linalg.norm(STUDENT.numpy() - world["rows"].take(np.arange(QUERIES)), axis=1).mean()
    expected = {"relation_kl": 2 * relation, "ce": 0.5 * labels, "match": 3 * distance}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_the_terms_have_these_values(make_store, tmp_path):
    """Two queries and three documents at angles of 0°, 90° and 180°."""
    (tmp_path / "qrels.tsv").write_text("a\tx\t1\nb\ty\t1\n")
    make_store("documents", np.array([[1.0, 0], [0, 1], [-1, 0]]), sample_ids=["x", "y", "z"])
    rows = Rows.of(make_store("queries", np.array([[1.0, 0], [0, 1]]), sample_ids=["a", "b"]))
    world = {"rows": rows, "documents": str(tmp_path / "documents.zarr"), "qrels": str(tmp_path / "qrels.tsv")}
    method = EmbedDistill(2, 2, documents=world["documents"], qrels=world["qrels"], nearest=3, temperature=1.0)
    method.prepare(rows, seed=0)
    student = {"embedding": torch.tensor([[0.0, 1.0], [0.0, 3.0]])}
    found = {name: term.item() for name, term in method.loss(student, batch(world, [0, 1])).items()}
    assert found == pytest.approx({"relation_kl": 0.2371603, "ce": 1.0514447, "match": 1.7071068}, rel=1e-5)


def test_a_student_that_is_the_teacher_is_the_least_of_both(world):
    method, _ = prepared(world, labels=0.0)
    student = {"embedding": batch(world)["embedding"].clone().requires_grad_()}
    terms = method.loss(student, batch(world))
    assert terms["match"].item() == 0
    assert terms["relation_kl"].item() == pytest.approx(0, abs=1e-6)
    terms["relation_kl"].backward()
    assert student["embedding"].grad.abs().max() < 1e-6


def test_what_is_drawn_is_among_a_querys_own_and_counts_once(world):
    method, _ = prepared(world, nearest=0, random=0)
    drawn = set()
    for seed in range(40):
        torch.manual_seed(seed)
        assert method.inputs(batch(world), nn.Identity()) is not None
        drawn.add(tuple(method._drawn.tolist()))
    a, b, d3 = [0, 6], 6, 3  # d5 failed, so d7 is the seventh
    assert drawn == {(first, b, d3, d3, -1) for first in a}
    terms = method.loss({"embedding": STUDENT}, batch(world))
    again = method.loss({"embedding": STUDENT}, batch(world))  # nothing is left of what was drawn
    assert terms.keys() == again.keys() == {"relation_kl", "ce", "match"}
    assert once(torch.tensor([5, -1, 5, 0, -1, 0, 2])).tolist() == [True, False, False, True, False, False, True]


def test_queries_of_no_row_are_matched_and_taught_but_have_no_label(world):
    method, _ = prepared(world, nearest=2, random=0)
    free = batch(world, row=[-1, -1])
    terms = method.loss({"embedding": STUDENT[:2]}, free)
    assert terms["ce"].item() == 0 == terms["relation_kl"].item()


def test_a_student_of_another_width_has_a_head(world):
    method = EmbedDistill(WIDTH, 3, documents=world["documents"])
    method.prepare(world["rows"], seed=0)
    assert method.head.weight.shape == (WIDTH, 3)
    assert method.target(batch(world)) is None
    terms = method.loss({"embedding": STUDENT[:, :3]}, batch(world))
    expected = (STUDENT[:, :3] @ method.head.weight.T + method.head.bias - batch(world)["embedding"]).norm(dim=1).mean()
    assert terms["match"].item() == pytest.approx(expected.item(), rel=1e-6)


class TestWithDocuments(MethodContract):
    """The contract, with documents."""

    name = "embed_distill"

    @pytest.fixture
    def case(self, tmp_path):
        write_token_store(tmp_path / "documents.zarr", seed=7)
        (tmp_path / "qrels.tsv").write_text("".join(f"{query}\t{query + 3}\t1\n" for query in range(5)))
        return self.name, {"documents": str(tmp_path / "documents.zarr"), "qrels": str(tmp_path / "qrels.tsv")}

    @pytest.fixture
    def teacher(self, method, rows):
        return replace(teacher_batch(rows, method.fields), row=torch.arange(ROWS))


def test_what_does_not_fit_is_refused(world, make_store, tmp_path, rng):
    rows = world["rows"]
    for options, message in (
        ({}, "scores and labels are of documents: give the teacher's store"),
        ({"documents": str(tmp_path / "none.zarr")}, "none.zarr: no such store"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbedDistill(WIDTH, WIDTH, **options).prepare(rows, seed=0)
    other = make_store("other", rng.normal(size=(3, WIDTH)), fingerprint="another")
    wider = make_store("wider", rng.normal(size=(3, WIDTH + 1)))
    for store in (other, wider):
        with pytest.raises(ValueError, match="extract both with the same encoder"):
            prepared({**world, "documents": str(store.path)})
    for line, message in (
        ("a\td99\t1", r"qrels.tsv: 1 of its 1 documents are not in .*documents.zarr \(first: d99\)"),
        ("z,\n\td0\t1\nz\td0\t1", "line 1 is no judgement"),
        ("z\td0\t1\na\td0\t1", r"qrels.tsv: 1 of its 2 queries are not in .*queries.zarr \(first: z\)"),
    ):
        (tmp_path / "qrels.tsv").write_text(line)
        with pytest.raises(ValueError, match=message):
            prepared(world)
    for options, message in (
        ({"metric": "mse"}, "unknown metric 'mse'; known: l2, cosine"),
        ({"similarity": "l2"}, "unknown similarity"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"nearest": -1}, "nearest must not be negative"),
        ({"match": 0.0, "scores": 0.0, "labels": 0.0}, "nothing is left to learn"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbedDistill(WIDTH, WIDTH, **options)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 images to look with, 10 to be found, of one teacher; and which answer which."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, count) in enumerate({"queries": 24, "documents": 10}.items()):
        corpus = open_corpus(str(make_images(folder / name, count, seed=seed)))
        extract(corpus, make_teacher(), folder / f"{name}.zarr", device="cpu", precision="fp32")
    (folder / "qrels.tsv").write_text("".join(f"{query:03d}.png\t{query % 10:03d}.png\t1\n" for query in range(20)))
    return folder


@pytest.mark.parametrize("own", [False, True])
def test_a_resumed_run_has_the_same_bits_and_the_teachers_width(pictures, tmp_path, monkeypatch, own):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    paths = {"documents": str(pictures / "documents.zarr"), "qrels": str(pictures / "qrels.tsv"), "nearest": 2}
    options = paths | ({"own_documents": str(pictures / "documents")} if own else {})

    def train(out, **given):
        few = {"student": "tiny", "image_size": 16, "batch_size": 8, "epochs": 2, "method_options": options}
        queries = str(pictures / "queries.zarr"), str(pictures / "queries")
        return distill.fit(
            *queries, out=out, method="embed_distill", checkpoint_minutes=0.0, device="cpu", **few, **given
        )

    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("training", 4))
    if not own:
        qrels = (pictures / "qrels.tsv").read_text()
        (pictures / "qrels.tsv").write_text(qrels + "023.png\t000.png\t1\n")
        with pytest.raises(ValueError, match="the documents, or the qrels, are not those that this run began with"):
            train(tmp_path / "run", resume=True)
        (pictures / "qrels.tsv").write_text(qrels)
    run = train(tmp_path / "run", resume=True)
    assert (run.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()
    assert without_speed(run.metrics) == without_speed(whole.metrics)
    assert {"loss/ce", "loss/relation_kl", "loss/match"} <= whole.metrics[-1].keys()
    assert whole.metrics[-1]["mapping/answered"] == pytest.approx(20 / 24)
    assert json.loads((run.path / "student.json").read_text())["embedding_dim"] == 12


def test_a_student_that_encodes_documents_sees_their_images(pictures):
    """Behind the queries, each query's own; scored as the student embeds them, matched with what the teacher saw."""
    documents, rows = Rows.of(str(pictures / "documents.zarr")), Rows.of(str(pictures / "queries.zarr"))
    given = {"documents": str(pictures / "documents.zarr"), "qrels": str(pictures / "qrels.tsv"), "temperature": T}
    method = EmbedDistill(12, 12, **given, own_documents=str(pictures / "documents"))
    method.prepare(rows, seed=0)
    shown = batch_of({"embedding": torch.from_numpy(rows.take(np.arange(4)))}, torch.arange(4))
    preprocess = make_teacher().preprocess
    shown = replace(shown, inputs=torch.zeros(4, 3, 16, 16), preprocess=preprocess)
    inputs = method.inputs(shown, nn.Identity())
    assert inputs.shape == (8, 3, 16, 16)
    taught = make_teacher().module.eval()(inputs[4:])["embedding"]
    np.testing.assert_allclose(taught.detach(), documents.take(np.arange(4)), rtol=1e-2)
    student = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    terms = method.loss({"embedding": student}, shown)

    def shares(left, right):
        unit = [each / each.norm(dim=1, keepdim=True) for each in (left.double(), right.double())]
        return (unit[0] @ unit[1].T / T).log_softmax(1)

    p, q = shares(shown["embedding"], method.documents[:4]), shares(student[:4], student[4:])
    assert terms["relation_kl"].item() == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-5)
    assert terms["ce"].item() == pytest.approx(-q.diagonal().mean().item(), rel=1e-5)
    seen = torch.cat([shown["embedding"], method.documents[:4]])
    assert terms["match"].item() == pytest.approx((student - seen).norm(dim=1).mean().item(), rel=1e-5)


def test_texts_behind_queries_are_as_long_as_the_longest(make_store, tmp_path, rng):
    (tmp_path / "documents.txt").write_text("a long one\nshort\n", encoding="utf-8")
    corpus = open_corpus(f"lines:{tmp_path / 'documents.txt'}")
    documents = Rows.of(make_store("documents", rng.normal(size=(2, WIDTH)), sample_ids=list(corpus.ids)))
    behind = Documents(corpus.spec, documents)
    queries = torch.tensor([[104, 105, -1], [111, 104, 33]])
    texts = Texts(tokenizer="bytes", max_length=12)
    shown = replace(batch_of({"embedding": torch.zeros(2, WIDTH)}), inputs=queries, preprocess=texts)
    for _ in range(2):  # rendered, then remembered
        found = behind.behind(shown, torch.tensor([1, -1]))
        texts = ["".join(map(chr, row[row >= 0].tolist())) for row in found]
        assert texts == ["hi", "oh!", "short", "a long one"]
        assert found.dtype == torch.int64
    (tmp_path / "documents.txt").write_text("short\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"documents.txt: lacks 1 documents of .*documents.zarr"):
        Documents(corpus.spec, documents)
