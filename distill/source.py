"""Source: the usable rows of one or several stores of the same teacher, numbered through."""

import copy
import logging
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int64

from featcache.store import FeatureStore
from featcache.store.comparable import require_comparable, unfaithful
from featcache.store.identical import embedding_hashes, numbered
from featcache.store.layout import EMBEDDING

log = logging.getLogger("distill")


class Source:
    """Rows with features, 0…n−1, store after store; failed rows have no number.

    Args:
        stores: sealed, of one encoder.
        any_precision: whether stores in different precisions will do.

    Attributes:
        view_counts: (n,) views of each row.
        labels: (n,), −1 where there is none, or where the stores' classes differ.

    Raises:
        ValueError: the stores are of different encoders or precisions, or hold not one row with features.
    """

    def __init__(self, stores: Sequence[FeatureStore], any_precision: bool = False):
        first = stores[0]
        for store in stores[1:]:
            if (store.fingerprint, store.embedding_dim) != (first.fingerprint, first.embedding_dim):
                raise ValueError(
                    f"{store.path} was made by encoder {store.encoder_name} ({store.fingerprint[:12]}), {first.path} by "
                    f"{first.encoder_name} ({first.fingerprint[:12]}); students learn from one teacher at a time"
                )
            if not any_precision:
                require_comparable((str(first.path), first.manifest), (str(store.path), store.manifest))
        for store in stores:
            if said := unfaithful(store.manifest.get("extraction") or {}):
                log.warning("%s: %s", store.path, said)
        self.stores, self.embedding_dim = list(stores), first.embedding_dim
        self.path = ", ".join(str(store.path) for store in stores)
        rows = [store.ok for store in stores]
        self._row = np.concatenate(rows)
        self._store = np.repeat(np.arange(len(stores)), [len(ok) for ok in rows])
        if not len(self._row):
            raise ValueError(f"{self.path}: not one row has features; `featcache info` says why")
        self.view_counts = np.array([store.views for store in stores])[self._store]
        one_naming = all(store.class_names == first.class_names for store in stores)
        labels = [
            store.labels[ok] if one_naming else np.full(len(ok), -1) for store, ok in zip(stores, rows, strict=True)
        ]
        self.labels: Int64[np.ndarray, " n"] = np.concatenate(labels)

    @classmethod
    def of(cls, given: "Source | FeatureStore") -> "Source":
        return given if isinstance(given, Source) else cls([given])

    def __len__(self) -> int:
        return len(self._row)

    def take(self, index: np.ndarray) -> "Source":
        """A source of these rows alone, numbered anew in this order."""
        taken = copy.copy(self)
        taken._row, taken._store = self._row[index], self._store[index]
        taken.view_counts, taken.labels = self.view_counts[index], self.labels[index]
        return taken

    def locate(self, index: int) -> tuple[int, int]:
        """Which store, and which of its rows."""
        return int(self._store[index]), int(self._row[index])

    def of_store(self, number: int) -> Int64[np.ndarray, " m"]:
        """Which rows are of the store of that number."""
        return np.flatnonzero(self._store == number)

    def images(self) -> Int64[np.ndarray, " n"]:
        """The same number for rows of the same image, whatever their names and stores: known by the hashes that stores keep,
        or, where one keeps none, by all of the embedding."""
        hashes = np.empty((len(self), 16), np.uint8)
        for number, store in enumerate(self.stores):
            here = self.of_store(number)
            hashes[here] = store.content[self._row[here]]
        return numbered(hashes if hashes.any(axis=1).all() else embedding_hashes(self.blocks()))

    def gather(
        self, index: Sequence[int] | np.ndarray, field: str = EMBEDDING, view: int | np.ndarray = 0
    ) -> Float[np.ndarray, "b ..."]:
        """Features of these rows, in this order; `view` is one number for all, or one for each.

        As stored, float16 or float32; the wider where the stores differ.

        Raises:
            ValueError: a store lacks the field.
        """
        index = np.asarray(index, np.int64)
        view = np.broadcast_to(np.asarray(view, np.int64), index.shape)
        shape = self.stores[0].manifest["fields"].get(field, [self.embedding_dim])
        dtypes = {np.dtype(store.layout[field].dtype) for store in self.stores if field in store.layout}
        gathered = np.empty((len(index), *shape), np.result_type(np.float16, *dtypes))
        for number, store in enumerate(self.stores):
            here = np.flatnonzero(self._store[index] == number)
            if len(here) or number == 0:
                gathered[here] = store.gather(self._row[index[here]], field, view[here])
        return gathered

    def blocks(self, field: str = EMBEDDING, view: int = 0, size: int = 8192) -> Iterator[np.ndarray]:
        """Features of all rows that have this view, in order, `size` at a time."""
        rows = np.flatnonzero(self.view_counts > view)
        for start in range(0, len(rows), size):
            yield self.gather(rows[start : start + size], field, view)
