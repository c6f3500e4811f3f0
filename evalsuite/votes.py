"""Classification by a vote of the nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.accuracy import accuracies
from evalsuite.neighbours.exact import search
from evalsuite.neighbours.index import Index, evenly_spread
from evalsuite.result import Metric, content_of
from featcache.classes import Classes
from featcache.geometry import vote_weights, votes
from featcache.rows import Rows

_QUERY_FLOATS = 2**24  # query embeddings held during one pass over the bank
_RECALL_QUERIES = 1000  # searched exactly, to tell how good an index is


def classify(
    bank: Rows,
    query: Rows,
    truth: Int[np.ndarray, " q"],
    ks: Sequence[int],
    temperature: float,
    own: Int[np.ndarray, " q"] | None = None,
    index: Index | None = None,
) -> tuple[dict[str, Metric], dict[str, np.ndarray], dict[str, float]]:
    """Metrics, samples and chance levels of the query's rows, whose classes in the bank's numbering are `truth`, for each K in
    `ks`. `own` says where in the bank each row itself is, which does not vote; with an `index`, `recall@K` too."""
    classes, bank_label = np.unique(bank.labels, return_inverse=True)
    true_class, reachable = np.searchsorted(classes, truth), np.isin(truth, classes)
    # The place of the true class in each query's ranking, 0 for the winner, per K.
    ranking = {n: np.full(len(query), len(classes)) for n in ks}
    start = 0
    for block in query.blocks(max(1, _QUERY_FLOATS // query.embedding_dim)):
        part = np.arange(start, start + len(block))
        itself = None if own is None else own[part]
        if index is None:
            similarity, neighbour = search(bank.blocks(), block, max(ks), exclude_self=itself)
        else:
            similarity, neighbour = index.search(block, max(ks), exclude_self=itself)
        weight = vote_weights(similarity, temperature)
        for n in ks:
            ranking[n][part] = place(
                weight[:, :n], bank_label[neighbour[:, :n]], true_class[part], reachable[part], len(classes)
            )
        start += len(block)
    metrics: dict[str, Metric] = {}
    samples: dict[str, np.ndarray] = {"sample_id": query.sample_ids.astype(np.str_), "content": content_of(query)}
    chance: dict[str, float] = {}
    for n in ks:
        # n neighbours vote for n classes at most
        found = accuracies(ranking[n], truth, classes, f"{{}}@{n}", most=min(5, n))
        metrics, samples, chance = metrics | found[0], samples | found[1], chance | found[2]
    if index is not None:
        some = evenly_spread(len(query), _RECALL_QUERIES)
        recall = index.recall(query.take(some), ks, exclude_self=None if own is None else own[some])
        why = f"of {len(some):,} evenly spread queries, which are no random sample"
        metrics |= {f"recall@{n}": Metric(share, no_ci95=why) for n, share in recall.items()}
    return metrics, samples, chance


def place(
    weight: Float[np.ndarray, "q k"],
    label: Int[np.ndarray, "q k"],
    true_class: Int[np.ndarray, " q"],
    reachable: Bool[np.ndarray, " q"],
    n_classes: int,
) -> Int[np.ndarray, " q"]:
    """How many classes come before the true one in each query's vote; `n_classes` when it got no vote."""
    place = np.full(len(weight), n_classes)
    for part, sums in votes(weight, label, n_classes):
        truth = np.where(reachable[part], true_class[part], 0)[:, None]
        own = np.take_along_axis(sums, truth, axis=1)
        before = (sums > own) | ((sums == own) & (np.arange(n_classes) < truth))
        voted = reachable[part] & (own[:, 0] > 0)
        place[part] = np.where(voted, before.sum(axis=1), n_classes)
    return place


def few_shots(bank: Rows, shots: int, seed: int) -> Rows:
    """`shots` rows of every class, in the bank's order."""
    classes, rows = np.unique(bank.labels, return_counts=True)
    if rows.min() < shots:
        fewest = int(classes[rows.argmin()])
        raise ValueError(
            f"class {Classes.of(bank).distinct_name(fewest)} of {bank.name} has {rows.min()} labelled rows, fewer than {shots} shots; "
            f"use at most {rows.min()}"
        )
    drawn = [
        np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(bank.labels == label))[:shots]
        for label in classes
    ]
    return bank.pick(np.sort(np.concatenate(drawn)))


def positions(bank: Rows, query: Rows) -> Int[np.ndarray, " q"]:
    """Where each query row of the same store is in the bank; -1 for rows that were not drawn."""
    at = np.minimum(np.searchsorted(bank.index, query.index), len(bank) - 1)
    return np.where(bank.index[at] == query.index, at, -1)


def checked_k(k: Sequence[int], bank: Rows, exclude_self: bool) -> tuple[int, ...]:
    ks = tuple(dict.fromkeys(int(n) for n in np.atleast_1d(np.asarray(k, np.float64))))
    most = len(bank) - exclude_self
    if not ks or min(ks) < 1 or set(ks) != set(np.atleast_1d(k)):
        raise ValueError(f"k must hold whole numbers of at least 1, got {k}")
    if max(ks) > most:
        without = ", the query row itself left out" if exclude_self else ""
        raise ValueError(
            f"k={max(ks)} exceeds the bank {bank.name}, which has {len(bank)} labelled rows{without}; "
            f"use k of at most {most}"
        )
    return ks
