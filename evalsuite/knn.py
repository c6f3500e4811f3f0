"""k-nearest-neighbour classification."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.metrics import (
    bootstrap_accuracy,
    bootstrap_macro_accuracy,
    interval95,
    macro_accuracy,
)
from evalsuite.neighbors import search
from evalsuite.result import Metric, Result, versions
from evalsuite.rows import Rows, Store

_QUERY_FLOATS = 2**24  # query embeddings held during one pass over the bank
_VOTE_FLOATS = 2**22  # (query, class) votes held at once


def knn(
    bank: Store,
    query: Store,
    k: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """Classify the query's rows by a vote of their k nearest bank rows (DINOv2's protocol).

    Cosine similarity; each neighbour votes for its label with weight softmax(similarity / temperature).
    Reports, for every K in `k`, `top1@K`, `top5@K` and `macro_top1@K` (mean over classes of the accuracy
    within each), in [0, 1] with bootstrap 95 % intervals over the query's rows. A class nobody voted for
    never counts as among the top five, and equal votes go to the lower label. When bank and query are the
    same store a row is not its own neighbour.

    Labels are matched by class name where both stores have class names, else by number. Failed and unlabelled
    rows are left out and counted; query rows whose class has no bank row are kept (and wrong) and counted as
    `unreachable`.

    Raises `ValueError` when the stores come from different encoders, one has no labels, the query has a class
    the bank does not know, or k exceeds the bank.

    Oquab et al. 2023, arXiv 2304.07193; Wu et al. 2018, arXiv 1805.01978.
    """
    all_bank, all_query = Rows.of(bank), Rows.of(query)
    all_bank.require_same_encoder(all_query)
    same_store = os.path.realpath(all_bank.name) == os.path.realpath(all_query.name)
    bank_rows, query_rows = all_bank.labelled(), all_query.labelled()
    ks = _checked_k(k, bank_rows, same_store)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    truth = _aligned_labels(bank_rows, query_rows)

    classes, bank_label = np.unique(bank_rows.labels, return_inverse=True)
    true_class = np.searchsorted(classes, truth)
    reachable = np.isin(truth, classes)
    # The place of the true class in each query's ranking, 0 for the winner, per K.
    place = {n: np.full(len(query_rows), len(classes)) for n in ks}
    start = 0
    for block in query_rows.blocks(max(1, _QUERY_FLOATS // query_rows.embedding_dim)):
        part = np.arange(start, start + len(block))
        similarity, neighbour = search(bank_rows.blocks(), block, max(ks), exclude_self=part if same_store else None)
        weight = np.exp((similarity.astype(np.float64) - similarity[:, :1]) / temperature)
        for n in ks:
            place[n][part] = _place(
                weight[:, :n], bank_label[neighbour[:, :n]], true_class[part], reachable[part], len(classes)
            )
        start += len(block)

    metrics: dict[str, Metric] = {}
    for n in ks:
        top1, top5 = place[n] == 0, (place[n] < 5) & (place[n] < len(classes))
        for name, correct in ((f"top1@{n}", top1), (f"top5@{n}", top5)):
            samples = bootstrap_accuracy(correct, resamples=resamples, seed=seed)
            metrics[name] = Metric(float(correct.mean()), interval95(samples))
        samples = bootstrap_macro_accuracy(top1, truth, resamples=resamples, seed=seed)
        metrics[f"macro_top1@{n}"] = Metric(macro_accuracy(top1, truth), interval95(samples))

    return Result(
        "knn",
        {
            "bank": bank_rows.record() | {"unlabelled": len(all_bank) - len(bank_rows)},
            "query": query_rows.record()
            | {
                "unlabelled": len(all_query) - len(query_rows),
                "unreachable": int((~reachable).sum()),
            },
        },
        {
            "k": list(ks),
            "temperature": temperature,
            "normalisation": "l2",
            "exclude_self": same_store,
            "resamples": resamples,
            "seed": seed,
        },
        metrics,
        versions("faiss-cpu", "faiss-gpu", "torch"),
    )


def _checked_k(k: Sequence[int], bank: Rows, exclude_self: bool) -> tuple[int, ...]:
    ks = tuple(dict.fromkeys(int(n) for n in k))
    most = len(bank) - exclude_self
    if not ks or min(ks) < 1:
        raise ValueError(f"k must hold numbers of at least 1, got {list(k)}")
    if max(ks) > most:
        without = ", the query row itself left out" if exclude_self else ""
        raise ValueError(
            f"k={max(ks)} exceeds the bank {bank.name}, which has {len(bank)} labelled rows{without}; "
            f"use k of at most {most}"
        )
    return ks


def _aligned_labels(bank: Rows, query: Rows) -> Int[np.ndarray, " q"]:
    """The query's labels in the bank's numbering."""
    if bank.class_names is None or query.class_names is None or bank.class_names == query.class_names:
        return query.labels
    for rows in (bank, query):
        assert rows.class_names is not None
        if len(set(rows.class_names)) < len(rows.class_names):
            raise ValueError(f"{rows.name} has two classes of one name; rename one in its corpus and extract again")
    number = {name: i for i, name in enumerate(bank.class_names)}
    unknown = sorted({query.class_names[label] for label in np.unique(query.labels)} - number.keys())
    if unknown:
        some = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise ValueError(
            f"{query.name} has {len(unknown)} classes that {bank.name} does not know ({some}); "
            "name the class folders alike or drop these classes"
        )
    # Names without a query row may be unknown to the bank: their entry is never looked up.
    renumber = np.array([number.get(name, -1) for name in query.class_names])
    return renumber[query.labels]


def _place(
    weight: Float[np.ndarray, "q k"],
    label: Int[np.ndarray, "q k"],
    true_class: Int[np.ndarray, " q"],
    reachable: Bool[np.ndarray, " q"],
    n_classes: int,
) -> Int[np.ndarray, " q"]:
    """How many classes come before the true one in each query's vote; `n_classes` when it got no vote."""
    place = np.full(len(weight), n_classes)
    step = max(1, _VOTE_FLOATS // n_classes)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        rows = len(weight[part])
        cell = np.arange(rows)[:, None] * n_classes + label[part]
        votes = np.bincount(cell.ravel(), weight[part].ravel(), rows * n_classes).reshape(rows, n_classes)
        truth = np.where(reachable[part], true_class[part], 0)[:, None]
        own = np.take_along_axis(votes, truth, axis=1)
        before = (votes > own) | ((votes == own) & (np.arange(n_classes) < truth))
        voted = reachable[part] & (own[:, 0] > 0)
        place[part] = np.where(voted, before.sum(axis=1), n_classes)
    return place
