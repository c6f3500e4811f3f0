"""k-nearest-neighbour classification."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.classes import Classes, aligned_labels, guessing, macro_guessing, unreachable_remarks
from evalsuite.collapse import collapse_remarks
from evalsuite.intervals import macro_share, share
from evalsuite.neighbours.exact import search
from evalsuite.neighbours.index import Index, evenly_spread
from evalsuite.overlap import overlap, repeated
from evalsuite.result import Metric, Result, content_of, versions
from featcache.geometry import vote_weights, votes
from featcache.rows import Rows, Store, left_out_remarks

PRESETS: dict[str, dict[str, Any]] = {
    "dinov2": {"k": (10, 20, 100, 200), "temperature": 0.07},
    "cospress": {"k": (10,), "temperature": 0.07},
}
"""Settings of published protocols, by name."""

_QUERY_FLOATS = 2**24  # query embeddings held during one pass over the bank
_RECALL_QUERIES = 1000  # searched exactly, to tell how good an index is


def knn(
    bank: Store,
    query: Store,
    k: Sequence[int] | None = None,
    temperature: float | None = None,
    *,
    preset: str = "dinov2",
    shots: int | None = None,
    index: str = "exact",
    drop_identical: bool = False,
    any_precision: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """Classify the query's rows by a vote of their k nearest bank rows.

    Cosine similarity; each neighbour votes for its label with weight softmax(similarity / temperature).
    Reports, for every K in `k`, `top1@K`, `top5@K` and `macro_top1@K` (mean over classes of the accuracy
    within each), in [0, 1] with 95 % intervals (`evalsuite.intervals`) over the query's rows, the bank and its
    few-shot draw taken as they are. A class nobody voted for
    never counts as among the top five, and equal votes go to the lower label. When bank and query are the
    same store a row is not its own neighbour. `parameters["chance"]` holds what the best answer reaches that is the
    same for every row: the share of the most frequent class of the query that the bank has (top5: of the five most
    frequent, or K where that is less), and 1/K of K classes for the mean over classes.

    `preset` is one of `PRESETS` and stands for a published protocol's `k` and `temperature`, where these are
    left out: DINOv2's, or the only K of CosPress. `shots` leaves that many bank rows a class, drawn by `seed`;
    the draw of fewer shots is part of the draw of more.

    `index` is `exact`, or FAISS's factory string of an approximate index for banks where that takes too long,
    with search parameters after a semicolon: `HNSW32`, `IVF4096,Flat;nprobe=16`. Neighbours keep their exact
    similarities; some are missed. The metric `recall@K` is the share, in [0, 1], of the K neighbours found that
    are at least as similar as the K-th of an exact search, over 1,000 evenly spread queries (all, where there are
    no more).

    A query row whose image the bank has too (under another id, where both are one store) has itself for a neighbour, which
    says nothing of images that are new. Such rows are counted, as `inputs["query"]["identical"]`, and remarked on;
    `drop_identical` leaves them out, whether or not `shots` draws their copies, and of one store all but the first row
    of each image, on both sides. Images are known by the hashes that stores keep, and where one side keeps none, rows by
    all of their embedding: `parameters["identical_by"]` says which.

    Labels are matched by class name, by number where neither store has names (see `evalsuite.classes.match`). Failed
    and unlabelled rows are left out, counted and remarked on; so are query rows whose class has no bank row, which are
    kept (and wrong): `unreachable`.

    `resamples` has no effect: intervals are no longer drawn at random.

    Raises `ValueError` when the stores come from different encoders or, without `any_precision`, were made in different precisions, one has no labels or a value that is not finite,
    one has class names and the other only numbers, the query has a class the bank does not know or none that it has, a
    class has fewer bank rows than `shots`, k is no whole number or exceeds the bank, FAISS cannot make the index of this
    bank, or the index finds fewer than k neighbours.

    Oquab et al. 2023, arXiv 2304.07193; Wu et al. 2018, arXiv 1805.01978;
    CosPress: arXiv 2411.15239.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; use {' or '.join(PRESETS)}")
    k = PRESETS[preset]["k"] if k is None else k
    temperature = PRESETS[preset]["temperature"] if temperature is None else temperature
    all_bank, all_query = Rows.of(bank), Rows.of(query)
    all_bank.require_same_encoder(all_query, any_precision)
    same_store = os.path.realpath(all_bank.name) == os.path.realpath(all_query.name)
    labelled_bank, query_rows = all_bank.labelled(), all_query.labelled()
    if drop_identical:
        same = repeated(query_rows) if same_store else overlap(query_rows, [labelled_bank])
        query_rows = query_rows.pick(np.flatnonzero(~same.rows))
        if same_store:
            labelled_bank = query_rows
        elif not len(query_rows):
            raise ValueError(
                f"every row of {all_query.name} is in {all_bank.name} too; give other images as query, or one store as "
                "both, so that no row votes for itself"
            )
    bank_rows = labelled_bank if shots is None else _few_shots(labelled_bank, shots, seed)
    own = _positions(bank_rows, query_rows) if same_store else None
    if not drop_identical:
        same = overlap(query_rows, [bank_rows], own)
    ks = _checked_k(k, bank_rows, same_store)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive, finite number, got {temperature}")
    truth = aligned_labels(bank_rows, query_rows)

    approximate = None if index == "exact" else Index(bank_rows, index)

    classes, bank_label = np.unique(bank_rows.labels, return_inverse=True)
    true_class = np.searchsorted(classes, truth)
    reachable = np.isin(truth, classes)
    # The place of the true class in each query's ranking, 0 for the winner, per K.
    place = {n: np.full(len(query_rows), len(classes)) for n in ks}
    start = 0
    for block in query_rows.blocks(max(1, _QUERY_FLOATS // query_rows.embedding_dim)):
        part = np.arange(start, start + len(block))
        left_out = None if own is None else own[part]
        if approximate is None:
            similarity, neighbour = search(bank_rows.blocks(), block, max(ks), exclude_self=left_out)
        else:
            similarity, neighbour = approximate.search(block, max(ks), exclude_self=left_out)
        weight = vote_weights(similarity, temperature)
        for n in ks:
            place[n][part] = _place(
                weight[:, :n], bank_label[neighbour[:, :n]], true_class[part], reachable[part], len(classes)
            )
        start += len(block)

    metrics: dict[str, Metric] = {}
    measured: dict[str, np.ndarray] = {
        "sample_id": query_rows.sample_ids.astype(np.str_),
        "content": content_of(query_rows),
    }
    chance: dict[str, float] = {}
    for n in ks:
        chance |= {
            f"top1@{n}": guessing(truth, classes),
            f"top5@{n}": guessing(truth, classes, min(5, n)),  # n neighbours vote for n classes at most
            f"macro_top1@{n}": macro_guessing(truth, classes),
        }
        top1, top5 = place[n] == 0, (place[n] < 5) & (place[n] < len(classes))
        for name, correct in ((f"top1@{n}", top1), (f"top5@{n}", top5)):
            metrics[name] = share(correct).metric()
            measured[name] = correct
        metrics[f"macro_top1@{n}"] = macro_share(top1, truth).metric()
    if approximate is not None:
        some = evenly_spread(len(query_rows), _RECALL_QUERIES)
        recall = approximate.recall(query_rows.take(some), ks, exclude_self=None if own is None else own[some])
        why = f"of {len(some):,} evenly spread queries, which are no random sample"
        metrics |= {f"recall@{n}": Metric(found, no_ci95=why) for n, found in recall.items()}

    return Result(
        "knn",
        {
            "bank": bank_rows.record() | {"unlabelled": len(all_bank) - len(all_bank.labelled())},
            "query": query_rows.record()
            | {
                "unlabelled": len(all_query) - len(all_query.labelled()),
                "unreachable": int((~reachable).sum()),
                "identical": same.count,
            },
        },
        {
            "preset": preset,
            "k": list(ks),
            "temperature": temperature,
            "normalisation": "l2",
            "exclude_self": same_store,
            "shots": shots,
            "index": index,
            "drop_identical": drop_identical,
            "any_precision": any_precision,
            "identical_by": same.by,
            "seed": seed,
            "chance": chance,
        },
        metrics,
        versions("faiss-cpu", "faiss-gpu", "torch"),
        measured,
        remarks=[
            *same.remarks(
                "query rows",
                "of the same store, under another id" if same_store else "of the bank",
                "they are among their own neighbours",
                drop_identical,
            ),
            *collapse_remarks("bank", bank_rows),
            *left_out_remarks("bank", all_bank, len(all_bank) - len(all_bank.labelled())),
            *left_out_remarks("query", all_query, len(all_query) - len(all_query.labelled())),
            *unreachable_remarks(bank_rows, query_rows, truth, "query"),
        ],
    )


def _few_shots(bank: Rows, shots: int, seed: int) -> Rows:
    """`shots` rows of every class, in the bank's order."""
    if not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots must be at least 1, a whole number, got {shots}")
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


def _positions(bank: Rows, query: Rows) -> Int[np.ndarray, " q"]:
    """Where each query row of the same store is in the bank; -1 for rows that were not drawn."""
    at = np.minimum(np.searchsorted(bank.index, query.index), len(bank) - 1)
    return np.where(bank.index[at] == query.index, at, -1)


def _checked_k(k: Sequence[int], bank: Rows, exclude_self: bool) -> tuple[int, ...]:
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


def _place(
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
