"""Which documents are relevant to which queries, in numbers of rows: by qrels, or by labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from featcache.qrels import Qrels
from featcache.rows import Rows

_SHOWN = 3  # ids named in a refusal
_FAILED, _UNKNOWN = -1, -2


@runtime_checkable
class Relevance(Protocol):
    """Of queries 0…q−1 and documents 0…n−1."""

    relevant: Int[np.ndarray, " q"]
    """How many relevant documents each query has, retrieved or not."""

    def grades(self, query: Int[np.ndarray, " b"], document: Int[np.ndarray, "b ranks"]) -> Int[np.ndarray, "b ranks"]:
        """Of each query's documents; 0 where there is no judgement, or no document (−1)."""

    def ideal(self, query: Int[np.ndarray, " b"], width: int) -> Int[np.ndarray, "b width"]:
        """The highest grades of each query, descending, filled up with 0."""


class ByLabels:
    """A document of the query's class is relevant, with grade 1; not the query itself, where it is a document (`own`, −1: it
    is none). `truth` are the queries' labels in the documents' numbering."""

    def __init__(self, truth: Int[np.ndarray, " q"], labels: Int[np.ndarray, " n"], own: Int[np.ndarray, " q"]):
        self._truth, self._labels = truth, labels
        classes, counts = np.unique(labels, return_counts=True)
        at = np.searchsorted(classes, truth).clip(max=len(classes) - 1)
        self.relevant = np.where(classes[at] == truth, counts[at], 0) - (own >= 0)

    def grades(self, query: Int[np.ndarray, " b"], document: Int[np.ndarray, "b ranks"]) -> Int[np.ndarray, "b ranks"]:
        return ((self._labels[document] == self._truth[query, None]) & (document >= 0)).astype(np.int64)

    def ideal(self, query: Int[np.ndarray, " b"], width: int) -> Int[np.ndarray, "b width"]:
        return (np.arange(width) < self.relevant[query, None]).astype(np.int64)


class ByQrels:
    """Judgements, one for each entry of `query`, `document` and `grade`, of `queries` queries in `documents` documents; document
    −1 is one that failed: it may be relevant, and cannot be found."""

    def __init__(
        self,
        queries: int,
        documents: int,
        query: Int[np.ndarray, " n"],
        document: Int[np.ndarray, " n"],
        grade: Int[np.ndarray, " n"],
    ):
        order = np.lexsort((document, query))
        self._documents, self._grade = documents, grade[order]
        self._pair = query[order] * (documents + 1) + document[order] + 1
        self._start = np.searchsorted(query[order], np.arange(queries + 1))
        self.relevant = np.bincount(query, grade > 0, queries).astype(np.int64)

    def grades(self, query: Int[np.ndarray, " b"], document: Int[np.ndarray, "b ranks"]) -> Int[np.ndarray, "b ranks"]:
        asked = query[:, None] * (self._documents + 1) + document + 1
        at = np.searchsorted(self._pair, asked).clip(max=len(self._pair) - 1)
        return np.where((self._pair[at] == asked) & (document >= 0), self._grade[at], 0)

    def ideal(self, query: Int[np.ndarray, " b"], width: int) -> Int[np.ndarray, "b width"]:
        best = np.zeros((len(query), width), np.int64)
        for row, number in enumerate(query.tolist()):
            of = -np.sort(-self._grade[self._start[number] : self._start[number + 1]].clip(min=0))[:width]
            best[row, : len(of)] = of
        return best


@dataclass(frozen=True)
class Judged:
    """The queries that qrels judge, and their judgements; what was left out, by what it is, in `counts`."""

    queries: Rows
    relevance: ByQrels
    counts: dict[str, int]
    remarks: list[str]


def judged(
    qrels: Qrels, source: str, documents: Rows, queries: Rows, *, ignore_missing: bool, exclude_self: bool
) -> Judged:
    """The judgements among these rows; `source` names the qrels. Left out, and counted, are queries without judgements, failed
    queries, and with `exclude_self` the judgement of a query as the document of its id; documents that failed stay, as they
    can be missed.

    Raises `ValueError` where qrels name queries or documents that are in no row of the stores, failed ones included, unless
    `ignore_missing` leaves these out too; and where nothing is left.
    """
    flat = [(query, document, grade) for query, of in qrels.items() for document, grade in of.items()]
    query_ids, document_ids = [each[0] for each in flat], [each[1] for each in flat]
    query, document = _places(queries, query_ids), _places(documents, document_ids)
    unknown = {
        "queries": (_distinct(query == _UNKNOWN, query_ids), queries.name),
        "documents": (_distinct(document == _UNKNOWN, document_ids), documents.name),
    }
    if not ignore_missing:
        _refuse(source, unknown)
    itself = np.array([exclude_self and one == other for one, other, _ in flat], bool)
    keep = (query >= 0) & (document >= _FAILED) & ~itself
    if not keep.any():
        raise ValueError(
            f"{source} judges no document of {documents.name} for a query of {queries.name}; give other qrels"
        )
    try:
        grade = np.array([each[2] for each in flat], np.int64)
    except OverflowError:
        raise ValueError(f"{source} has grades of more than 18 digits; give small whole numbers") from None
    found, number = np.unique(query[keep], return_inverse=True)
    relevance = ByQrels(len(found), len(documents), number, document[keep], grade[keep])
    counts = {
        "judged": len(found),
        "judgements": int(keep.sum()),
        "unjudged": len(queries) - len(found),
        "without_relevant": int((relevance.relevant == 0).sum()),
        "failed_queries": len(_distinct(query == _FAILED, query_ids)),
        "failed_documents": int(((document == _FAILED) & keep & (grade > 0)).sum()),
        "missing_queries": len(unknown["queries"][0]),
        "missing_documents": len(unknown["documents"][0]),
        "own": int(itself.sum()),
    }
    return Judged(queries.pick(found), relevance, counts, _remarks(counts, source))


def _refuse(source: str, unknown: dict[str, tuple[list[str], str]]) -> None:
    """Raises `ValueError` where there are some; by what they are, ids and the store without them."""
    said = [
        f"{len(ids):,} {what} that {store} has not ({', '.join(map(repr, ids[:_SHOWN]))}{', …' if len(ids) > _SHOWN else ''})"
        for what, (ids, store) in unknown.items()
        if ids
    ]
    if said:
        raise ValueError(
            f"{source} judges {' and '.join(said)}; give the stores of that data set, or leave these judgements out with "
            "--missing ignore"
        )


def digest(qrels: Qrels) -> str:
    """The same for the same judgements, in whatever order and format."""
    found = hashlib.blake2b(digest_size=8)
    for query, of in sorted(qrels.items()):
        found.update(repr((query, sorted(of.items()))).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _places(rows: Rows, ids: list[str]) -> Int[np.ndarray, " n"]:
    """The number of each id's row; `_FAILED` of rows that the stores have, but not among these, `_UNKNOWN` of others."""
    place = {str(each): _FAILED for store in rows.stores for each in store.sample_ids}
    place |= {str(each): number for number, each in enumerate(rows.sample_ids)}
    return np.array([place.get(each, _UNKNOWN) for each in ids], np.int64)


def _distinct(where: Bool[np.ndarray, " n"], ids: list[str]) -> list[str]:
    return list(dict.fromkeys(ids[at] for at in np.flatnonzero(where)))


def _remarks(counts: dict[str, int], source: str) -> list[str]:
    said = {
        "missing_queries": "queries are judged that no store has: left out",
        "missing_documents": "documents are judged that no store has: left out",
        "failed_queries": "judged queries failed: left out",
        "failed_documents": "relevant documents failed: they stay relevant, and are never found",
        "without_relevant": "queries have judgements, but no relevant document: they count as 0, as trec_eval has it",
        "own": "judgements of a query as its own document: left out",
    }
    return [f"{source}: {counts[name]:,} {words}" for name, words in said.items() if counts[name]]
