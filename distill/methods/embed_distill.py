"""EmbedDistill (Kim et al. 2023, arXiv 2301.12005): a small encoder of queries for the documents that a teacher embedded."""

import hashlib
from collections.abc import Callable
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from distill.methods import Batch, Features, Fitted, Method, Preparing
from distill.methods._options import refuse_negative, refuse_not_positive
from distill.objectives import MASKED, ce, cosines, gathered, kl
from distill.objectives import match as matched
from featcache.corpora import open_corpus
from featcache.extraction.samples import content_hash
from featcache.inputs import Input, Views
from featcache.qrels import Qrels, read_qrels
from featcache.rows import Rows
from featcache.store import open_store
from featcache.store.layout import EMBEDDING

METRICS = ("l2", "cosine")
SIMILARITIES = ("cosine", "dot")
KEPT_BYTES = 2**28
"""Of documents that were rendered for a student that encodes them."""
BLOCK = 1024
"""Queries whose nearest documents are looked for at a time."""


class EmbedDistill(Method):
    """A query encoder for its teacher's documents, by matched queries and by scores (EmbedDistill, arXiv 2301.12005).

    Samples are queries; the documents are a store of the same teacher, served as they are: no weight of theirs trains, and
    who looks for documents afterwards asks that store with the student's embedding of a query. The student's embedding is
    therefore as wide as the teacher's (its projection is the paper's P). With q a query, d the documents of the batch, t the
    teacher's and s the student's embedding,

        L = match · d(s(q), t(q))                                                       eq. 7 and 8
          + scores · KL(softmax_d(t(q)·t(d) / T) ‖ softmax_d(s(q)·t(d) / T))
          + labels · CE(y_q, softmax_d(s(q)·t(d) / T)),    y_q the grades of the batch's documents for q, of sum 1

    A batch's documents are one of each query's own, drawn every time; the `nearest` of each query by the teacher; and
    `random` others: all of them candidates of all its queries, each once. A query's own documents are those that `qrels`
    give a grade above 0; of a query that qrels do not name and whose id is `DOCID#k`, a generated one, the document DOCID.
    Queries without any count in the other terms alone. What the paper says of its temperature and of how many documents a
    query is scored with is not known to us: they are options.

    Terms: "match", "relation_kl", "ce", those whose weight is not 0; "ce" where any query has a document.

    With `own_documents` the student encodes documents too, as in the paper's comparison with two small towers: a batch's
    documents are then one of each query's own, as the student sees their texts; they are matched as queries are, and scores
    are s(q)·s(d). Queries without a document share the batch's others. Twice the work.

    Options:
        documents: store of the documents, of the same teacher, in whatever precision; held in memory as float32.
        qrels: which documents answer which query: a file, or `beir:PATH:NAME`, see `featcache.qrels`.
        match: weight of the first term.
        scores: weight of the second term.
        labels: weight of the third term.
        metric: what is between s(q) and t(q): "l2", their distance, which is the paper's; "cosine", 1 − cosine.
        similarity: what a score is: "cosine", or "dot", of embeddings as they are.
        temperature: T.
        nearest: documents nearest to each query by the teacher that join the batch's.
        random: documents drawn for each batch, of each process.
        own_documents: corpus of the documents, which the student then encodes itself.
    """

    points = True
    turns = False
    wide = True

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        documents: str = "",
        qrels: str = "",
        match: float = 1.0,
        scores: float = 1.0,
        labels: float = 1.0,
        metric: str = "l2",
        similarity: str = "cosine",
        temperature: float = 0.05,
        nearest: int = 8,
        random: int = 64,
        own_documents: str = "",
    ):
        super().__init__()
        refuse_negative(match=match, scores=scores, labels=labels, nearest=nearest, random=random)
        refuse_not_positive(temperature=temperature)
        for name, value, known in (("metric", metric, METRICS), ("similarity", similarity, SIMILARITIES)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if not match + scores + labels > 0:
            raise ValueError("match, scores and labels are 0: nothing is left to learn; give one of them a weight")
        self._weights = {"match": match, "relation_kl": scores, "ce": labels}
        self._metric, self._similarity, self._temperature = metric, similarity, temperature
        self._documents, self._qrels, self._nearest, self._random = documents, qrels, nearest, random
        self._own = own_documents
        self.passes = 2 if own_documents else 1
        self.head = None if teacher_dim == student_dim else nn.Linear(student_dim, teacher_dim)
        self._texts: Documents | None = None
        self._drawn: Int64[Tensor, " c"] | None = None
        self.documents: Tensor
        self.pairs: Tensor
        self.grades: Tensor
        self.near: Tensor
        self.read: Tensor
        self.register_buffer("documents", torch.zeros(0, teacher_dim), persistent=False)
        self.register_buffer("pairs", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("grades", torch.zeros(0), persistent=False)
        self.register_buffer("near", torch.zeros(0, 0, dtype=torch.int32))
        self.register_buffer("read", torch.zeros(16, dtype=torch.uint8))

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Read the documents, and find each query's own and its nearest.

        Returns:
            "answered": share of the queries that have a document of their own. Without documents nothing.

        Raises:
            ValueError: there are no documents, they are not sealed or another encoder's, or qrels name ids that are in no store.
        """
        if not self._documents:
            if self._weights["relation_kl"] or self._weights["ce"] or self._own:
                raise ValueError(
                    "scores and labels are of documents: give the teacher's store of them with --set documents=STORE, or leave "
                    "both out with scores=0 and labels=0"
                )
            return {}
        store = open_store(self._documents)
        if not store.sealed:
            raise ValueError(f"{store.path}: is not sealed; finish its extraction first")
        documents = Rows.of(store)
        rows.require_same_encoder(documents, any_precision=True)
        qrels = read_qrels(self._qrels) if self._qrels else {}
        refuse_unknown(qrels, rows, documents, self._qrels)
        said = f"{documents.stores[0].digest} {sorted((query, sorted(of.items())) for query, of in qrels.items())}"
        self.read = torch.tensor(list(hashlib.blake2b(said.encode(), digest_size=16).digest()), dtype=torch.uint8)
        self.documents = torch.from_numpy(documents.take(np.arange(len(documents))))
        self.pairs, self.grades = answers(rows, documents, qrels)
        if self._own:
            self._texts = Documents(self._own, documents)
        elif self._nearest:
            self.near = self._found(given.get("fitted"), len(rows))
            if not len(self.near):
                self.near = self._look_for_nearest(rows, given.get("progress"))
        return {"answered": len((self.pairs // len(documents)).unique()) / len(rows)}

    def _found(self, fitted: Fitted | None, queries: int) -> Tensor:
        """The nearest documents that an earlier `prepare` left, where they are of these documents; else none."""
        left = fitted[0] if fitted else {}
        size = (queries, min(self._nearest, len(self.documents)))
        mine = "near" in left and left["near"].shape == size and torch.equal(left["read"], self.read)
        return left["near"] if mine else self.near

    def _look_for_nearest(self, rows: Rows, progress: Callable[[int, int], None] | None) -> Tensor:
        """(queries, nearest): of each query, the documents of the highest scores by the teacher."""
        most, found = min(self._nearest, len(self.documents)), []
        for block in rows.blocks(BLOCK):
            scores = self._scores(torch.from_numpy(block), self.documents)
            found.append(scores.topk(most).indices.int())
            if progress:
                progress(len(found), -(-len(rows) // BLOCK))
        return torch.cat(found)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError where a checkpoint's documents or qrels are not these."""
        if not torch.equal(state_dict["read"].cpu(), self.read.cpu()):
            raise ValueError(
                f"{self._documents}: the documents, or the qrels, are not those that this run began with; put them back, or "
                "choose another --out"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def target(self, batch: Batch) -> Tensor | None:
        return batch[EMBEDDING] if self.head is None else None

    def inputs(self, batch: Batch, student: nn.Module) -> Tensor:
        """Draws the batch's documents; with `own_documents`, they stand behind the queries."""
        if not len(self.documents):
            return batch.inputs
        self._drawn = self._candidates(batch, torch.rand(len(batch.row), device=batch.row.device), self._random)
        return self._texts.behind(batch, self._drawn) if self._texts else batch.inputs

    def _candidates(self, batch: Batch, draw: Float[Tensor, " b"], random: int) -> Int64[Tensor, " c"]:
        """Documents of this process's share of a batch, −1 for none: one of each query's own, by `draw` of 0 up to 1; then,
        unless the student encodes documents, the nearest, and random ones."""
        row, count = batch.row, len(self.documents)
        own = torch.full_like(row, -1)
        if len(self.pairs):
            first, behind = (torch.searchsorted(self.pairs, key * count) for key in (row, row + 1))
            at = first + (draw * (behind - first)).long()
            own = torch.where(behind > first, self.pairs[at.clamp(max=len(self.pairs) - 1)] % count, own)
        if self._own:
            return own
        near = self.near[row.clamp(min=0)].long() if len(self.near) else row.new_zeros(len(row), 0)
        near = near.masked_fill((row < 0)[:, None], -1)
        return torch.cat([own, near.flatten(), torch.randint(count, (random,), device=row.device)])

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        output = student[EMBEDDING] if self.head is None else self.head(student[EMBEDDING])
        target, queries = batch[EMBEDDING], output[: len(batch.row)]
        terms = {}
        if len(self.documents):
            ids, self._drawn = self._drawn, None
            if ids is None:
                ids = self._candidates(batch, torch.zeros_like(batch.weight), 0)
            every = gathered(ids)
            taught = self.documents[every.clamp(min=0)]
            told = gathered(output[len(queries) :]) if self._own else taught
            if self._own:
                target = torch.cat([target, self.documents[ids.clamp(min=0)]])
            if self._weights["relation_kl"] or self._weights["ce"]:
                terms = self._relations(batch, queries, every, taught, told)
        terms["match"] = matched(output, target, self._metric)
        return {name: self._weights[name] * term for name, term in terms.items() if self._weights[name]}

    def _relations(
        self,
        batch: Batch,
        queries: Float[Tensor, "b d"],
        ids: Int64[Tensor, " c"],
        taught: Float[Tensor, "c d"],
        told: Float[Tensor, "c d"],
    ) -> dict[str, Tensor]:
        """Terms of the scores of a batch's documents, as the teacher (`taught`) and the student (`told`) embed them."""
        nothing = ~once(ids)
        of_teacher = self._scores(batch[EMBEDDING], taught).masked_fill(nothing, MASKED)
        of_student = self._scores(queries, told).masked_fill(nothing, MASKED)
        terms = {"relation_kl": kl(of_teacher, of_student, temperature=self._temperature, weight=batch.weight)}
        if len(self.pairs):
            grade = self._grade(batch.row, ids).masked_fill(nothing, 0)
            total = grade.sum(dim=1)
            share = grade / torch.where(total > 0, total, 1)[:, None]
            terms["ce"] = ce(of_student / self._temperature, share, batch.weight * (total > 0))
        return terms

    def _scores(self, queries: Float[Tensor, "b d"], documents: Float[Tensor, "c d"]) -> Float[Tensor, "b c"]:
        return cosines(queries, documents) if self._similarity == "cosine" else queries @ documents.mT

    def _grade(self, row: Int64[Tensor, " b"], ids: Int64[Tensor, " c"]) -> Float[Tensor, "b c"]:
        """What each document's grade is for each query; 0 where there is none."""
        wanted = row[:, None] * len(self.documents) + ids
        at = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        known = (self.pairs[at] == wanted) & (row >= 0)[:, None] & (ids >= 0)
        return self.grades[at].masked_fill(~known, 0)


class Documents:
    """The documents of a store as their corpus has them, for a student that encodes them itself."""

    def __init__(self, spec: str, documents: Rows):
        self._corpus = open_corpus(spec)
        place = {name: number for number, name in enumerate(self._corpus.ids)}
        self._ids = documents.sample_ids.tolist()
        missing = [name for name in self._ids if name not in place]
        if missing:
            raise ValueError(
                f"{spec}: lacks {len(missing):,} documents of {documents.name} (first: {missing[0]}); give the corpus that the "
                "store was extracted from"
            )
        self._place, self._content = [place[name] for name in self._ids], documents.content
        self._kept: dict[int, np.ndarray] = {}
        self._room = KEPT_BYTES

    def behind(self, batch: Batch, ids: Int64[Tensor, " b"]) -> Tensor:
        """The batch's inputs with those of these documents behind them; of texts, all as long as the longest."""
        rendered = np.stack([self._rendered(batch.preprocess, number) for number in ids.clamp(min=0).tolist()])
        mine = batch.preprocess.to_model(torch.from_numpy(rendered).to(batch.inputs.device))
        width = max(batch.inputs.shape[-1], mine.shape[-1])
        return torch.cat([F.pad(each, (0, width - each.shape[-1]), value=-1) for each in (batch.inputs, mine)])

    def _rendered(self, given: Input[Any, Any], number: int) -> np.ndarray:
        if number in self._kept:
            return self._kept[number]
        encoded, seen = self._corpus.read(self._place[number]), self._content[number]
        if seen.any() and content_hash(encoded) != seen.tobytes():
            raise ValueError(
                f"{self._corpus.spec}: {self._ids[number]} has changed since its store was extracted; put it back, or extract again"
            )
        item = given.decode(encoded)
        size = given.size_of(item)
        found = given.render(item, given.draw(size, Views(), self._ids[number], 0), size)
        if found.nbytes <= self._room:
            self._kept[number], self._room = found, self._room - found.nbytes
        return found


def once(ids: Int64[Tensor, " c"]) -> Bool[Tensor, " c"]:
    """Where an id stands for the first time; nowhere for −1."""
    order = ids.argsort(stable=True)
    ordered = ids[order]
    first = torch.cat([ordered[:1] >= 0, (ordered[1:] != ordered[:-1]) & (ordered[1:] >= 0)])
    return torch.zeros_like(first).scatter(0, order, first)


def answers(rows: Rows, documents: Rows, qrels: Qrels) -> tuple[Int64[Tensor, " p"], Float[Tensor, " p"]]:
    """Pairs of a query and a document of its own, in order, as query · number of documents + document; and their grades.

    A failed document answers nothing.
    """
    place = {name: number for number, name in enumerate(documents.sample_ids.tolist())}
    found: dict[int, int] = {}
    for row, query in enumerate(rows.sample_ids.tolist()):
        made_of = query.rpartition("#")[0]
        for name, grade in qrels.get(query, {made_of: 1}).items():
            if grade > 0 and name in place:
                found[row * len(place) + place[name]] = grade
    pairs = sorted(found)
    return torch.tensor(pairs, dtype=torch.int64), torch.tensor([float(found[pair]) for pair in pairs])


def refuse_unknown(qrels: Qrels, rows: Rows, documents: Rows, named: str) -> None:
    """Raises ValueError where qrels name a query or a document that the whole stores, failed and held-out rows included, lack."""
    judged = dict.fromkeys(name for of in qrels.values() for name in of)
    for what, ids, source in (("queries", qrels, rows), ("documents", judged, documents)):
        known = {str(name) for store in source.stores for name in store.sample_ids}
        if unknown := [name for name in ids if name not in known]:
            raise ValueError(
                f"{named}: {len(unknown):,} of its {len(ids):,} {what} are not in {source.name} (first: {unknown[0]}); give the "
                "qrels of these stores"
            )
