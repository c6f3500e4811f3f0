"""Approximate neighbours, for banks whose exact search takes too long: any index that FAISS can make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from evalsuite.neighbours.exact import MARGIN, NO_ROW, cosine, import_faiss, search
from featcache.geometry import unit_rows
from featcache.rows import Rows

_LEAST_A_LIST, _MOST_A_LIST = 39, 64  # rows to place one list of an IVF index by; FAISS asks for 39 to 256
_TRAINING_ROWS = 2**16  # to learn anything else by: PCA, scalar and product quantisers
_CANDIDATE_FLOATS = 2**24  # bank embeddings held to score candidates again
_REMEDY = "see the FAISS wiki, “The index factory”, or leave the index out for exact search"


class Index:
    """A bank in a FAISS index by inner product of unit vectors.

    `spec` is a factory string, such as `IVF4096,Flat`, `HNSW32` or `PCA64,IVF256,SQ8`, and may end in search
    parameters in the syntax of FAISS's ParameterSpace: `IVF4096,Flat;nprobe=16`, `HNSW32;efSearch=64`.

    What must be learned is learned from rows evenly spread over the bank (64 a list of an IVF index, at least 65,536,
    at most all); then the bank is added block by block. The index is held in memory, compressed as its string says
    (`Flat` and `HNSW`: d float32 a row), on all GPUs where FAISS has them and can. With several threads, `HNSW` links
    rows in no fixed order: rare neighbours differ from one build to the next.

    FAISS proposes; the proposed rows, 16 more than asked for, are scored again with the bank's own embeddings. So what
    is found has its exact similarity and order; approximate is only which rows are found. `recall` measures that.

    Raises `ValueError` when FAISS is not installed, cannot make the index or has no such parameter, the bank has too
    few rows for it, or a row is not finite.

    Johnson et al. 2017, "Billion-scale similarity search with GPUs", arXiv 1702.08734; Malkov and Yashunin 2016,
    arXiv 1603.09320 (HNSW).
    """

    def __init__(self, bank: Rows, spec: str) -> None:
        self.bank, self.spec = bank, spec
        try:
            faiss = import_faiss()
        except ImportError:
            raise ValueError(
                f"index {spec}: FAISS is not installed; `pip install faiss-cpu`, or leave the index out for exact search"
            ) from None
        factory, _, parameters = spec.partition(";")
        with _explained(spec):
            index = faiss.index_factory(bank.embedding_dim, factory, faiss.METRIC_INNER_PRODUCT)
            ivf = faiss.try_extract_index_ivf(index)
        lists = 0 if ivf is None else int(ivf.nlist)
        if len(bank) < _LEAST_A_LIST * lists:
            fitting = len(bank) // _LEAST_A_LIST
            raise ValueError(
                f"index {spec} needs {_LEAST_A_LIST * lists:,} rows for its {lists:,} lists, {bank.name} has "
                f"{len(bank):,}; use "
                + (f"at most {fitting:,} lists (IVF{fitting}), or " if fitting else "")
                + "exact search"
            )
        with _explained(spec):
            index, space = _on_gpus(faiss, index)
            space.set_index_parameters(index, parameters)
            if not index.is_trained:
                index.train(self._spread(max(_MOST_A_LIST * lists, _TRAINING_ROWS)))
            for block in bank.blocks():
                index.add(unit_rows(block, "bank"))
        self._index = index

    def search(
        self, query: Float[np.ndarray, "q d"], k: int, *, exclude_self: Int[np.ndarray, " q"] | None = None
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """As `neighbors.search`, among the rows that the index finds.

        Raises `ValueError` when it finds fewer than k for a query, or a query is not finite.
        """
        unit_query = unit_rows(query, "query")
        similarity, row = np.empty((len(query), k), np.float32), np.empty((len(query), k), np.int64)
        width = min(k + MARGIN, len(self.bank))
        step = max(1, _CANDIDATE_FLOATS // (width * query.shape[1]))
        for start in range(0, len(query), step):
            part = slice(start, start + step)
            with _explained(self.spec):
                _, proposed = self._index.search(unit_query[part], width)
            usable = proposed >= 0  # FAISS fills up with -1
            if exclude_self is not None:
                usable &= proposed != exclude_self[part, None]
            fewest = int(usable.sum(axis=1).min())
            if fewest < k:
                raise ValueError(
                    f"index {self.spec} finds only {fewest} of k={k} neighbours of a query in {self.bank.name}; "
                    "let it search more (IVF: a higher ;nprobe=…; HNSW: ;efSearch=… or more links), or use a smaller k"
                )
            at = np.nonzero(usable)
            needed, column = np.unique(proposed[at], return_inverse=True)
            rows = unit_rows(self.bank.take(needed), "bank")
            scored = np.full(proposed.shape, -np.inf, np.float32)
            scored[at] = cosine(unit_query[part], at[0], rows, column)
            candidate = np.where(usable, proposed, NO_ROW)
            best = np.lexsort((candidate, -scored), axis=1)[:, :k]
            similarity[part] = np.take_along_axis(scored, best, axis=1)
            row[part] = np.take_along_axis(candidate, best, axis=1)
        return similarity, row

    def recall(
        self, query: Float[np.ndarray, "q d"], k: Sequence[int], *, exclude_self: Int[np.ndarray, " q"] | None = None
    ) -> dict[int, float]:
        """For every K in `k`, the share of the queries' K neighbours that are true ones, in [0, 1]: at least as similar
        as the K-th of an exact search. That reads the whole bank once."""
        exact, _ = search(self.bank.blocks(), query, max(k), exclude_self=exclude_self)
        found, _ = self.search(query, max(k), exclude_self=exclude_self)
        return {n: float((found[:, :n] >= exact[:, n - 1 : n]).mean()) for n in k}

    def _spread(self, most: int) -> Float[np.ndarray, "rows d"]:
        """`most` unit rows, evenly spread over the bank; all of them, where there are no more."""
        positions = evenly_spread(len(self.bank), most)
        spread = np.empty((len(positions), self.bank.embedding_dim), np.float32)
        step = max(1, _CANDIDATE_FLOATS // self.bank.embedding_dim)
        for start in range(0, len(positions), step):
            part = slice(start, start + step)
            spread[part] = unit_rows(self.bank.take(positions[part]), "bank")
        return spread


def evenly_spread(n: int, most: int) -> Int[np.ndarray, " m"]:
    """`most` of the positions 0..n-1 at equal distances; all, where there are no more."""
    return np.arange(min(n, most)) * n // max(1, min(n, most))


def _on_gpus(faiss: Any, index: Any) -> tuple[Any, Any]:
    """The index on every GPU, and what sets its parameters; as it is where there is no GPU or it cannot be there."""
    if faiss.get_num_gpus():
        try:
            return faiss.index_cpu_to_all_gpus(index), faiss.GpuParameterSpace()
        except RuntimeError:  # HNSW, for one, is for the CPU alone
            pass
    return index, faiss.ParameterSpace()


@contextmanager
def _explained(spec: str) -> Iterator[None]:
    """FAISS's errors, which name its C++ functions, in one line that names the index."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).rsplit(".cpp:", 1)[-1].split()).partition(":")[2].strip()
        raise ValueError(f"index {spec}: FAISS refuses it ({reason or error}); {_REMEDY}") from error
