"""The usable rows of one or several stores of one encoder: what evaluators, detectors, mappings and students read."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64, Num, UInt8

from featcache.head import Head
from featcache.identical import embedding_hashes, numbered

if TYPE_CHECKING:
    from featcache.store import FeatureStore
    from featcache.store.manifest import ExtractionRecord

    Store: TypeAlias = "FeatureStore | str | os.PathLike[str] | Rows"
else:  # `import evalsuite` brings no zarr: too slow for an annotation
    ExtractionRecord = FeatureStore = Store = Any

_BLOCK_FLOATS = 2**24  # 64 MiB of float32
_RELEASED_BYTES = 2**22  # after so large a read the stores' pages are given back


class Rows:
    """Rows with features, numbered 0…n−1, store after store (or as picked), read block by block so that memory stays
    bounded; failed rows have no number.

    With a `head`, the field `logits` is what that classifier makes of the embeddings, whether or not the stores have
    logits of their own.

    Attributes:
        stores: of one encoder. `name` is their paths, for messages.
        index: (n,) row numbers, each in its own store.
        labels: (n,), −1 where there is none, or where the stores that have some name their classes differently.
        class_names: None where there are none, or where those of stores with labels differ.
        view_counts: (n,) views of each row.
    """

    def __init__(
        self,
        stores: Sequence[FeatureStore],
        store_number: Int[np.ndarray, " n"],
        index: Int[np.ndarray, " n"],
        head: Head | None = None,
    ) -> None:
        self.stores = list(stores)
        self.head = head
        self.index, self._store_number = index, store_number
        self.name = ", ".join(str(store.path) for store in stores)
        self.embedding_dim = stores[0].embedding_dim
        labelled = [store for store in stores if len(stores) > 1 and (np.asarray(store.labels) >= 0).any()] or stores
        one_naming = all(store.class_names == labelled[0].class_names for store in labelled)
        self.class_names = labelled[0].class_names if one_naming else None
        self.labels: Int64[np.ndarray, " n"] = self._kept("labels") if one_naming else np.full(len(index), -1)
        self.view_counts = np.array([store.views for store in stores])[store_number]

    @classmethod
    def of(cls, given: Store | Sequence[Store], head: Head | None = None, *, any_precision: bool = False) -> Rows:
        """The rows with features of a store (open, or its path) or of several in turn. Rows stay as they are.

        Warns where a store's features are too far from fp32.

        Raises:
            ValueError: there is no such store, none of its rows is ok, the head is another encoder's, or stores are of
                different encoders or (unless `any_precision` will do) precisions.
        """
        if isinstance(given, Rows):
            return given
        stores = [_opened(each) for each in (given if isinstance(given, list | tuple) else [given])]
        for store in stores[1:]:
            _require_one_encoder(stores[0], store, any_precision)
        for store in stores:
            _warn_of_unfaithful(store)
        usable = [store.ok for store in stores]
        rows = cls(stores, np.repeat(np.arange(len(stores)), list(map(len, usable))), np.concatenate(usable), head)
        if len(rows) == 0:
            raise ValueError(
                f"{rows.name} has no usable row ({rows.failed} of {rows.total} failed); "
                "`featcache info` says why; extract it again"
            )
        if head is not None:
            rows.refuse_other_head(head)
        return rows

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
        rows = np.arange(len(embedding))
        labels = np.full(len(embedding), -1) if labels is None else labels
        fields = {"embedding": embedding} | ({} if logits is None else {"logits": logits})
        like_a_store: Any = _Arrays(name, fields, labels)
        return cls([like_a_store], np.zeros_like(rows), rows, head)

    def __len__(self) -> int:
        return len(self.index)

    # -- which rows ---------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Rows of the whole stores, failed ones included."""
        return sum(map(len, self.stores))

    @property
    def failed(self) -> int:
        """Rows of the whole stores without features."""
        return sum(len(store.failed) for store in self.stores)

    @property
    def unlabelled(self) -> int:
        """Those of these rows that have no label."""
        return int((self.labels < 0).sum())

    def pick(self, positions: Int[np.ndarray, " b"]) -> Rows:
        """The rows at these positions (0…n−1), numbered anew in this order."""
        return type(self)(self.stores, self._store_number[positions], self.index[positions], self.head)

    def labelled(self) -> Rows:
        """Only the rows that have a label: the same object each time, so that what is learned of it can be shared.

        Raises:
            ValueError: there is none.
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
        return self if keep.all() else self.pick(np.flatnonzero(keep))

    def locate(self, position: int) -> tuple[int, int]:
        """Which store a row is of, and which row of that."""
        return int(self._store_number[position]), int(self.index[position])

    def of_store(self, number: int) -> Int64[np.ndarray, " m"]:
        """The positions of the rows of one store."""
        return np.flatnonzero(self._store_number == number)

    @cached_property
    def place(self) -> Int64[np.ndarray, " n"]:
        """The place of each row among all those of the stores, one store after the other, failed rows included."""
        start = np.cumsum([0, *map(len, self.stores)])
        place: Int64[np.ndarray, " n"] = start[self._store_number] + self.index
        return place

    # -- what is kept of each row -------------------------------------------------------------------------

    def _kept(self, name: str) -> np.ndarray:
        """What the stores keep for each of their rows under this name, of these rows."""
        found: np.ndarray = np.concatenate([np.asarray(getattr(store, name)) for store in self.stores])[self.place]
        return found

    @property
    def sample_ids(self) -> np.ndarray:
        """(n,) strings."""
        return self._kept("sample_ids").astype(object)

    @property
    def content(self) -> UInt8[np.ndarray, "n 16"]:
        """The hash of each encoded image; zeros where there is no image."""
        return self._kept("content")

    @property
    def hashed(self) -> bool:
        """Whether every row's image is known by its hash."""
        return bool(self.content.any(axis=1).all())

    @cached_property
    def embedding_hashes(self) -> UInt8[np.ndarray, "n 16"]:
        """Equal where all of the embedding is; takes a pass over the rows."""
        return embedding_hashes(self.blocks())

    @property
    def adversarial(self) -> Bool[np.ndarray, " n"]:
        """Which rows are of `adversarial:` corpora: of images made of others, under the ids of those."""
        specs = [str(store.manifest.corpus.spec) for store in self.stores]
        made: Bool[np.ndarray, " s"] = np.array([spec.startswith("adversarial:") for spec in specs])
        return np.take(made, self._store_number)

    def images(self) -> Int64[np.ndarray, " n"]:
        """The same number for rows of the same image, whatever their names and stores: known by the hashes that stores keep,
        or, where one keeps none, by all of the embedding."""
        return numbered(self.content if self.hashed else self.embedding_hashes)

    @property
    def classes(self) -> list[str]:
        """Name of every class, or its number where classes have none: of the whole stores' labels, where they have some; else
        of the head, else of the columns of the stores' logits.

        Raises:
            ValueError: none of these is there.
        """
        known = [np.asarray(store.labels) for store in self.stores] if (self.labels >= 0).any() else []
        if known:
            return list(self.class_names or ()) or [
                str(number) for number in range(int(max(each.max() for each in known)) + 1)
            ]
        if self.head is not None:
            return self.head.class_names or [str(number) for number in self.head.labels.tolist()]
        if all("logits" in store.manifest.fields for store in self.stores):
            return [str(number) for number in range(self.shape_of("logits")[-1])]
        raise ValueError(
            f"{self.name} has no classes: neither labels that its stores agree on nor logits; extract images in class "
            "sub-folders, or give a head"
        )

    @property
    def logit_classes(self) -> list[str] | None:
        """Names of the columns of `logits`, or of the maps of `dense`: the head's where there is one, else the stores', None where they do not know."""
        known = self.head.class_names if self.head else self.stores[0].manifest.encoder.classes
        return list(known) if known else None

    def weight(self, positions: Int[np.ndarray, " b"], view: int | np.ndarray = 0) -> Float32[np.ndarray, " b"]:
        """How much each of these rows counts: the field `weight` where every store has it, else 1."""
        if not all("weight" in store.manifest.fields for store in self.stores):
            return np.ones(len(positions), np.float32)
        return self.gather(positions, "weight", view).reshape(len(positions)).astype(np.float32)

    # -- features -----------------------------------------------------------------------------------------

    def gather(
        self, positions: Sequence[int] | np.ndarray, field: str = "embedding", view: int | np.ndarray = 0
    ) -> Num[np.ndarray, "b ..."]:
        """Features of the rows at these positions (0…n−1), in this order; `view` is one number for all, or one for each.

        As stored, float16, float32 or whole numbers; the wider where the stores differ. Logits of a `head` are float32.

        Raises:
            ValueError: a store lacks the field.
        """
        if field == "logits" and self.head is not None:
            return self.head.logits(self.gather(positions, "embedding", view).astype(np.float32)).astype(np.float32)
        positions = np.asarray(positions, np.int64)
        view = np.broadcast_to(np.asarray(view, np.int64), positions.shape)
        at = [np.flatnonzero(self._store_number[positions] == number) for number in range(len(self.stores))]
        parts = [
            store.gather(self.index[positions[here]], field, view[here])
            for store, here in zip(self.stores, at, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        gathered = np.empty((len(positions), *parts[0].shape[1:]), np.result_type(*parts))
        for here, part in zip(at, parts, strict=True):
            gathered[here] = part
        return gathered

    def take(
        self, positions: Int[np.ndarray, " b"], field: str = "embedding", view: int = 0
    ) -> Num[np.ndarray, "b ..."]:
        """As `gather`, but always as float32 (whole numbers as they are), finite, and of `head` where the field is logits.

        Raises:
            ValueError: a value is not finite.
        """
        if field == "logits" and self.head is not None:
            return self._finite(self.head.logits(self.take(positions, "embedding", view)), positions, field)
        gathered = self.gather(positions, field, view)
        if gathered.nbytes > _RELEASED_BYTES:
            for store in self.stores:
                store.release(field)
        return self._finite(gathered, positions, field)

    def _finite(
        self, values: Num[np.ndarray, "b ..."], positions: Int[np.ndarray, " b"], field: str
    ) -> Num[np.ndarray, "b ..."]:
        """The values of the rows at these positions as float32. Raises `ValueError` when one is not finite."""
        if values.dtype.kind in "iu":
            return values
        narrow = values.dtype == np.float16
        with np.errstate(over="ignore"):  # what is too large is infinite, and said to be
            values = values.astype(np.float32)
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if not finite.all():
            store, row = self.locate(int(positions[finite.argmin()]))
            where = f"{self.stores[store].path} row {row}"
            if field == "logits" and self.head is not None:
                raise ValueError(f"{where}: what {self.head.name} makes of it is not finite; fit the head again")
            remedy = "with --dtype float32" if narrow else "with an encoder that gives numbers, or leave the row out"
            raise ValueError(f"{where}: {field} is not finite; extract it again {remedy}")
        return values

    def blocks(self, size: int | None = None, view: int = 0) -> Iterator[Float[np.ndarray, "_ d"]]:
        """The embeddings of all rows that have this view, in order, as float32: `size` rows at a time (default: 64 MiB).

        Raises:
            ValueError: a value is not finite.
        """
        rows = np.flatnonzero(self.view_counts > view)
        size = size or max(1, _BLOCK_FLOATS // self.embedding_dim)
        for start in range(0, len(rows), size):
            yield self.take(rows[start : start + size], "embedding", view)

    def blocks_of(
        self, fields: Iterable[str], lose: Callable[[str, Exception], None] | None = None
    ) -> Iterator[dict[str, Float[np.ndarray, "_ d"]]]:
        """Several fields of the same rows in order, as float32: 64 MiB of them all at a time.

        With `lose`, a field other than the embedding in which a value is not finite ends nothing: `lose` is told, and
        the field is missing from that block on.

        Raises:
            ValueError: a store lacks a field, or a value is not finite.
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

    def shape_of(self, field: str) -> Sequence[int]:
        """Of a row's feature, one view."""
        if field == "logits" and self.head is not None:
            return [len(self.head.bias)]
        return self.stores[0].manifest.fields[field]

    def _width(self, field: str) -> int:
        if field == "logits" and self.head is not None:
            return self.embedding_dim + len(self.head.bias)  # the embeddings are read for them
        return math.prod(self.shape_of(field))

    # -- what is asked of them ----------------------------------------------------------------------------

    def require_field(self, field: str) -> None:
        """Raise `ValueError` unless every store has this field."""
        if field == "logits" and self.head is not None:
            return
        for store in self.stores:
            if field not in store.manifest.fields:
                fields = ",".join(dict.fromkeys(("embedding", field)))
                raise ValueError(
                    f"{store.path} has no {field}; extract it again with --fields {fields}, using an encoder that has them"
                    + (", or give a head (`evalsuite probe` saves one)" if field == "logits" else "")
                )

    def refuse_other_head(self, head: Head) -> None:
        """Raise `ValueError` unless the head can be of this encoder's embeddings."""
        fingerprint = self.stores[0].fingerprint
        if head.weight.shape[1] != self.embedding_dim or head.fingerprint not in (None, fingerprint):
            of = f" of encoder {head.fingerprint}" if head.fingerprint else ""
            raise ValueError(
                f"{head.name} was fitted to {head.weight.shape[1]} dimensions{of}, {self.name} has "
                f"{self.embedding_dim} of {fingerprint}; fit a head on this encoder's rows"
            )

    def require_head(self) -> Head:
        """The head. Raises `ValueError` when none was given."""
        if self.head is None:
            raise ValueError(
                f"a head is needed to score against {self.name}; fit one with `evalsuite probe … --save FILE` and "
                "give it as --head FILE"
            )
        return self.head

    def require_same_encoder(self, other: Rows, any_precision: bool = False) -> None:
        """Raise `ValueError` unless `other` holds embeddings made by the same encoder, and, unless `any_precision` will
        do, computed in the same precision and kept in the same dtype."""
        from featcache.store.comparable import require_kept_alike

        for mine in self.stores:
            for theirs in other.stores:
                _require_one_encoder(mine, theirs, any_precision)
                if not any_precision:
                    require_kept_alike((str(mine.path), mine.manifest), (str(theirs.path), theirs.manifest))

    @property
    def extraction(self) -> ExtractionRecord:
        """How the embeddings were computed, as far as the (first) store says."""
        return self.stores[0].manifest.extraction

    def record(self) -> dict[str, Any]:
        """What a result file says about this input."""
        first = self.stores[0]
        return {
            "path": self.name,
            "encoder": first.encoder_name,
            "fingerprint": first.fingerprint,
            "precision": self.extraction.precision,
            "dtype": first.manifest.dtype("embedding"),
            "rows": len(self),
            "failed": self.failed,
        }


class _Arrays:
    """Arrays in memory that answer like a store."""

    encoder_name = fingerprint = "arrays"
    class_names: list[str] | None = None
    failed = np.empty(0, np.int64)
    views = 1

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

    def gather(self, rows: np.ndarray, field: str, view: np.ndarray) -> np.ndarray:
        assert not view.any()
        found: np.ndarray = self.arrays[field][rows]
        return found

    def release(self, field: str) -> None:
        """Nothing is mapped."""


def _opened(store: Any) -> FeatureStore:
    if isinstance(store, str | os.PathLike):
        from featcache.store import open_store

        return open_store(store)
    found: FeatureStore = store
    return found


def _warn_of_unfaithful(store: FeatureStore) -> None:
    from featcache.store.comparable import unfaithful

    if said := unfaithful(store.manifest.extraction):
        warnings.warn(f"{store.path}: {said}", RuntimeWarning, stacklevel=4)


def _require_one_encoder(one: FeatureStore, other: FeatureStore, any_precision: bool) -> None:
    from featcache.store.comparable import require_comparable

    if (one.fingerprint, one.embedding_dim) != (other.fingerprint, other.embedding_dim):
        raise ValueError(
            f"{other.path} was made by encoder {other.encoder_name} ({other.fingerprint}, "
            f"{other.embedding_dim} dimensions), {one.path} by {one.encoder_name} "
            f"({one.fingerprint}, {one.embedding_dim}); extract both with the same encoder"
        )
    if not any_precision:
        require_comparable((str(one.path), one.manifest), (str(other.path), other.manifest))


def left_out_remarks(role: str, rows: Rows, unlabelled: int = 0) -> list[str]:
    """One line about what is not measured with of the stores of `rows`: rows that failed, and `unlabelled` ones; no line
    where that is nothing. `role` is their part, such as `bank`."""
    parts = [f"{count:,} {what}" for count, what in ((rows.failed, "failed"), (unlabelled, "without a label")) if count]
    return [f"{role} {rows.name}: left out of {rows.total:,} rows: {', '.join(parts)}"] if parts else []
