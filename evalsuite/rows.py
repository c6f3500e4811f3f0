"""The usable rows of a store, as every evaluator and detector reads them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int, UInt8

from evalsuite.head import Head
from featcache.store.identical import embedding_hashes

if TYPE_CHECKING:
    from featcache.store import FeatureStore

    Store: TypeAlias = "FeatureStore | str | os.PathLike[str] | Rows"
else:  # `import featcache` brings torch: too slow for an annotation
    FeatureStore = Store = Any

_BLOCK_FLOATS = 2**24  # 64 MiB of float32
_RELEASED_BYTES = 2**22  # after so large a read the store's pages are given back


class Rows:
    """Some rows of one store, in order, read block by block so that memory stays bounded.

    `index` holds their row numbers in the store; `labels` (n,) is -1 where a row has none; `name` is the
    store's path, for messages. With a `head`, the field `logits` is what that classifier makes of the embeddings,
    whether or not the store has logits of its own.
    """

    def __init__(self, store: FeatureStore | _Arrays, index: Int[np.ndarray, " n"], head: Head | None = None) -> None:
        self._store = store
        self.head = head
        self.index = index
        self.name = str(store.path)
        self.embedding_dim = store.embedding_dim
        self.class_names = store.class_names
        self.labels = np.asarray(store.labels)[index]

    @classmethod
    def of(cls, store: Store, head: Head | None = None) -> Rows:
        """The rows of a store (open, or its path) that are ok; failed ones are left out and counted. Rows stay as they are.

        Raises `ValueError` when there is no such store, none of its rows is ok, or the head is another encoder's.
        """
        if isinstance(store, Rows):
            return store
        if isinstance(store, str | os.PathLike):
            from featcache.store import open_store

            store = open_store(store)
        from featcache.store.comparable import unfaithful

        if said := unfaithful(store.manifest.get("extraction") or {}):
            warnings.warn(f"{store.path}: {said}", RuntimeWarning, stacklevel=3)
        index = store.ok
        if len(index) == 0:
            raise ValueError(
                f"{store.path} has no usable row ({len(store.failed)} of {len(store)} failed); "
                "`featcache info` says why; extract it again"
            )
        if head is not None and (
            head.weight.shape[1] != store.embedding_dim or head.fingerprint not in (None, store.fingerprint)
        ):
            of = f" of encoder {head.fingerprint}" if head.fingerprint else ""
            raise ValueError(
                f"{head.name} was fitted to {head.weight.shape[1]} dimensions{of}, {store.path} has "
                f"{store.embedding_dim} of {store.fingerprint}; fit a head on this encoder's rows"
            )
        return cls(store, index, head)

    @classmethod
    def from_arrays(
        cls,
        embedding: Float[np.ndarray, "n d"],
        labels: Int[np.ndarray, " n"] | None = None,
        name: str = "array",
        logits: Float[np.ndarray, "n c"] | None = None,
        head: Head | None = None,
    ) -> Rows:
        """Rows of arrays in memory."""
        labels = np.full(len(embedding), -1) if labels is None else labels
        fields = {"embedding": embedding} | ({} if logits is None else {"logits": logits})
        return cls(_Arrays(name, fields, labels), np.arange(len(embedding)), head)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def total(self) -> int:
        """Rows of the whole store, failed ones included."""
        return len(self._store)

    def blocks(self, size: int | None = None) -> Iterator[Float[np.ndarray, "_ d"]]:
        """The embeddings in order as float32, `size` rows at a time (default: 64 MiB).

        Raises `ValueError` when a value is not finite.
        """
        size = size or max(1, _BLOCK_FLOATS // self.embedding_dim)
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))

    def blocks_of(
        self, fields: Iterable[str], lose: Callable[[str, Exception], None] | None = None
    ) -> Iterator[dict[str, Float[np.ndarray, "_ d"]]]:
        """Several fields of the same rows in order, as float32: 64 MiB of them all at a time.

        With `lose`, a field other than the embedding in which a value is not finite ends nothing: `lose` is told, and
        the field is missing from that block on.

        Raises `ValueError` when the store lacks a field or a value is not finite.
        """
        fields = list(fields)
        for field in fields:
            self.require_field(field)
        size = max(1, _BLOCK_FLOATS // max(1, sum(self._width(field) for field in fields)))
        for start in range(0, len(self), size):
            positions = np.arange(start, min(start + size, len(self)))
            block: dict[str, np.ndarray] = {}
            for field in sorted(fields, key="embedding".__ne__):
                try:
                    if field == "logits" and self.head is not None and "embedding" in block:  # already read
                        block[field] = self._finite(self.head.logits(block["embedding"]), positions, field)
                    else:
                        block[field] = self.take(positions, field)
                except ValueError as error:
                    if lose is None or field == "embedding":
                        raise
                    lose(field, error)
                    fields.remove(field)
            yield block

    def _width(self, field: str) -> int:
        if field == "logits" and self.head is not None:
            return self.embedding_dim + len(self.head.bias)  # the embeddings are read for them
        return self._store.manifest["fields"][field][-1]

    def require_field(self, field: str) -> None:
        """Raise `ValueError` unless the store has this field."""
        if field not in self._store.manifest["fields"] and not (field == "logits" and self.head is not None):
            fields = ",".join(dict.fromkeys(("embedding", field)))
            raise ValueError(
                f"{self.name} has no {field}; extract it again with --fields {fields}, using an encoder that has them"
                + (", or give a head (`evalsuite probe` saves one)" if field == "logits" else "")
            )

    def require_head(self) -> Head:
        """The head. Raises `ValueError` when none was given."""
        if self.head is None:
            raise ValueError(
                f"a head is needed to score against {self.name}; fit one with `evalsuite probe … --save FILE` and "
                "give it as --head FILE"
            )
        return self.head

    def take(self, positions: Int[np.ndarray, " b"], field: str = "embedding") -> Float[np.ndarray, "b d"]:
        """The embeddings (or another field) at these positions (0..n-1), in this order, as float32.

        Raises `ValueError` when a value is not finite.
        """
        if field == "logits" and self.head is not None:
            return self._finite(self.head.logits(self.take(positions)), positions, field)
        gathered = np.asarray(self._store.gather(self.index[positions], field=field, view=0))
        if gathered.nbytes > _RELEASED_BYTES:
            self._store.release(field)
        return self._finite(gathered, positions, field)

    def _finite(
        self, values: Float[np.ndarray, "b d"], positions: Int[np.ndarray, " b"], field: str
    ) -> Float[np.ndarray, "b d"]:
        """The values of the rows at these positions as float32. Raises `ValueError` when one is not finite."""
        narrow = values.dtype == np.float16
        with np.errstate(over="ignore"):  # what is too large is infinite, and said to be
            values = values.astype(np.float32)
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            row = self.index[positions[finite.argmin()]]
            if field == "logits" and self.head is not None:
                raise ValueError(
                    f"{self.name} row {row}: what {self.head.name} makes of it is not finite; fit the head again"
                )
            remedy = "with --dtype float32" if narrow else "with an encoder that gives numbers, or leave the row out"
            raise ValueError(f"{self.name} row {row}: {field} is not finite; extract it again {remedy}")
        return values

    @property
    def sample_ids(self) -> np.ndarray:
        """(n,) strings."""
        return np.asarray(self._store.sample_ids)[self.index].astype(object)

    @property
    def content(self) -> np.ndarray:
        """(n, 16) uint8 hash of each encoded image; zeros where there is no image."""
        return np.asarray(self._store.content)[self.index]

    @property
    def hashed(self) -> bool:
        """Whether every row's image is known by its hash."""
        return bool(self.content.any(axis=1).all())

    @cached_property
    def embedding_hashes(self) -> UInt8[np.ndarray, "n 16"]:
        """Equal where all of the embedding is; takes a pass over the rows."""
        return embedding_hashes(self.blocks())

    def labelled(self) -> Rows:
        """Only the rows that have a label: the same object each time, so that what is learned of it can be shared.

        Raises `ValueError` when there is none.
        """
        return self._labelled

    @property
    def asked_for_labels(self) -> bool:
        """Whether `labelled` has been called, and there were some."""
        return "_labelled" in vars(self)

    @cached_property
    def _labelled(self) -> Rows:
        keep = self.labels >= 0
        if not keep.any():
            raise ValueError(f"{self.name} has no labels; extract a corpus with class sub-folders or a label column")
        return self if keep.all() else Rows(self._store, self.index[keep], self.head)

    def pick(self, positions: Int[np.ndarray, " b"]) -> Rows:
        """The rows at these positions (0..n-1), in this order."""
        return Rows(self._store, self.index[positions], self.head)

    def require_same_encoder(self, other: Rows, any_precision: bool = False) -> None:
        """Raise `ValueError` unless `other` holds embeddings made by the same encoder, and, unless `any_precision` will
        do, computed in the same precision and kept in the same dtype."""
        from featcache.store.comparable import require_comparable, require_kept_alike

        mine, theirs = self._store, other._store
        if (mine.fingerprint, mine.embedding_dim) != (theirs.fingerprint, theirs.embedding_dim):
            raise ValueError(
                f"{other.name} was made by encoder {theirs.encoder_name} ({theirs.fingerprint}, "
                f"{theirs.embedding_dim} dimensions), {self.name} by {mine.encoder_name} "
                f"({mine.fingerprint}, {mine.embedding_dim}); extract both with the same encoder"
            )
        if not any_precision:
            both = (self.name, mine.manifest), (other.name, theirs.manifest)
            require_comparable(*both)
            require_kept_alike(*both)

    @property
    def extraction(self) -> dict[str, Any]:
        """How the embeddings were computed, as far as the store says."""
        return dict(self._store.manifest.get("extraction") or {})

    def record(self) -> dict[str, Any]:
        """What a result file says about this input."""
        return {
            "path": self.name,
            "encoder": self._store.encoder_name,
            "fingerprint": self._store.fingerprint,
            "precision": self.extraction.get("precision"),
            "dtype": self._store.manifest.get("dtypes", {}).get("embedding", "float16"),
            "rows": len(self),
            "failed": len(self._store.failed),
        }


class _Arrays:
    """Arrays in memory that answer like a store."""

    encoder_name = fingerprint = "arrays"
    class_names: list[str] | None = None
    failed = np.empty(0, np.int64)

    def __init__(self, path: str, fields: dict[str, np.ndarray], labels: np.ndarray) -> None:
        from featcache.store.manifest import CorpusRecord, EncoderRecord, Manifest, ViewsRecord

        self.path = path
        self.arrays = fields
        self.labels = labels
        self.manifest = Manifest(
            encoder=EncoderRecord(name=self.encoder_name, fingerprint=self.fingerprint),
            corpus=CorpusRecord(spec=None, rows=max(1, len(labels)), class_names=None),
            views=ViewsRecord(count=1),
            fields={name: list(array.shape[1:]) for name, array in fields.items()},
            chunk_rows=1,
        )
        self.embedding_dim = fields["embedding"].shape[1]
        self.sample_ids = np.arange(len(labels))
        self.content = np.zeros((len(labels), 16), np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, rows: np.ndarray, field: str, view: int) -> np.ndarray:
        assert view == 0
        return self.arrays[field][rows]

    def release(self, field: str) -> None:
        """Nothing is mapped."""


def left_out_remarks(role: str, rows: Rows, unlabelled: int = 0) -> list[str]:
    """One line about what is not measured with of the store of `rows`: rows that failed, and `unlabelled` ones; no line
    where that is nothing. `role` is the store's part, such as `bank`."""
    failed = rows.record()["failed"]
    parts = [f"{count:,} {what}" for count, what in ((failed, "failed"), (unlabelled, "without a label")) if count]
    return [f"{role} {rows.name}: left out of {rows.total:,} rows: {', '.join(parts)}"] if parts else []
