"""The same images on both sides of an evaluation: what is learned from an image says nothing about others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from featcache.identical import again, copies
from featcache.rows import Rows


@dataclass(frozen=True)
class Overlap:
    """Which rows of a set are there again, on the other side or under another id; `by_embedding` where stores keep no
    hashes of their images, so that only rows of the very same embedding are known."""

    rows: Bool[np.ndarray, " n"]
    by_embedding: bool = False

    def __or__(self, other: Overlap) -> Overlap:
        return Overlap(self.rows | other.rows, self.by_embedding or other.by_embedding)

    @property
    def count(self) -> int:
        return int(self.rows.sum())

    @property
    def by(self) -> str:
        """By what rows were found to be the same: `image` or `embedding`."""
        return "embedding" if self.by_embedding else "image"

    def without(self, rows: Rows, others: str, instead: str) -> Rows:
        """The rows that are not there again. Raises `ValueError` when none is left: `others` has them all, give `instead`."""
        if self.rows.all():
            raise ValueError(f"every row of {rows.name} is in {others} too; give {instead}")
        return rows.pick(np.flatnonzero(~self.rows))

    def remarks(self, what: str, where: str, so: str, dropped: bool) -> list[str]:
        """One line, or none where no row is there again: so many of `what` ("query rows") are images `where` ("of the
        bank"), and what follows, `so`."""
        if not self.rows.any():
            return []
        same = f"are images {where} too"
        if self.by_embedding:
            same = f"have all of their embedding in common with a row {where} (without hashes of images none can tell "
            same += "whether it is the same image)"
        said = f"{self.count:,} of {len(self.rows):,} {what} {same}"
        return [f"{said}: left out" if dropped else f"{said}: {so}; --drop-identical leaves them out"]


def overlap(rows: Rows, others: Sequence[Rows], own: Int[np.ndarray, " n"] | None = None) -> Overlap:
    """Which of `rows` are images that one of `others` has too. `own` gives each row's place in the only one of `others`
    where that holds this very row, -1 where not: it does not count as another.

    Images are told by the hashes that stores keep; where one of two sides keeps none, rows by all of their embedding.
    """
    found = Overlap(np.zeros(len(rows), bool))
    for other in others:
        by_embedding = not (rows.hashed and other.hashed)
        times = copies(*(each.embedding_hashes if by_embedding else each.content for each in (rows, other)))
        found |= Overlap(times > (0 if own is None else own >= 0), by_embedding)
    return found


def repeated(rows: Rows) -> Overlap:
    """Which rows are an image that an earlier one is."""
    by_embedding = not rows.hashed
    return Overlap(again(rows.embedding_hashes if by_embedding else rows.content), by_embedding)
