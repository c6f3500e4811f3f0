"""Exact nearest neighbours, by cosine or dot product, of queries in a bank of any size (approximate ones: `index.py`).

Matrix products in float32 differ in the last bits with the batch size, the BLAS and the device, and which of
several tied rows a top-k routine returns is left to chance. So FAISS (or torch, where FAISS is not installed),
on the GPU where there is one, only *proposes* candidates; those are scored again, pair by pair, in float64 with a
fixed order of summation, and are accepted once it is certain that no row outside the proposal can belong to the
answer. The result is the same to the bit however the bank and the queries are cut into blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from featcache.geometry import unit_rows

# Proposes, for (q, d) queries and a (b, d) block, the `width` best columns and their float32 products.
Proposer = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
Score = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]

MARGIN = 16  # candidates proposed beyond k, so that a near tie at the k-th place seldom needs a second proposal
NO_ROW = np.iinfo(np.int64).max
_PAIR_FLOATS = 2**16  # float64 values multiplied at once when candidates are scored again
_LONGEST = 1e18  # of two rows that are no longer float32 holds the product
_GPU_WIDTH = 2048  # the most that FAISS proposes on a GPU


def search(
    bank_blocks: Iterable[Float[np.ndarray, "_ d"]],
    query: Float[np.ndarray, "q d"],
    k: int,
    *,
    exclude_self: Int[np.ndarray, " q"] | None = None,
    backend: str = "auto",
    similarity: str = "cosine",
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """The k bank rows most similar to each query.

    Returns the similarity as float32 (descending; of cosines in [-1, 1]) and the row's position in the bank as
    int64; rows of equal similarity come lowest row first. `similarity` is `cosine`, by which a row or query of norm zero
    has similarity 0 to everything, or `dot`, the product of the vectors as they are.

    `bank_blocks` yields the bank in order, in blocks of any size; one block is held at a time. The queries
    are held at once, in float32. `exclude_self` gives, for each query, the position of the bank row that *is*
    this query and must not be its own neighbour. `backend` is `auto` (the first that has a GPU, else FAISS),
    `faiss` or `torch`; the result does not depend on it.

    Raises `ValueError` when k is not in 1..(rows that may be returned), when the dimensions differ, when a
    vector is not finite, or when dot products may be too large for float32.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    scaled, score = {"cosine": (unit_rows, cosine), "dot": (_as_they_are, dot)}[similarity]
    propose = _proposer(backend)
    scaled_query = scaled(query, "query")
    n_queries = len(query)
    found = np.full((n_queries, k), -np.inf, dtype=np.float32)
    row = np.full((n_queries, k), NO_ROW, dtype=np.int64)
    seen = 0
    for block in bank_blocks:
        if block.shape[1] != query.shape[1]:
            raise ValueError(
                f"bank rows have {block.shape[1]} dimensions, queries {query.shape[1]}; take both from the same encoder"
            )
        own = None if exclude_self is None else exclude_self - seen
        _merge_block(scaled(block, "bank", seen), seen, scaled_query, own, found, row, propose, score)
        seen += len(block)
    if n_queries and (row == NO_ROW).any():
        without = "" if exclude_self is None else ", the query itself left out"
        raise ValueError(f"k={k} neighbours were asked of a bank of {seen} rows{without}; use a smaller k")
    return found, row


def _as_they_are(rows: Float[np.ndarray, "n d"], what: str, first: int = 0) -> Float[np.ndarray, "n d"]:
    """C-contiguous float32; raises `ValueError` as `unit_rows` does, and for rows whose products float32 could not hold."""
    size = _lengths(rows)
    if not (size < _LONGEST).all():
        bad = first + int((~(size < _LONGEST)).argmax())
        raise ValueError(
            f"{what} row {bad} is not finite, or too long for dot products; leave it out, or compare by cosine"
        )
    return np.ascontiguousarray(rows, np.float32)


def _merge_block(
    bank: np.ndarray,
    first_row: int,
    query: np.ndarray,
    own: np.ndarray | None,
    similarity: np.ndarray,
    row: np.ndarray,
    propose: Proposer,
    score: Score,
) -> None:
    """Merge one block into the running top k (`similarity`, `row`), in place."""
    k = similarity.shape[1]
    slack = _rounding(bank.shape[1]) * _lengths(query) * _lengths(bank).max(initial=0.0)  # of each query
    width = min(k + MARGIN, len(bank))
    pending = np.arange(len(query)) if len(bank) else np.arange(0)
    while len(pending):
        proposed, column = propose(query[pending], bank, width)
        # What cannot reach the k-th place is dropped before the costly scoring. Where a query may be its own, it may hold
        # one of the places.
        kth = k if own is None else k + 1
        reached = np.partition(np.concatenate([similarity[pending], proposed], axis=1), -kth, axis=1)[:, -kth, None]
        worthy = proposed >= reached - 2 * slack[pending, None]
        if own is not None:
            worthy &= column != own[pending, None]
        at = np.nonzero(worthy)
        candidate = np.full(proposed.shape, -np.inf, dtype=np.float32)
        candidate_row = np.full(proposed.shape, NO_ROW, dtype=np.int64)
        candidate[at] = score(query, pending[at[0]], bank, column[at])
        candidate_row[at] = column[at] + first_row

        all_similarity = np.concatenate([similarity[pending], candidate], axis=1)
        all_row = np.concatenate([row[pending], candidate_row], axis=1)
        best = np.lexsort((all_row, -all_similarity), axis=1)[:, :k]
        merged = np.take_along_axis(all_similarity, best, axis=1)
        # A row that was not proposed is at most `slack` better than the last one that was.
        certain = (proposed[:, -1] + slack[pending] < merged[:, -1]) | (width == len(bank))
        similarity[pending[certain]] = merged[certain]
        row[pending[certain]] = np.take_along_axis(all_row, best, axis=1)[certain]
        pending = pending[~certain]
        width = min(4 * width, len(bank))


def cosine(
    query: Float[np.ndarray, "q d"],
    i: Int[np.ndarray, " pairs"],
    bank: Float[np.ndarray, "b d"],
    j: Int[np.ndarray, " pairs"],
) -> Float[np.ndarray, " pairs"]:
    """Similarity of the unit pairs (query[i], bank[j]): float64 sums in an order set by d alone, then rounded."""
    return dot(query, i, bank, j).clip(-1.0, 1.0)


def dot(
    query: Float[np.ndarray, "q d"],
    i: Int[np.ndarray, " pairs"],
    bank: Float[np.ndarray, "b d"],
    j: Int[np.ndarray, " pairs"],
) -> Float[np.ndarray, " pairs"]:
    """The same of vectors of any length."""
    out = np.empty(len(i), dtype=np.float32)
    step = max(1, _PAIR_FLOATS // query.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        out[part] = np.multiply(query[i[part]], bank[j[part]], dtype=np.float64).sum(axis=1)
    return out


def _lengths(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    return np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))


def _rounding(d: int) -> float:
    """A generous bound on the error of a float32 product of unit vectors (errors grow like the root of d)."""
    return 4.0 * float(np.sqrt(d) + 1.0) * 2.0**-24


def import_faiss() -> Any:
    """The module. Raises `ImportError` where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # SWIG's, on import, under Python 3.12 and later
        import faiss
    return faiss


def _proposer(backend: str) -> Proposer:
    if backend not in ("auto", "faiss", "torch"):
        raise ValueError(f"unknown backend {backend!r}; use auto, faiss or torch")
    if backend == "torch":
        return _propose_torch
    try:
        faiss = import_faiss()
    except ImportError:
        if backend == "faiss":
            raise ValueError("FAISS is not installed; `pip install faiss-cpu` or use backend='torch'") from None
        return _propose_torch
    if backend == "auto" and not faiss.get_num_gpus() and _torch_device() != "cpu":
        return _propose_torch
    return _propose_faiss


def _propose_faiss(query: np.ndarray, bank: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    if faiss.get_num_gpus() and width <= _GPU_WIDTH:
        return faiss.knn_gpu(_gpu_resources(), query, bank, width, metric=faiss.METRIC_INNER_PRODUCT)
    return faiss.knn(query, bank, width, metric=faiss.METRIC_INNER_PRODUCT)


@lru_cache(maxsize=1)
def _gpu_resources() -> Any:
    """FAISS's scratch memory on the GPU, over a gigabyte: taken once."""
    import faiss

    return faiss.StandardGpuResources()


def _propose_torch(query: np.ndarray, bank: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    import torch

    device = _torch_device()
    step = max(1, 2**24 // len(bank))  # queries whose similarities to the whole block are held at once
    columns = torch.from_numpy(bank).to(device).T
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 or bfloat16 products would err by more than `_rounding`
    try:
        parts = [torch.topk(chunk.to(device) @ columns, width, dim=1) for chunk in torch.from_numpy(query).split(step)]
    finally:
        torch.set_float32_matmul_precision(precision)
    values = torch.cat([part.values.cpu() for part in parts])
    indices = torch.cat([part.indices.cpu() for part in parts])
    return values.numpy(), indices.numpy()


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
