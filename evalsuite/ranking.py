"""Measures of ranked documents, query by query, as trec_eval computes them: `pytrec_eval`'s to the last digit.

A document with a grade of 1 or more is relevant; grades of 0 and below, and no grade, gain nothing. Of a query without
relevant documents every measure is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.neighbours.exact import search
from evalsuite.relevance import Relevance
from featcache.rows import Rows

Measures = dict[str, Float[np.ndarray, " q"]]
_FLOATS = 2**24  # of query embeddings, and of ranks, held during one pass over the documents


@dataclass(frozen=True)
class Ranked:
    """Of every query its measures and `ties` (as `tied` has them); and how often each document is `among` the first ones."""

    measures: Measures
    ties: Bool[np.ndarray, "q 2"]
    among: Int[np.ndarray, " n"]


def rank(
    documents: Rows,
    queries: Rows,
    relevance: Relevance,
    own: Int[np.ndarray, " q"],
    *,
    ks: Sequence[int],
    depth: int,
    similarity: str,
    progress: Callable[[int, int], None],
) -> Ranked:
    """Every query's `depth` most similar documents, of equal ones the first row first, and what they are worth. `own` is the
    document that each query is itself, which is left out, −1 for none. `among` counts the first `ks[0]`."""
    deepest = min(depth + 1 + bool((own >= 0).any()), len(documents))
    size = max(1, _FLOATS // max(documents.embedding_dim, deepest))
    parts: list[Measures] = []
    ties, among, start = [], np.zeros(len(documents) + 1, np.int64), 0
    for block in queries.blocks(size):
        part = np.arange(start, start + len(block))
        score, row = without(*search(documents.blocks(), block, deepest, similarity=similarity), own[part])
        grades = relevance.grades(part, row)
        ideal = relevance.ideal(part, min(max(ks), len(documents)))
        parts.append(measures(grades[:, :depth], ideal, relevance.relevant[part], ks))
        ties.append(tied(score, grades, max(ks)))
        among += np.bincount(row[:, : ks[0]].ravel() % len(among), minlength=len(among))  # −1, no document, is the last
        start += len(block)
        progress(start, len(queries))
    whole = {name: np.concatenate([each[name] for each in parts]) for name in parts[0]}
    return Ranked(whole, np.concatenate(ties), among[:-1])


def without(
    score: Float[np.ndarray, "q k"], row: Int[np.ndarray, "q k"], own: Int[np.ndarray, " q"]
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """The ranking without each query's own row: those behind move up, and the last place has no document (−1, −∞)."""
    itself = row == own[:, None]
    order = np.argsort(itself, axis=1, kind="stable")
    score, row = (np.take_along_axis(each, order, axis=1) for each in (score, row))
    last = np.take_along_axis(itself, order, axis=1)
    return np.where(last, -np.inf, score), np.where(last, -1, row)


def measures(
    grades: Int[np.ndarray, "q ranks"],
    ideal: Int[np.ndarray, "q best"],
    relevant: Int[np.ndarray, " q"],
    ks: Sequence[int],
) -> Measures:
    """For every K `ndcg@K`, `recall@K`, `precision@K`, `hit@K`, `mrr@K`, `map@K`; and of all ranks `map` and `mrr`, each in [0, 1].

    - `ndcg@K`: Σ grade / log₂(rank + 1) over the first K ranks, beside that of the best order (Järvelin and Kekäläinen 2002;
      the linear gain of trec_eval and BEIR, not 2^grade − 1).
    - `recall@K`: of the relevant documents the share among the first K; `precision@K`: of the first K the share that is relevant.
    - `hit@K`: 1 where one of the first K is relevant (trec_eval's `success`; what papers on metric learning call R@K).
    - `mrr@K`: 1 / rank of the first relevant document, 0 where that is beyond K.
    - `map@K`: the sum of the precision at each relevant document among the first K, over the number of all relevant ones.

    Args:
        grades: of the document at each rank, the best first.
        ideal: the highest grades of each query, descending, as many as the largest K, filled up with 0; unless all have fewer.
        relevant: how many relevant documents each query has.
    """
    width = max(*ks, grades.shape[1])
    gain = _filled(grades, width).clip(min=0)
    hits = gain > 0
    rank = np.arange(1, width + 1)
    discount = np.array([math.log2(place + 1) for place in rank.tolist()])
    dcg = (gain / discount).cumsum(axis=1)
    best = (_filled(ideal, width).clip(min=0) / discount).cumsum(axis=1)
    found = hits.cumsum(axis=1)
    precision = np.where(hits, found / rank, 0.0).cumsum(axis=1)
    first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, width + 1)
    some = np.maximum(relevant, 1)
    of_all: Measures = {"map": precision[:, -1] / some, "mrr": np.where(first <= width, 1 / first, 0.0)}
    for k in ks:
        at = k - 1
        of_all |= {
            f"ndcg@{k}": dcg[:, at] / np.where(best[:, at] > 0, best[:, at], 1.0),
            f"recall@{k}": found[:, at] / some,
            f"precision@{k}": found[:, at] / k,
            f"hit@{k}": (first <= k).astype(np.float64),
            f"mrr@{k}": np.where(first <= k, 1 / first, 0.0),
            f"map@{k}": precision[:, at] / some,
        }
    return of_all


def _filled(values: Int[np.ndarray, "q n"], width: int) -> Int[np.ndarray, "q width"]:
    return np.pad(values[:, :width], ((0, 0), (0, max(0, width - values.shape[1]))))


def tied(score: Float[np.ndarray, "q ranks"], grades: Int[np.ndarray, "q ranks"], k: int) -> Bool[np.ndarray, "q 2"]:
    """Whether among the first k documents and the next one some have the same score; and some of these different gains, so
    that their order among themselves counts."""
    score, gain = score[:, : k + 1], grades[:, : k + 1].clip(min=0)
    with np.errstate(invalid="ignore"):  # -inf where there is no document
        same = (score[:, 1:] == score[:, :-1]) & np.isfinite(score[:, 1:])
    differ = same & (gain[:, 1:] != gain[:, :-1])
    return np.stack([same.any(axis=1), differ.any(axis=1)], axis=1)


def skewness(counts: Int[np.ndarray, " n"]) -> float:
    """Of how often each document is among the K nearest of a query, N_K: its third standardised moment, 0 where all are the
    same. Hubs, which are near to everything, make it large (Radovanović, Nanopoulos and Ivanović 2010, "Hubs in space", JMLR 11)."""
    apart = counts - counts.mean()
    spread = math.sqrt(float((apart**2).mean()))
    return float((apart**3).mean()) / spread**3 if spread > 0 else 0.0
