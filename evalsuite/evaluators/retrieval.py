"""Retrieval: which documents are nearest to each query, and are they the relevant ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from evalsuite.evaluators import Evaluator, Result, Store, Table, function, option, store

if TYPE_CHECKING:
    import numpy as np

    from evalsuite.ranking import Ranked
    from evalsuite.relevance import Relevance
    from featcache.rows import Rows
else:
    Ranked = Relevance = Rows = Any

DEPTH = 1000
"""Documents of a ranking by qrels, as TREC and BEIR have them."""


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """Rank the documents of a store by their similarity to each query, and judge the rankings.

    Relevant is what `qrels` say (`featcache.qrels`: BEIR's tables or TREC's, or `beir:PATH:SPLIT`); or with `labels` what has
    the query's class, which is image retrieval: the queries are then the documents themselves where no others are given.

    For every K in `k` `ndcg@K`, `recall@K`, `precision@K`, `hit@K` (what metric learning calls R@K), `mrr@K` and `map@K`, and
    of the first `depth` documents `map` and `mrr`: see `evalsuite.ranking.measures`, which is trec_eval to the last digit. All in
    [0, 1], means over the queries, with 95 % intervals over them (`evalsuite.intervals`); the documents are taken as they are.
    `depth` is by default 1,000 with qrels, and all documents with labels.

    Every document is compared (`evalsuite.neighbours.exact`), by `similarity`: the cosine, or the dot product, in float64,
    rounded to float32. Equal ones are ranked by their ids, from the last to the first, as trec_eval does. `parameters["ties"]`
    has how many queries have equal ones among the first documents, up to the largest K, and how many such of different grades,
    where that order counts.

    `hubness/skewness@K`, K being the first of `k`, is the skewness of how often a document is among the first K of a query, and
    `hubness/never@K` the share of documents that never are; they have no intervals. Both are of these queries: the fewer
    there are, the more documents are never found.

    A query without relevant documents counts as 0, as trec_eval has it. Queries without judgements are left out, and so are failed
    ones; relevant documents that failed stay relevant. Qrels that name queries or documents which no store has are refused, or
    with `missing="ignore"` these judgements are left out. `inputs["qrels"]` counts it all.

    With `exclude_self`, and always where both are one store, a query is not its own document: the document of its id is left out
    of its ranking, and of its judgements.

    The queries' encoder must be the documents', unless the two are said to be `asymmetric`: a student that embeds queries into
    its teacher's space, say. Their embeddings must be equally wide; whether they share a space is for whoever says so to know.

    Raises `ValueError` for stores that do not suit, neither qrels nor labels or both, and what `featcache.qrels` refuses.
    """

    order = 15
    summary = "Retrieval from qrels or labels: nDCG, recall, MRR, MAP."
    examples = (
        "evalsuite retrieval --documents corpus.zarr --query dev.zarr --qrels beir:nfcorpus.zip:dev --json retrieval.json",
        "evalsuite retrieval --documents test.zarr --labels --k 1,10",
    )
    unit = "queries"
    drawing = "evalsuite.evaluators._retrieval_charts"
    outcomes = ("k", "ties")

    documents: Store = store("What is searched.")
    query: Store | None = store("What is searched for.", None, shown="with --labels, the documents")
    _: KW_ONLY
    qrels: str | os.PathLike[str] | None = option(
        None, "Judgements: BEIR's .tsv, TREC's file, or beir:PATH:SPLIT.", metavar="FILE", file="read"
    )
    labels: bool = option(False, "Relevant is what has the query's class, instead of qrels.")
    k: Sequence[int] = option((10, 100), "Comma list of cut-offs.", shown="10,100")
    depth: int | None = option(None, "Documents that map and mrr look at.", least=1, shown="1000, with --labels all")
    similarity: str = option("cosine", "By what documents are ranked.", choices=("cosine", "dot"))
    exclude_self: bool = option(False, "A query is not its own document (the one of its id).")
    asymmetric: bool = option(False, "The queries are of another encoder, in the documents' space.")
    missing: str = option("refuse", "Judgements of what no store has: refuse, or ignore.", choices=("refuse", "ignore"))
    drop_identical: bool = option(
        False, "With --labels: leave out queries whose image the documents have too, under another id."
    )
    any_precision: bool = option(False, "Compare stores in whatever precision they were made and kept.")
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.labels == (self.qrels is not None):
            raise ValueError("give --qrels FILE, or --labels to go by classes" + (", not both" if self.labels else ""))
        if self.query is None and not self.labels:
            raise ValueError("give --query STORE, whose queries the qrels judge")
        if self.drop_identical and not self.labels:
            raise ValueError("--drop-identical goes with --labels; with qrels give --exclude-self")
        if self.missing == "ignore" and self.labels:
            raise ValueError("--missing goes with --qrels; labels name nothing that is missing")
        if not self._ks or any(
            isinstance(each, bool) or not isinstance(each, Integral) or each < 1 for each in self._ks
        ):
            raise ValueError(f"k must hold whole numbers of at least 1, got {self.k}")
        if self.depth is not None and self.depth < max(self._ks):
            raise ValueError(f"depth {self.depth} is less than k = {max(self._ks)}; give as much or more")
        if self.similarity not in ("cosine", "dot"):
            raise ValueError(f"unknown similarity {self.similarity!r}; use cosine or dot")

    @property
    def _ks(self) -> tuple[int, ...]:
        given: Any = self.k
        return tuple(dict.fromkeys([given] if isinstance(given, Integral) else given))

    def look(self) -> dict[str, Rows]:
        from evalsuite.sides import require_one_space
        from featcache.qrels import read_qrels

        found = super().look()
        if self.qrels is not None:
            read_qrels(os.fspath(self.qrels))
        if "query" in found:
            require_one_space(found["documents"], found["query"], self.any_precision, self.asymmetric)
        return found

    def run(self) -> Result:
        import numpy as np

        from evalsuite.ranking import rank
        from evalsuite.result import Result, content_of, versions

        task = self._by_labels() if self.labels else self._by_qrels()
        remarks = [*task.remarks, *task.encoder_remarks()]
        ks = tuple(map(int, self._ks))
        depth = self.depth or max(len(task.documents) if self.labels else DEPTH, *ks)
        ranked = rank(
            task.documents,
            task.queries,
            task.relevance,
            task.own,
            ks=ks,
            depth=depth,
            similarity=self.similarity,
            progress=self.progress or (lambda done, of: None),
        )
        return Result(
            "retrieval",
            task.inputs,
            {
                "relevance": "labels" if self.labels else "qrels",
                "judgements": task.digest,
                "k": list(ks),
                "depth": depth,
                "similarity": self.similarity,
                "exclude_self": task.without_self,
                "asymmetric": task.two_encoders,
                "missing": self.missing,
                "drop_identical": self.drop_identical,
                "any_precision": self.any_precision,
                "ties": dict(zip(("queries", "of_other_grades"), ranked.ties.sum(axis=0).tolist(), strict=True)),
            },
            _metrics(ranked, ks[0]),
            versions("faiss-cpu", "faiss-gpu", "torch"),
            {"sample_id": task.queries.sample_ids.astype(np.str_), "content": content_of(task.queries)}
            | ranked.measures,
            remarks=[*remarks, *_tie_remarks(ranked, max(ks))],
        )

    @classmethod
    def table(cls, result: Result) -> Table:
        from evalsuite.table import metric_table

        given, ties = result.parameters, result.parameters["ties"]
        by = "by classes" if given["relevance"] == "labels" else f"by {result.inputs['qrels']['path']}"
        said = f"{by}, {given['similarity']}; map and mrr of the first {given['depth']:,} documents"
        return metric_table(result, [said, f"queries with documents of one score: {ties['queries']:,}"])

    def _by_qrels(self) -> _Task:
        import numpy as np

        from evalsuite.collapse import collapse_remarks
        from evalsuite.relevance import digest, judged
        from evalsuite.sides import Sides
        from featcache.qrels import read_qrels
        from featcache.rows import Rows, left_out_remarks

        assert self.qrels is not None
        assert self.query is not None
        qrels = read_qrels(os.fspath(self.qrels))
        whole = Rows.of(self.documents), Rows.of(self.query)
        sides = Sides(self.any_precision, self.asymmetric, documents=whole[0], query=whole[1])
        without_self = self.exclude_self or sides.one_store
        documents = whole[0].pick(_last_id_first(whole[0]))
        source, ignore = os.fspath(self.qrels), self.missing == "ignore"
        found = judged(qrels, source, documents, whole[1], ignore_missing=ignore, exclude_self=without_self)
        place = {str(each): number for number, each in enumerate(documents.sample_ids)} if without_self else {}
        own = np.array([place.get(str(each), -1) for each in found.queries.sample_ids], np.int64)
        record = {"documents": whole[0].record(), "query": found.queries.record()}
        remarks = [
            *found.remarks,
            *collapse_remarks("documents", documents),
            *(each for role, rows in zip(record, whole, strict=True) for each in left_out_remarks(role, rows)),
        ]
        record["qrels"] = {"path": source, **found.counts}
        return _Task(documents, found.queries, found.relevance, own, record, remarks, digest(qrels), without_self)

    def _by_labels(self) -> _Task:
        import numpy as np

        from evalsuite.relevance import ByLabels
        from evalsuite.sides import Sides
        from featcache.classes import aligned_labels

        query = self.documents if self.query is None else self.query
        sides = Sides(self.any_precision, self.asymmetric, documents=self.documents, query=query)
        documents, chosen, own = sides.take(self.drop_identical, "other images as queries, or one store as both")
        truth = aligned_labels(documents, chosen)
        where = "of the same store, under another id" if sides.one_store else "of the documents"
        record = sides.record(truth)
        remarks = sides.remarks(truth, where, "each finds itself first")
        order = _last_id_first(documents)
        moved = np.argsort(order)
        if own is None and self.exclude_self:
            place = {str(each): number for number, each in enumerate(documents.sample_ids)}
            own = np.array([place.get(str(each), -1) for each in chosen.sample_ids], np.int64)
        own = np.full(len(chosen), -1) if own is None else np.where(own >= 0, moved[own], -1)
        documents = documents.pick(order)
        relevance = ByLabels(truth, documents.labels, own)
        alone = int(((relevance.relevant == 0) & np.isin(truth, documents.labels)).sum())
        if alone:
            remarks.append(f"{alone:,} queries have no other document of their class: they count as 0")
        return _Task(documents, chosen, relevance, own, record, remarks, None, bool((own >= 0).any()))


@dataclass(frozen=True)
class _Task:
    """What is ranked for what; documents from the last id to the first."""

    documents: Rows
    queries: Rows
    relevance: Relevance
    own: np.ndarray
    inputs: dict[str, Any]
    remarks: list[str]
    digest: str | None
    without_self: bool

    @property
    def two_encoders(self) -> bool:
        return self.documents.stores[0].fingerprint != self.queries.stores[0].fingerprint

    def encoder_remarks(self) -> list[str]:
        """Of queries by another encoder, and of queries that are documents."""
        from evalsuite.overlap import overlap

        said, (ours, theirs) = [], (each.stores[0] for each in (self.queries, self.documents))
        if self.two_encoders:
            said.append(
                f"queries are of {ours.encoder_name} ({ours.fingerprint}), documents of {theirs.encoder_name} "
                f"({theirs.fingerprint}): compared as of one space (--asymmetric)"
            )
        hashed = self.documents.hashed and self.queries.hashed
        if self.digest is not None and hashed and not self.without_self:
            same = overlap(self.queries, [self.documents]).count
            if same:
                said.append(
                    f"{same:,} of {len(self.queries):,} queries are documents too: each finds itself first; --exclude-self leaves "
                    "out those of the same id"
                )
        return said


def _last_id_first(rows: Rows) -> np.ndarray:
    """The order in which trec_eval ranks documents of equal score: that of their ids' bytes, backwards."""
    import numpy as np

    ids = [str(each) for each in rows.sample_ids]
    return np.array(sorted(range(len(ids)), key=ids.__getitem__, reverse=True), np.int64)


def _metrics(ranked: Ranked, k: int) -> dict[str, Any]:
    from evalsuite.intervals import share
    from evalsuite.ranking import skewness
    from evalsuite.result import Metric

    why = "of all documents and these queries, none of which is drawn"
    hubness = {f"hubness/skewness@{k}": skewness(ranked.among), f"hubness/never@{k}": float((ranked.among == 0).mean())}
    return {name: share(each).metric() for name, each in ranked.measures.items()} | {
        name: Metric(each, no_ci95=why) for name, each in hubness.items()
    }


def _tie_remarks(ranked: Ranked, k: int) -> list[str]:
    tied, differing = ranked.ties.sum(axis=0).tolist()
    if not differing:
        return []
    return [
        f"{differing:,} of {len(ranked.ties):,} queries have documents of one score and different grades among the first {k:,} "
        f"({tied:,} have documents of one score): their ids decide, the last first, as trec_eval has it"
    ]


retrieval = function(Retrieval)
