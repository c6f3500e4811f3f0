"""The two sides of a classification: rows that it is learned from, and rows whose classes it tells."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from jaxtyping import Int

from evalsuite.collapse import collapse_remarks
from evalsuite.overlap import overlap, repeated
from evalsuite.votes import few_shots, positions
from featcache.classes import unreachable_remarks
from featcache.rows import Rows, Store, left_out_remarks


class Sides:
    """Two stores of one encoder, by the parts that they play: `bank` and `query`, say. `take` says which of their rows.

    Raises `ValueError` for stores of two encoders, unless they are `asymmetric`, or of two precisions unless `any_precision`
    will do.
    """

    def __init__(self, any_precision: bool, asymmetric: bool = False, **stores: Store) -> None:
        self._all = {part: Rows.of(store) for part, store in stores.items()}
        bank, query = self._all.values()
        require_one_space(bank, query, any_precision, asymmetric)
        self.names = bank.name, query.name
        self.one_store = len(set(map(os.path.realpath, self.names))) == 1

    def take(
        self, drop_identical: bool, instead: str, shots: int | None = None, seed: int = 0
    ) -> tuple[Rows, Rows, Int[np.ndarray, " q"] | None]:
        """The labelled rows of both, of the bank `shots` of each class drawn by `seed`; and of one store, where in the bank
        each row of the query is, -1 where it is not. With `drop_identical` without those of the query whose image the bank
        has too, of one store without all but the first of each image, on both sides.

        Raises `ValueError` where one has no labels, no row of the query is left (give `instead`), or a class has fewer rows
        than `shots`.
        """
        bank, query = (rows.labelled() for rows in self._all.values())
        if drop_identical:
            same = repeated(query) if self.one_store else overlap(query, [bank])
            query = same.without(query, bank.name, instead)
            bank = query if self.one_store else bank
        bank = bank if shots is None else few_shots(bank, shots, seed)
        own = positions(bank, query) if self.one_store else None
        self.same = same if drop_identical else overlap(query, [bank], own)
        self._taken, self._dropped = (bank, query), drop_identical
        return bank, query, own

    def record(self, truth: Int[np.ndarray, " q"]) -> dict[str, Any]:
        """What a result file says of the rows that were taken; `truth` are the query's labels in the bank's numbering."""
        (bank, query), whole = self._taken, [{"unlabelled": rows.unlabelled} for rows in self._all.values()]
        unreachable = int((~np.isin(truth, bank.labels)).sum())
        counts = whole[1] | {"unreachable": unreachable, "identical": self.same.count}
        return dict(zip(self._all, (bank.record() | whole[0], query.record() | counts), strict=True))

    def remarks(self, truth: Int[np.ndarray, " q"], where: str, so: str) -> list[str]:
        """What to know of them; of the query's rows whose images are `where` ("of the bank") too, what follows, `so`."""
        (a, b), (bank, query) = self._all, self._taken
        return [
            *self.same.remarks(f"{b} rows", where, so, self._dropped),
            *collapse_remarks(a, bank),
            *(line for part, rows in self._all.items() for line in left_out_remarks(part, rows, rows.unlabelled)),
            *unreachable_remarks(bank, query, truth, b),
        ]


def require_one_space(bank: Rows, query: Rows, any_precision: bool, asymmetric: bool) -> None:
    """Raises `ValueError` unless both are of one encoder and precision; or, where they are said to be `asymmetric`, of two
    whose embeddings are equally wide."""
    if not asymmetric or bank.stores[0].fingerprint == query.stores[0].fingerprint:
        bank.require_same_encoder(query, any_precision)
    elif bank.embedding_dim != query.embedding_dim:
        raise ValueError(
            f"{query.name} has {query.embedding_dim} dimensions, {bank.name} {bank.embedding_dim}; two encoders can share a "
            "space only where their embeddings are equally wide"
        )
